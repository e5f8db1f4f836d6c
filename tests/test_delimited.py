from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.formats import delimited
from orchestrator.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fields(file: Path, columns: Sequence[str], *, usual: str = ",", named: str | None = None) -> list[list[str]]:
    """The rows of a file, read as the reader reads them."""
    dialect = delimited.inspect(file, usual=usual, named=named)
    parts = [[array.to_pylist() for array in arrays] for arrays in delimited.read(file, dialect, columns)]
    return [list(row) for part in parts for row in zip(*part, strict=True)]


def by_csv(file: Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return [row for row in csv.reader(stream, delimiter=delimiter, quoting=quoting) if row][1:]


@pytest.mark.parametrize(
    "values",
    [
        ["007", "012"],
        ["1e3", "2E5"],
        ["True", "true"],
        ["1", "1.0"],
        ["1.50", "00001 "],
        ["2024-01-01", "12:30"],
        ["NA", "null", "None", "nan", "N/A", "#N/A", "-inf"],
        [" leading", "trailing "],
        ["+5", "0x10", "1_000", "1,5"],
    ],
)
def test_a_value_is_the_text_that_stands_there(tmp_path: Path, values: list[str]) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *(["a", value] for value in values)])
    assert fields(tmp_path / "rows.csv", ["label"]) == [[value] for value in values]


def test_values_do_not_depend_on_the_rows_around_them(tmp_path: Path) -> None:
    values = ["007"] * 60_000 + ["7", "E11", "042"]
    file = write(tmp_path / "rows.csv", "label,text\n" + "".join(f"{value},some words\n" for value in values))
    assert [row[0] for row in fields(file, ["label"])] == values


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('a,b\n"x ""y"" z",1\n', [['x "y" z', "1"]]),
        ('a,b\n"two\nlines",1\n', [["two\nlines", "1"]]),
        ('a,b\r\n"two\r\nlines",1\r\n', [["two\r\nlines", "1"]]),
        ("a,b\rx,1\ry,2\r", [["x", "1"], ["y", "2"]]),
        ('a,b\n5" disk,1\n', [['5" disk', "1"]]),
        ('a,b\nsay "hi",1\n', [['say "hi"', "1"]]),
        ('a,b\n"ab"c,1\n', [["abc", "1"]]),
        ("a,b\n,\n", [["", ""]]),
        ('a,b\n"",""\n', [["", ""]]),
        ("a,b\n\n\nx,1\n\ny,2\n\n", [["x", "1"], ["y", "2"]]),
        ("\n\na,b\nx,1\n", [["x", "1"]]),
        ("a,b\nx,1", [["x", "1"]]),
        ('a,b\nx,"1"', [["x", "1"]]),
        ("\ufeffa,b\nx,1\n", [["x", "1"]]),
        ('\ufeff"a",b\nx,1\n', [["x", "1"]]),
        ('"a","b"\nx,1\n', [["x", "1"]]),
        ("a,b\nnul\0byte,1\n", [["nul\0byte", "1"]]),
        ("a,b\nü日本𝄞,\u2028\n", [["ü日本𝄞", "\u2028"]]),
    ],
)
def test_fields_are_those_of_the_csv_module(tmp_path: Path, content: str, rows: list[list[str]]) -> None:
    file = write(tmp_path / "rows.csv", content)
    assert fields(file, ["a", "b"]) == rows == by_csv(file)


@pytest.mark.parametrize("size", [200, 1 << 18])
def test_fields_behind_a_nul_are_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    # pyarrow 25.0.1 misses delimiters behind a NUL, from the second block on.
    rows = [[f"{'some words ' * 9}{number}", "a"] for number in range(9)]
    rows = [*rows, ["nul\0", "b"], *rows, ["\0", "\0,"], ['"\0"', "\n\0"]]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *rows])
    monkeypatch.setattr(delimited, "BLOCK_BYTES", size)
    assert fields(tmp_path / "rows.csv", ["text", "label"]) == rows == by_csv(tmp_path / "rows.csv")
    write(tmp_path / "short.csv", "text,label\n" + "words,a\n" * 99 + "nul\0\n")
    with pytest.raises(DataError, match=r"row 100 of .* line 101, has fewer fields"):
        fields(tmp_path / "short.csv", ["text"])


