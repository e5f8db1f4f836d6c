from __future__ import annotations

import pytest

from orchestrator.data.labels import refuse_fractions, similar_labels
from orchestrator.errors import DataError


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        (["True", "true"], "differ by case only"),
        ([" Positive", "Positive"], "differ by white space only"),
        ([" Positive", "positive"], "differ by case and white space only"),
        (["1", "1.0"], "are the same number"),
        (["007", "7"], "are the same number"),
        (["1e3", "1000", "1000.0"], "are the same number"),
        (["0", "0.0", "-0"], "are the same number"),
        (["e\u0301", "\xe9"], "look the same"),
    ],
)
def test_labels_that_look_alike_are_named_with_their_rows_and_stay_apart(labels: list[str], how: str) -> None:
    (note,) = similar_labels({**dict.fromkeys(labels, 1200), "other": 3})
    assert f"are {len(labels)} classes that {how}" in note
    assert all(f"{label!r} (1,200 rows)" in note for label in labels)


def test_labels_that_differ_are_not_mentioned() -> None:
    assert similar_labels(dict.fromkeys(["1", "2", "10", "a", "b", "1a", "nan", "inf", "", "٣"], 5)) == ()


def test_many_groups_of_similar_labels_are_counted() -> None:
    notes = similar_labels({f"{number}{end}": 1 for number in range(1, 9) for end in ("", ".0")})
    assert len(notes) == 6
    assert notes[-1] == "and 3 further groups of labels look alike"


@pytest.mark.parametrize("label", ["0.5", "-1.25", " 3.14", ".5", "2.50"])
def test_numbers_with_a_fraction_are_no_classes(label: str) -> None:
    with pytest.raises(DataError, match="is no class column"):
        refuse_fractions(["1", label], column="score", location="rows.csv")


def test_whole_numbers_and_names_are_classes() -> None:
    refuse_fractions(["1", "1.0", "1e3", "2E5", "007", "v1.5", "a.b", "true"], column="label", location="rows.csv")
