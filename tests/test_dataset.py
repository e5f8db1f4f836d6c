from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.columns import Columns
from orchestrator.data.reading import Block, Reading
from orchestrator.errors import DataError
from orchestrator.facts.dataset import describe
from orchestrator.ratio_estimates import exactly

LABELLED = Columns(text="text", label="label")
RAW = Columns(text=None, label=None)

ROWS = st.lists(
    st.tuples(st.text("abcde \n", max_size=30), st.sampled_from(["good", "bad", "fair", None])), min_size=1, max_size=30
).map(lambda rows: [("some text", "good"), ("other text", "bad"), *rows])


def labelled(rows: list[tuple[str, str | None]]) -> Reading:
    texts, labels = zip(*rows, strict=True)
    return Reading(
        location="data.csv", blocks=(Block(texts=texts, labels=labels, extent=100),), extent=100, columns=LABELLED
    )


def raw(*texts: str) -> Reading:
    return Reading(
        location="books/",
        blocks=tuple(Block(texts=(text,), labels=(), extent=len(text)) for text in texts if text),
        extent=sum(map(len, texts)),
        columns=RAW,
        document_bytes=tuple(map(len, texts)),
    )


def test_classes_are_counted_the_largest_first() -> None:
    facts = describe(labelled([("a b", "bad"), ("c d", "good"), ("e f", "good"), ("g h", "good"), ("i j", None)]))
    assert [(found.name, found.rows, found.share) for found in facts.classes] == [("good", 3, 0.75), ("bad", 1, 0.25)]
    assert facts.is_classified
    assert facts.imbalance == 3
    assert facts.labelled_examples == exactly(4)


def test_raw_text_has_no_classes() -> None:
    facts = describe(raw("one two three", "four five six seven"))
    assert not facts.is_classified
    assert (facts.classes, facts.imbalance, facts.labelled_examples.mid) == ((), 1, 0)


def test_sizes_are_counted_in_their_units() -> None:
    facts = describe(labelled([("naïve", "a"), ("café au lait", "b")]))
    assert facts.examples == exactly(2)
    assert facts.characters == exactly(17)
    assert facts.text_bytes == exactly(19)


def test_blank_texts_are_examples_without_text() -> None:
    facts = describe(labelled([("one", "a"), ("", "b"), ("  \n", "a"), ("two", "b")]))
    assert facts.examples == exactly(4)
    assert facts.empty_share == 0.5


def test_empty_files_are_documents_without_text() -> None:
    facts = describe(raw("some words", "", "more words", ""))
    assert facts.examples == exactly(4)
    assert facts.empty_share == 0.5


def test_lengths_are_percentiles_of_tokens() -> None:
    texts = [("x " * number).strip() for number in range(1, 101)]
    facts = describe(raw(*texts), count=lambda given: [len(text.split()) for text in given])
    assert facts.lengths.p5 == pytest.approx(5, rel=0.2)
    assert facts.lengths.p50 == pytest.approx(50, rel=0.05)
    assert facts.lengths.p95 == pytest.approx(95, rel=0.05)
    assert facts.lengths.longest == pytest.approx(100, rel=0.05)


def test_text_with_two_classes_is_a_conflict() -> None:
    facts = describe(labelled([("A film", "good"), ("a  film", "bad"), ("a book", "bad"), ("a song", "good")]))
    assert facts.conflicting_share == pytest.approx(1 / 3)


@pytest.mark.slow
@given(ROWS, st.randoms())
def test_order_changes_no_count(rows: list[tuple[str, str | None]], chance: random.Random) -> None:
    mixed = rows.copy()
    chance.shuffle(mixed)
    facts, other = describe(labelled(rows)), describe(labelled(mixed))
    assert replace(other, token_count=facts.token_count, lengths=facts.lengths) == facts
    assert other.token_count.tokens.mid == pytest.approx(facts.token_count.tokens.mid)


@given(ROWS)
def test_data_twice_doubles_counts_and_adds_a_copy_of_every_row(rows: list[tuple[str, str | None]]) -> None:
    once, twice = describe(labelled(rows)), describe(labelled(rows * 2))
    assert twice.examples.mid == 2 * once.examples.mid
    assert twice.text_bytes.mid == 2 * once.text_bytes.mid
    assert [found.share for found in twice.classes] == [found.share for found in once.classes]
    filled = sum(bool(text.strip()) for text, _ in rows)
    assert once.duplicates is not None
    assert twice.duplicates is not None
    assert twice.duplicates.exact.mid * 2 * filled == pytest.approx(once.duplicates.exact.mid * filled + filled)


@given(ROWS)
def test_intervals_hold_their_middle(rows: list[tuple[str, str | None]]) -> None:
    facts = describe(replace(labelled(rows), extent=1_000))
    for interval in (facts.examples, facts.text_bytes, facts.characters, facts.token_count.tokens):
        assert 0 <= interval.low <= interval.mid <= interval.high


def test_a_tenth_that_was_read_stands_for_the_whole() -> None:
    chance = random.Random(0)
    blocks = tuple(
        Block(texts=tuple(f"row {chance.random()}" for _ in range(chance.randint(8, 12))), labels=(), extent=100)
        for _ in range(50)
    )
    facts = describe(
        Reading(location="data.jsonl", blocks=blocks, extent=50_000, columns=Columns(text="t", label=None))
    )
    assert facts.share_read == 0.1
    assert facts.examples.low < 5_000 < facts.examples.high
    assert facts.examples.high < 1.2 * facts.examples.low


def test_pieces_of_documents_tell_nothing_of_copies() -> None:
    assert describe(replace(raw("some words here"), extent=10_000)).duplicates is None


@pytest.mark.parametrize("texts", [["", ""], [" \n"]])
def test_nothing_but_blanks_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds no text"):
        describe(labelled([(text, "a") for text in texts]))


@pytest.mark.parametrize(("label", "what"), [("good", "one class only"), (None, "no class")])
def test_a_single_class_is_refused(label: str | None, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        describe(labelled([("one", label), ("two", label)]))
    assert "--label-column" in str(caught.value.do)


def test_a_value_for_every_row_is_no_class() -> None:
    with pytest.raises(DataError, match="no class column") as caught:
        describe(labelled([(f"text {number}", str(number)) for number in range(100)]))
    assert caught.value.got == "100 values in 100 rows"


def test_few_rows_of_each_class_are_still_classes() -> None:
    assert len(describe(labelled([("one", "a"), ("two", "b"), ("three", "c")])).classes) == 3