def test_header_may_hold_line_breaks_and_names_without_text(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", '"two\nlines",,\nx,1,2\n')
    assert delimited.inspect(file, usual=",").names == ("two\nlines", "", "")
    assert fields(file, ["two\nlines"]) == [["x"]]


@given(
    table=st.lists(
        st.lists(st.text(st.sampled_from("ab1. \t,;|\"'\r\né日\\#\0")), min_size=2, max_size=2), min_size=1, max_size=6
    ),
    delimiter=st.sampled_from(",;|\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
@settings(max_examples=150, deadline=None)
def test_any_table_is_read_as_the_csv_module_reads_it(
    table: list[list[str]], delimiter: str, quoting: Any, end: str
) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([["a", "b"], *table])
    written = buffer.getvalue().encode()
    # Python 3.11 writes a carriage return without quotes, and reads the end of a row there.
    lines = io.TextIOWrapper(io.BytesIO(written), encoding="utf-8", newline="")
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    dialect = delimited.Dialect(delimiter=delimiter, quoted=True, names=("a", "b"), header_rows=1)
    parts = delimited.parse(written, dialect, ["a", "b"])
    if any(len(row) != 2 for row in rows):
        assert parts is None
    else:
        assert parts is not None
        assert [list(row) for row in zip(*(part.to_pylist() for part in parts), strict=True)] == rows


@pytest.mark.parametrize("size", [10, 300_000, 5_000_000])
def test_rows_may_be_longer_than_what_is_parsed_at_once(tmp_path: Path, size: int) -> None:
    rows = [["short", "a"], ["x" * size, "b"], ["y\n" * (size // 2), "c"], ["short", "d"]]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *rows])
    assert fields(tmp_path / "rows.csv", ["text", "label"]) == rows


def test_packed_files_are_unpacked_also_in_several_members(tmp_path: Path) -> None:
    packed = gzip.compress(b"a,b\nx,1\n") + gzip.compress(b"y,2\n")
    assert fields(write(tmp_path / "rows.csv.gz", packed), ["a", "b"]) == [["x", "1"], ["y", "2"]]
    with pytest.raises(DataError, match="cannot be read"):
        fields(write(tmp_path / "torn.csv.gz", packed[:-9]), ["a"])


@pytest.mark.parametrize(
    ("content", "what", "got"),
    [
        ("text,label\nx,a\ny,b,\n", "row 2 of .* line 3, has more fields", "3: 'y', 'b', ''"),
        ("text,label\n\nx,a\n2024,y,b\n", "row 2 of .* line 4, has more fields", "3: '2024', 'y', 'b'"),
        ("text,label\nx\n", "row 1 of .* line 2, has fewer fields", "1: 'x'"),
        ('text,label\n"two\nlines",a\nx\n', "row 2 of .* line 4, has fewer fields", "1: 'x'"),
    ],
)
def test_row_that_does_not_fit_the_header_is_refused_with_its_place(
    tmp_path: Path, content: str, what: str, got: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        fields(write(tmp_path / "rows.csv", content), ["text", "label"])
    assert caught.value.got == got
    assert str(caught.value.allowed).startswith("2: text, label")


def test_name_that_stands_twice_in_the_header_is_refused_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the name 'label' twice") as caught:
        fields(write(tmp_path / "rows.csv", "text,label,label\nx,a,b\n"), ["text"])
    assert str(caught.value.got).startswith("columns 2 and 3 of 3")


@pytest.mark.parametrize("before", [0, 5_000])
def test_quote_that_swallows_rows_is_refused_with_its_line(tmp_path: Path, before: int) -> None:
    content = "label,text\n" + "good,words\n" * before + 'good,"great film\nbad,"awful\n' + "good,words\n" * 5
    with pytest.raises(DataError, match=f"in line {before + 2} of .* does not close") as caught:
        fields(write(tmp_path / "rows.csv", content), ["text"])
    assert caught.value.got == "2 lines as one row"
    with pytest.raises(DataError, match="in line 3 of") as caught:
        fields(write(tmp_path / "open.csv", 'label,text\na,b\na,"b\na,c\n'), ["text"])
    assert "ends inside" in str(caught.value.got)


@pytest.mark.parametrize("column", ["text", "other"])
def test_bytes_that_are_no_utf8_are_refused_with_the_command_that_converts_them(tmp_path: Path, column: str) -> None:
    file = write(tmp_path / "rows.csv", "text,other\nfine,a\nfür,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 3 of .* is not UTF-8") as caught:
        fields(file, [column])
    assert caught.value.got == "byte 0xfc at position 2 of the line"
    assert f"iconv -f latin1 -t utf-8 {file} > {tmp_path}/utf8-rows.csv" in str(caught.value.do)


def test_empty_file_is_refused_and_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        fields(write(tmp_path / "rows.csv", ""), ["text"])
    assert fields(write(tmp_path / "rows.csv", "text,label\n"), ["text", "label"]) == []
    assert fields(write(tmp_path / "rows.csv", "text,label"), ["text", "label"]) == []


# -- delimiters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_delimiter_is_found_where_header_and_rows_agree_and_said(tmp_path: Path, delimiter: str) -> None:
    content = "".join(delimiter.join(row) + "\n" for row in [["text", "label"], ["a, b", "x"], ["c", "y"]])
    file = write(tmp_path / "rows.csv", content)
    dialect = delimited.inspect(file, usual=",")
    assert dialect.delimiter == delimiter
    assert "fields are separated by" in dialect.notes[0]
    assert fields(file, ["text", "label"]) == [["a, b", "x"], ["c", "y"]]


def test_named_delimiter_counts_whatever_the_file_looks_like(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.csv", "a;b,c\nx;1,2\n")
    assert fields(file, ["a"], named=";") == [["x"]]
    assert fields(file, ["c"], named=",") == [["2"]]


def test_delimiter_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be told") as caught:
        delimited.inspect(write(tmp_path / "rows.csv", "a;b|c\nx;1|2\n"), usual=",")
    assert "semicolons and on vertical bars" in str(caught.value.got)
    assert "data.delimiter" in str(caught.value.do)


# -- tab-separated files --------------------------------------------------------------------------------------------


def test_stray_quotes_of_a_tab_separated_file_are_characters_and_no_row_is_lost(tmp_path: Path) -> None:
    rows = [
        [('"' if number in (60, 180, 260, 390) else "") + f"words {number}", "ab"[number % 2]] for number in range(400)
    ]
    file = write(tmp_path / "rows.tsv", "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows))
    assert fields(file, ["text", "label"], usual="\t") == rows == by_csv(file, "\t", csv.QUOTE_NONE)
    (note,) = delimited.inspect(file, usual="\t").notes
    assert "quotes are characters like others" in note


def test_quotes_that_close_in_every_row_of_a_tab_separated_file_quote(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.tsv", 'text\tlabel\n"a ""b"""\tx\n"c"\ty\nd\tz\n')
    assert fields(file, ["text"], usual="\t") == [['a "b"'], ["c"], ["d"]]
    file = write(tmp_path / "rows.tsv", 'text\tlabel\n"two\nlines"\tx\n"a\ttab"\ty\n')
    assert fields(file, ["text"], usual="\t") == [["two\nlines"], ["a\ttab"]]
    (note,) = delimited.inspect(file, usual="\t").notes
    assert "over 1 more lines than there are rows" in note


def test_quotes_that_would_join_whole_rows_do_not_quote(tmp_path: Path) -> None:
    # As quotes they close where a field ends, and take a row away that the lines have.
    file = write(tmp_path / "rows.tsv", 'text\tlabel\n"begin\tx\nend"\ty\n')
    assert fields(file, ["text"], usual="\t") == [['"begin'], ['end"']]
    (note,) = delimited.inspect(file, usual="\t").notes
    assert "1 lines were lost" in note


def test_orange_headers_are_recognised_left_out_and_said(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.tab", "Text\tCategory\nstring\tdiscrete\nmeta\tclass\nwords\ta\nmore\tb\n")
    assert fields(file, ["Text", "Category"], usual="\t") == [["words", "a"], ["more", "b"]]
    (note,) = delimited.inspect(file, usual="\t").notes
    assert "Orange's types and roles" in note
    several = "Author\tContent\tAt\ndiscrete\tstring\ttime\nclass\tmeta include=True title=True\t\na\twords\t\n"
    assert fields(write(tmp_path / "roles.tab", several), ["Author"], usual="\t") == [["a"]]
    no_roles = "Text\tKind\tAt\n\td\tt\n\t\t\nwords\ta\t\n"
    assert fields(write(tmp_path / "none.tab", no_roles), ["Kind"], usual="\t") == [["a"]]
    no_types = "Text\tKind\ngrades\td\n\t\n"
    assert len(fields(write(tmp_path / "data.tab", no_types), ["Kind"], usual="\t")) == 2
    plain = write(tmp_path / "plain.tab", "Text\tCategory\nstring theory\tdiscrete maths\nmeta\tclassics\n")
    assert len(fields(plain, ["Text"], usual="\t")) == 2


def test_first_bytes_of_a_large_file_say_how_it_is_written(tmp_path: Path) -> None:
    content = 'text;label\n"two\nlines";a\n' + "words;b\n" * 1000
    dialect = delimited.inspect(write(tmp_path / "rows.csv", content), usual=",", limit=100)
    assert (dialect.delimiter, dialect.names) == (";", ("text", "label"))


def test_every_place_of_a_block_border_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = 'text,label\n"a ""b"", c\nd",x\r\nplain,"y"\n"",z\n' * 3
    rows = by_csv(write(tmp_path / "rows.csv", content))
    for size in itertools.chain(range(30, 80), [1000]):
        monkeypatch.setattr(delimited, "BLOCK_BYTES", size)
        assert fields(tmp_path / "rows.csv", ["text", "label"]) == rows


@pytest.mark.parametrize(("named", "said"), [(";", "semicolons do not separate"), ("\t", "tabs do not separate")])
def test_a_named_delimiter_that_parts_nothing_where_another_does_is_refused(
    tmp_path: Path, named: str, said: str
) -> None:
    file = write(tmp_path / "rows.csv", "message,is_spam\nbuy now,1\nhello there,0\n")
    with pytest.raises(DataError, match=said) as caught:
        delimited.inspect(file, usual=",", named=named)
    assert "name commas" in str(caught.value.do)
    one_column = write(tmp_path / "one.csv", "message\nbuy now\nhello there\n")
    assert delimited.inspect(one_column, usual=",", named=named).names == ("message",)


@pytest.mark.parametrize(
    "content",
    [b"text\na\n", b"text\na\nb,2\n", b"text\na\n\xff\n", b"text\na\0b\n"],
    ids=["read", "ragged", "latin", "NUL"],
)
def test_reading_ends_only_when_pyarrow_has_let_go_of_the_file(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow 25.0.1 may drop its last reference on a thread of its own after it has handed out the last row or error:
    where the interpreter ends meanwhile, the process aborts (SIGABRT in the C++ destructor of PythonFile). Here that
    thread is always late."""
    held: list[weakref.ref[object]] = []

    class Kept(delimited._Feed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held.append(weakref.ref(self))
            kept = [self]
            threading.Timer(0.2, kept.clear).start()

    monkeypatch.setattr(delimited, "_Feed", Kept)
    file = write(tmp_path / "file.csv", content)
    with contextlib.suppress(DataError):
        fields(file, ["text"])
    assert held
    assert held[-1]() is None
