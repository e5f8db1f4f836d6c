#!/usr/bin/env bash
# pyarrow's csv reader joins two rows behind a NUL character, without an error.
#
# Seen with pyarrow 25.0.1 on Python 3.11, x86-64 with AVX2, 28 November 2026; all reading options at their defaults.
# In a file of 30,000 rows of ordinary sentences (1.6 MB) one text ends in a NUL. The delimiter and the line break
# right behind it are taken for text: that row swallows its label and the whole next row. Quotes do not help, and
# open_csv does the same; any other control character is read right, and so is a NUL in a short file, so a test with a
# few rows does not show it. Seen:
#     NUL, 1000 rows: 1000 rows, 0 of them wrong              NUL, 30000 rows: 29999 rows, 1 of them wrong
#     NUL, 30000 rows, quoted: 29999 rows, 1 of them wrong    0x01, 30000 rows: 30000 rows, 0 of them wrong
# So look for NUL bytes first, and read such a file with Python's csv module (3.11 or newer), which reads all of these
# right. Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q pyarrow==25.0.1

cat > read_rows.py <<'PY'
import csv, io
from pyarrow import csv as arrow_csv

def case(name, character, count=30_000, quoting=csv.QUOTE_MINIMAL):
    rows = [[f"row {n} with a handful of ordinary words in it", "yes"] for n in range(count)]
    rows[-500][0] += character
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows([["text", "label"], *rows])
    assert list(csv.reader(io.StringIO(text.getvalue(), newline=""))) == [["text", "label"], *rows]
    found = arrow_csv.read_csv(io.BytesIO(text.getvalue().encode())).to_pylist()
    known = {tuple(row) for row in rows}
    wrong = sum(tuple(row.values()) not in known for row in found)
    print(f"{name}: {len(found)} rows, {wrong} of them wrong")

case("NUL, 1000 rows", "\0", count=1000)
case("NUL, 30000 rows", "\0")
case("NUL, 30000 rows, quoted", "\0", quoting=csv.QUOTE_ALL)
case("0x01, 30000 rows", "\1")
PY
seen=$(venv/bin/python read_rows.py)
echo "$seen"
expected='NUL, 1000 rows: 1000 rows, 0 of them wrong
NUL, 30000 rows: 29999 rows, 1 of them wrong
NUL, 30000 rows, quoted: 29999 rows, 1 of them wrong
0x01, 30000 rows: 30000 rows, 0 of them wrong'
test "$seen" = "$expected" || { echo "changed"; exit 1; }
