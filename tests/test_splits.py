from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from orchestrator.data.sources import find_sources
from orchestrator.training.splits import SplitRows, split_rows
from tests.specs import CLASSIFY, spec


def split(folder: Path, labels: str, *, fraction: float) -> SplitRows:
    file = folder / "rows.csv"
    file.write_text("text,label\n" + "".join(f"row {number},{label}\n" for number, label in enumerate(labels)))
    columns = {"data__text_column": "text", "data__label_column": "label"}
    one = spec(CLASSIFY, data__train=str(file), data__validation_fraction=fraction, **columns)
    return split_rows(one, find_sources(str(file)), ())


@pytest.mark.parametrize(
    ("fraction", "held_out", "side"), [(0.97, 9, "trained on"), (0.75, 9, None), (0.01, 3, "held out")]
)
def test_one_row_of_each_class_stays_on_either_side_whatever_the_fraction(
    tmp_path: Path, fraction: float, held_out: int, side: str | None
) -> None:
    found = split(tmp_path, "aabbccccbbaa", fraction=fraction)
    counts = {name: Counter(found.labels(name)) for name in ("train", "validation")}
    assert counts["validation"].total() == held_out
    assert set(counts["train"]) == set(counts["validation"]) == {"a", "b", "c"}
    if held_out == 9:
        assert counts["train"] == {"a": 1, "b": 1, "c": 1}, "the row that is left is one of its own class"
    assert bool(found.notes) == (side is not None)
    assert side is None or side in found.notes[0]
