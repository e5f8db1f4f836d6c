from __future__ import annotations

import pytest

from orchestrator.data.columns import Columns
from orchestrator.data.reading import Block, Reading
from orchestrator.facts.dataset import DatasetFacts, describe
from orchestrator.policy.dataset_notes import notes_on


def facts(labels: list[str | None], *, words: int = 5) -> DatasetFacts:
    texts = tuple(f"{'word ' * words}{number}" for number in range(len(labels)))
    block = Block(texts=texts, labels=tuple(labels), extent=1)
    return describe(Reading(location="a.csv", blocks=(block,), extent=1, columns=Columns(text="text", label="label")))


def said(of: DatasetFacts) -> str:
    return "\n".join(notes_on(of, seen=of.row_lengths.seen(context=512, batch=16), context=512))


def test_the_constant_answer_is_named_where_it_has_a_high_score() -> None:
    text = said(facts(["no"] * 998 + ["yes"] * 2))
    assert "always answering no is right in 99.8% of the rows" in text
    assert "balanced accuracy or macro-F1 (`run` logs eval/macro_f1), where that answer has 0.5 and 0.5" in text
    assert "of yes fewer than 10 rows are in a held-out 5%" in text
    assert "the largest no with 99.8%, the smallest yes with 0.2%" in text


@pytest.mark.parametrize("labels", [["a", "b"] * 50, ["a", "b", "c", "c"] * 50])
def test_of_classes_of_nearly_one_size_accuracy_tells_enough(labels: list[str | None]) -> None:
    assert "always answering" not in said(facts(labels))


def test_what_the_cut_off_leaves_out_is_told() -> None:
    text = said(facts(["a", "b"] * 20, words=2000))
    assert "rows are cut off at 512 tokens" in text
    assert "of the text is left out, from 100% of the rows" in text
    assert "the base reads 512" in text
    assert "the longest has" in said(facts(["a", "b"] * 20))
