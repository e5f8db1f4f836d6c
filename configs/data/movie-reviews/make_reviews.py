"""Writes reviews.csv from the source archive of vaderSentiment 3.3.2. Run once by hand; the result is carried here.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python configs/data/movie-reviews/make_reviews.py vaderSentiment-3.3.2.tar.gz

The same archive gives the same bytes.
"""

from __future__ import annotations

import csv
import html
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MIN_ABS_RATING = 0.5
"""Snippets rated closer to neutral than this, on the scale of -4 to 4, are left out: 533 of 10,605."""


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file of an archive."""
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"{name} is not a file in the archive")
    return file.read()


def snippets(source: Path) -> Iterator[tuple[int, float, str]]:
    """(id, mean rating, text) of every snippet, in the order of the source."""
    with tarfile.open(source) as outer, tarfile.open(fileobj=io.BytesIO(member(outer, INNER_ARCHIVE))) as inner:
        text = member(inner, INNER_FILE).decode("utf-8")
    for line in text.split("\r\n"):
        number, rating, snippet = line.split("\t")
        yield int(number), float(rating), html.unescape(snippet)


def main(source: Path, target: Path) -> None:
    """Writes the rated snippets as CSV with the columns id, rating, label, text."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "rating", "label", "text"))
        for number, rating, text in snippets(source):
            if abs(rating) >= MIN_ABS_RATING:
                writer.writerow((number, f"{rating:.4f}", "positive" if rating > 0 else "negative", text))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).with_name("reviews.csv"))
