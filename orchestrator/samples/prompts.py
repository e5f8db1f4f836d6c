"""Labelled rows -> prompts: an instruction, examples with their classes, and a row whose class a model goes on with.

Which rows are examples is a pure function of the seed. All prompts of a run begin alike, so what they have in common
is tokenised once, and may be computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.samples.batches import SampleOrder
from orchestrator.spec_methods import LABEL, TEXT, FewShotSpec

BETWEEN = "\n\n"
"""Stands between examples."""
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts that say nothing of their class: those of Zhao et al. (2021), section 5."""
_BEFORE = "x"
"""A piece of a prompt is tokenised behind this, so that it gets the ids that it has inside of a text."""
Encode = Callable[[list[str]], list[list[int]]]
"""Texts to their ids, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about one row, in ids: the same `context`, and for each class what it would go on with."""

    context: tuple[int, ...]
    """Behind the opening; at least one token."""
    answers: tuple[tuple[int, ...], ...]
    """Of each class, at least one token; none is the beginning of another."""

    @property
    def length(self) -> int:
        """Tokens of the context with the longest answer."""
        return len(self.context) + max(map(len, self.answers))


def draw_examples(labels: np.ndarray, lengths: np.ndarray, *, count: int, longest: int, seed: int) -> np.ndarray:
    """Numbers of `count` rows of at most `longest` tokens, the classes in turn as long as they have such rows.

    Both the order of the classes and the rows are drawn by the seed. Fewer where there are not so many.
    """
    shuffled = SampleOrder(seed=seed, size=len(labels)).samples(np.arange(len(labels)))
    short = shuffled[lengths[shuffled] <= longest]
    # The place of each row among those of its class decides first, then the order in which classes were met.
    place = np.zeros(len(short), dtype=np.int64)
    met: dict[int, int] = {}
    for at, label in enumerate(labels[short].tolist()):
        place[at] = met[label] = met.get(label, -1) + 1
    first = {label: number for number, label in enumerate(met)}
    turn = np.array([first[label] for label in labels[short].tolist()], dtype=np.int64)
    chosen: np.ndarray = short[np.lexsort((turn, place))][:count]
    return chosen


def written(settings: FewShotSpec, text: str, word: str) -> str:
    """A row with its class, as the template has it."""
    before, _, after = settings.template.partition(TEXT)
    return f"{before}{text.strip()}{after.removesuffix(LABEL)}{word}"


def opening(settings: FewShotSpec, examples: Sequence[tuple[str, str]]) -> str:
    """What all prompts begin with: the instruction, and (text, word) of each example."""
    parts = [settings.instruction.strip()] if settings.instruction.strip() else []
    return BETWEEN.join([*parts, *(written(settings, text, word) for text, word in examples)])


def questions(
    settings: FewShotSpec, texts: Sequence[str], words: Sequence[str], *, begins: str, encode: Encode
) -> list[Question]:
    """What is asked about each of these rows, behind the opening that all prompts begin with, if there is one."""
    lead = f"{_BEFORE}{BETWEEN}" if begins else ""
    asked = [lead + written(settings, text, word) for text in texts for word in words]
    # A word that another begins with must end to be told from it.
    if any(one != other and other.startswith(one) for one in words for other in words):
        asked = [one + BETWEEN for one in asked]
    ids, left_out = encode(asked), len(encode([_BEFORE])[0]) if begins else 0
    each = [[tuple(one[left_out:]) for one in ids[at : at + len(words)]] for at in range(0, len(ids), len(words))]
    return [_question(alternatives) for alternatives in each]


def _question(alternatives: Sequence[tuple[int, ...]]) -> Question:
    shared = 0
    for column in zip(*alternatives, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    shared = min(shared, *(len(one) - 1 for one in alternatives))
    return Question(context=alternatives[0][:shared], answers=tuple(one[shared:] for one in alternatives))
