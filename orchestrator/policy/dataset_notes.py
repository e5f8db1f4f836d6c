"""What an answer says of a dataset that was measured, a sentence each: sizes, classes, what would hurt. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.facts.dataset import DatasetFacts
from orchestrator.facts.row_lengths import Seen
from orchestrator.policy.question import UNEQUAL
from orchestrator.quantities import human_count

WORTH_A_WORD = 0.001
"""Share of rows or texts below which nothing is said of them."""
FEW_HELD_OUT = 10
"""Rows of a class in the held-out part below which what is measured of it is mostly chance: one row is 10 % of them."""
HELD_OUT = 0.05
"""What `run` holds out unless it is told otherwise."""
_SHOWN_CLASSES = 5


def notes_on(facts: DatasetFacts, *, seen: Seen | None = None, context: int | None = None) -> Iterator[str]:
    """Sizes, then what was taken for granted, then what would hurt; `seen` is what a training cuts off."""
    tokens, units = facts.token_count.tokens, "rows" if facts.columns.used else "documents"
    yield (
        f"{human_count(facts.examples.mid)} {units}, {human_count(tokens.mid)} tokens "
        f"({human_count(tokens.low)} to {human_count(tokens.high)}"
        f"{'' if facts.token_count.by_tokenizer else '; counted by a proxy, not by a tokenizer'})"
    )
    yield from facts.columns.assumed
    yield from facts.notes
    if facts.columns.layout is not None:
        trained = (
            "learns the answers with task: chat" if facts.columns.layout.is_conversation else "cannot train them yet"
        )
        yield f"all of their text is counted, prompt and answer; `run` {trained}"
    if facts.classes:
        yield from _about_classes(facts)
    if exact_duplicates(facts) > WORTH_A_WORD:
        yield f"{_percent(exact_duplicates(facts))} exact duplicates or more"
    if facts.conflicting_share > WORTH_A_WORD:
        yield f"{_percent(facts.conflicting_share)} of the texts stand there with more than one class"
    if facts.empty_share > WORTH_A_WORD:
        yield f"{_percent(facts.empty_share)} of the rows are empty"
    if seen is not None:
        yield _about_length(facts, seen, context)


def _about_classes(facts: DatasetFacts) -> Iterator[str]:
    largest, smallest = facts.classes[0], facts.classes[-1]
    shares = _percent(largest.share), _percent(smallest.share)
    sizes = (
        f"of {shares[0]} each"
        if shares[0] == shares[1]
        else f"the largest {largest.name} with {shares[0]}, the smallest {smallest.name} with {shares[1]}"
    )
    yield f"{len(facts.classes)} classes{' ' if shares[0] == shares[1] else ', '}{sizes}"
    if hides_classes(facts):
        chance = 1 / len(facts.classes)
        yield (
            f"always answering {largest.name} is right in {_percent(largest.share)} of the rows, which accuracy "
            f"does not show: look at balanced accuracy or macro-F1 (`run` logs eval/macro_f1), where that answer has "
            f"{chance:.2g} and {2 * largest.share / (1 + largest.share) * chance:.2g}"
        )
    few = [found for found in facts.classes if found.rows / facts.share_read * HELD_OUT < FEW_HELD_OUT]
    if few and hides_classes(facts):
        named = ", ".join(found.name for found in few[:_SHOWN_CLASSES]) + (", ..." if few[_SHOWN_CLASSES:] else "")
        yield (
            f"of {named} fewer than {FEW_HELD_OUT} rows are in a held-out {HELD_OUT:.0%}, too few to measure it: raise "
            "data.validation_fraction, or collect more of it"
        )


def hides_classes(facts: DatasetFacts) -> bool:
    """Whether accuracy says little, because the constant answer has a high one."""
    return bool(facts.classes) and facts.classes[0].share > 0.5 and facts.imbalance >= UNEQUAL


def _about_length(facts: DatasetFacts, seen: Seen, context: int | None) -> str:
    said = f"rows are cut off at {seen.cut_off} tokens, in the price and in the spec that --write-spec writes"
    if seen.left_out <= 0:
        return f"{said}: the longest has {human_count(math.ceil(facts.lengths.longest))}"
    reads = "" if context is None else f"; the base reads {human_count(context)}"
    return (
        f"{said}: {_percent(seen.left_out)} of the text is left out, from {_percent(seen.cut_rows)} of the rows, which "
        f"have up to {human_count(math.ceil(facts.lengths.longest))}{reads}"
    )


def exact_duplicates(facts: DatasetFacts) -> float:
    """The share that is surely copies; 0 where only pieces of documents were read."""
    return facts.duplicates.exact.low if facts.duplicates else 0.0


def _percent(share: float) -> str:
    """`99.8%`: as many digits as tell it from none and all."""
    for digits in range(4):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or float(text[:-1]) not in (0, 100):
            return text
    return "nearly all" if share > 0.5 else "hardly any"
