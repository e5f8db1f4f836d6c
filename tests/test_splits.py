from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.sources import find_sources
from orchestrator.data.splits import SplitRows, split_rows
from tests.specs import CLASSIFY, spec


def split(folder: Path, labels: str, *, fraction: float, seed: int = 0) -> SplitRows:
    file = folder / "rows.csv"
    file.write_text("text,label\n" + "".join(f"row {number},{label}\n" for number, label in enumerate(labels)))
    columns = {"data__text_column": "text", "data__label_column": "label", "data__split_seed": seed}
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=8),
    fraction=st.one_of(st.sampled_from([0.01, 0.05, 0.5]), st.floats(0.001, 0.999)),
    seed=st.integers(0, 20),
)
def test_rows_meet_the_share_to_one_row_where_each_class_can_be_on_both_sides(
    folder: Path, sizes: list[int], fraction: float, seed: int
) -> None:
    labels = "".join(name * size for name, size in zip("abcdefgh", sizes, strict=False))
    found = split(folder, labels, fraction=fraction, seed=seed)
    train, validation = (list(found.splits[name][0]) for name in ("train", "validation"))  # type: ignore[index]
    assert Counter(train + validation) == Counter(f"row {number}" for number in range(len(labels)))
    asked, held = fraction * len(labels), len(validation)
    if len(sizes) <= round(asked) <= len(labels) - len(sizes):
        assert abs(held - asked) <= 1
        assert found.notes == ()
    else:
        (note,) = found.notes
        assert note.startswith(f"{held} rows are held out instead of {round(asked)}: a row of each")


def test_a_split_seed_draws_other_rows(folder: Path) -> None:
    drawn = [list(split(folder, "ab" * 100, fraction=0.1, seed=s).splits["validation"][0]) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
