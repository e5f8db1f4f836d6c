"""How much a base reads that trains nothing: it is asked with examples, or measured as it is.

Comes in: a spec and, once the data has been looked at, its counts. Goes out: an `Asking`. Called by `plan`. What a
prompt adds to the rows is estimated from its bytes; the worker counts it, and refuses what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import DataError, ModelError
from orchestrator.planning.length import PAD_MULTIPLE, Length, left_over
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.quantities import human_count
from orchestrator.spec_methods import LABEL, TEXT, FewShotSpec
from orchestrator.tasks.names import PACKED
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

BYTES_PER_TOKEN = 4.0
"""Of English text in a vocabulary of 50,000: GPT-2's cuts WebText into tokens of 4 characters (OpenAI's rule of
thumb)."""
_USUAL_CLASSES = 2
_USUAL_WORD = 2.0
"""Tokens of a class's name, while it is not known (a guess)."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is read, in tokens."""

    rows: int | None
    """Held-out rows that are asked about; None until the data has been looked at."""
    opening: float
    """Instruction and examples, which each worker reads once."""
    each: float
    """A row with the names of all classes, on average."""
    all_logits: bool = False
    """Whether what the model gives is needed at every position, not at a few alone."""
    longest: int
    """The longest row with all that stands before it and a class's name: what memory must hold."""
    reasons: tuple[str, ...]

    def tokens(self, workers: int) -> float:
        """All that so many workers read; of rows that are not counted yet, none."""
        return workers * self.opening + (self.rows or 0) * self.each

    def length(self, spec: RunSpec) -> Length:
        """As a training's: no step, and so much to read for a batch of rows."""
        columns = max(1, round(self.each))
        return Length(
            steps=None if self.rows is None else 0,
            tokens_per_step=spec.training.global_batch * columns,
            columns=((columns, 1.0),),
            longest=self.longest,
            reasons=self.reasons,
        )


def measuring(spec: RunSpec, counts: DatasetCounts | None) -> Asking:
    """What a spec of `kind: evaluate` reads."""
    cut_off, is_packed = spec.data.sequence_length, task_of(spec.task).form in PACKED
    each, longest, rows = float(cut_off), cut_off, None if counts is None else counts.validation_samples
    if counts is not None and counts.validation_samples:
        if counts.validation_tokens is not None:
            each = counts.validation_tokens / counts.validation_samples
        elif counts.train_samples:
            each = counts.train_tokens / counts.train_samples
        longest = counts.longest or cut_off
    what = "blocks" if is_packed else "rows"
    much = f"the {what}" if rows is None else f"{rows:,} {what}"
    why = f"evaluate: nothing is trained; {much} of {each:.3g} tokens on average are read once, by all workers together"
    if is_packed and counts is not None and not counts.train_samples:
        why += left_over(counts.left_over_tokens)
    return Asking(rows=rows, opening=0.0, each=max(1.0, each), longest=longest, reasons=(why,), all_logits=is_packed)


def asking(spec: RunSpec, counts: DatasetCounts | None, *, context: int | None) -> Asking:
    """What a spec with `method: few_shot` reads. `context` is the model's, in tokens; None for one without a limit.

    Raises ModelError where the examples cannot fit into it beside the longest row, DataError where there are not so
    many training rows, or where `few_shot.words` are others than the classes.
    """
    settings, cut_off = spec.few_shot, spec.data.sequence_length
    mean, shortest, longest = float(cut_off), cut_off, cut_off
    classes, word = _USUAL_CLASSES, _USUAL_WORD
    if counts is not None:
        mean = counts.train_tokens / counts.train_samples
        shortest = counts.columns[0][0] - PAD_MULTIPLE + 1 if counts.columns else 1
        longest = counts.longest or cut_off
    if counts is not None and counts.label_names:
        names = words_of(settings, counts.label_names)
        classes, word = len(names), 1 + sum(map(_tokens, names)) / len(names)
    around = _tokens(settings.template.replace(TEXT, "").replace(LABEL, "")) + word
    before, beside = _tokens(settings.instruction), longest + around
    opening = before + settings.examples * (mean + around)
    if counts is not None and settings.examples > counts.train_samples:
        raise DataError(
            "a prompt cannot show more examples than there are training rows",
            got=f"few_shot.examples: {settings.examples}",
            allowed=f"at most {counts.train_samples}",
            do=f"set few_shot.examples={counts.train_samples} or less",
        )
    if context is not None and counts is not None:
        room = context - beside - before
        if settings.examples * (max(1, shortest) + around) > room:
            most = max(0, int(room // (max(1, shortest) + around)))
            raise ModelError(
                "the examples do not fit into the model's context beside the longest row",
                got=f"few_shot.examples: {settings.examples}, rows of up to {longest} tokens",
                allowed=f"{context} tokens in all",
                do=f"set few_shot.examples={most} or a smaller data.sequence_length",
            )
        opening = min(opening, before + room)
    rows = None if counts is None else counts.validation_samples
    much = "the held-out rows" if rows is None else f"{rows:,} held-out rows"
    shown = f"{settings.examples} training rows" if settings.examples else "no training rows"
    each = mean + around + classes * word
    return Asking(
        rows=rows,
        opening=opening,
        each=each,
        longest=round(opening + beside),
        reasons=(
            f"few_shot: nothing is trained; the base is asked for the class of {much}, with {shown} before each: "
            f"about {human_count(round(opening))} tokens that each worker reads once, and {each:.0f} for a row with "
            f"the names of {classes} classes",
            *_about_names(settings, () if counts is None else counts.label_names or ()),
        ),
    )


def _about_names(settings: FewShotSpec, label_names: Sequence[str]) -> Iterator[str]:
    """A hint where all classes that are known are numbers."""
    if label_names and not settings.words and all(name.lstrip("-").isdigit() for name in label_names):
        yield "words: the classes are numbers, which tell a model little; few_shot.words gives them names"


def words_of(settings: FewShotSpec, label_names: Sequence[str]) -> tuple[str, ...]:
    """What stands for each class. Raises DataError where `few_shot.words` does not fit the classes of the data."""
    if not settings.words:
        return tuple(label_names)
    absent = [name for name in label_names if name not in settings.words]
    other = [name for name in settings.words if name not in label_names]
    if absent or other:
        raise DataError(
            "few_shot.words does not name the classes of the data",
            got=", ".join(settings.words),
            allowed=", ".join(label_names),
            do=f"add {', '.join(absent)}" if absent else f"remove {', '.join(other)}",
        )
    return tuple(settings.words[name].strip() for name in label_names)


def _tokens(text: str) -> float:
    """About how many a text takes."""
    return len(text.encode()) / BYTES_PER_TOKEN
