"""What a spec's data holds, in figures: what a look at it finds before it is encoded, or after.

Data that is encoded already, or so small that all of it is tokenised, gives exact figures, others a 90 % interval.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.data.held_out import Account, HeldOut
from orchestrator.intervals import Interval
from orchestrator.planning.run_plan import DatasetCounts

WHOLE_BYTES = 2_000_000
"""Text that is tokenised whole: 1 s."""
COMPARED_BYTES = 200_000_000
"""Text to train on that is read to find held-out texts in it: 1 s. `run`, which reads it all, tells of more."""
_NAMED_CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class DataLook:
    """What a spec's data holds."""

    unit: str
    """`documents` or `rows`."""
    train_examples: int | None
    """None where an earlier version encoded the data and did not count; 0 where a model is only measured."""
    validation_examples: int
    train_bytes: int
    validation_bytes: int
    held_out: HeldOut
    """What will be measured on, in the figures that `run` gives of it."""
    columns: Mapping[str, str]
    """Those in use, by what they hold: `text` and, for classification, `label`; none for files that are documents."""
    classes: Mapping[str, int] | None
    """Rows of each class to train on, or to measure on, by its name, in the order of their numbers."""
    train_tokens: Interval
    """Of one pass over what is trained on, or measured on; special ones included."""
    counted: bool
    """Whether the tokens were counted, not estimated, by a tokenizer known to give the ids of `AutoTokenizer`."""
    counts: DatasetCounts
    notes: tuple[str, ...]
    """What was taken for granted of the data, and where the split is not what was asked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = self.counts
        return {
            "unit": self.unit,
            "train_examples": self.train_examples,
            "validation_examples": self.validation_examples,
            "train_bytes": self.train_bytes,
            "validation_bytes": self.validation_bytes,
            "held_out": self.held_out.to_dict(),
            "columns": dict(self.columns),
            "classes": None if self.classes is None else dict(self.classes),
            "train_tokens": asdict(self.train_tokens),
            "train_samples": counts.train_samples,
            "left_over_tokens": counts.left_over_tokens if self.counted else None,
            "counted": self.counted,
            "notes": list(self.notes),
        }

    def sentences(self) -> Iterator[str]:
        """All of it in a few lines."""
        is_measured = self.train_examples == 0
        examples = "" if self.train_examples is None else f"{self.train_examples:,} {self.unit}, "
        if not is_measured:
            yield f"{examples}{self.train_bytes:,} bytes to train on"
        yield self.held_out.sentence()
        tokens = self.train_tokens
        about = "" if self.counted else f" (estimated, {tokens.low:,.0f} to {tokens.high:,.0f})"
        if not self.counted and tokens.low == tokens.high:
            about = " (by the base's tokenizer.json alone)"
        count = self.counts.validation_samples if is_measured else self.counts.train_samples
        measured = self.validation_examples if is_measured else self.train_examples
        samples = "" if count == measured else f" in {count:,} blocks"
        yield f"{tokens.mid:,.0f} tokens {'to read' if is_measured else 'a pass'}{about}{samples}"
        if self.columns:
            yield "columns: " + ", ".join(f"{column!r} is the {holds}" for holds, column in self.columns.items())
        if self.classes is not None:
            most = Counter(self.classes).most_common(_NAMED_CLASSES)
            named = ", ".join(f"{name} {rows:,}" for name, rows in most)
            yield f"{len(self.classes)} classes: {named}" + (", ..." if len(self.classes) > _NAMED_CLASSES else "")
        yield from self.notes


def is_little(text_bytes: int) -> bool:
    """Whether so much text is tokenised whole, which makes its figures exact."""
    return text_bytes <= WHOLE_BYTES


def account_of(
    train: Iterable[str], held_out: Iterable[str], *, examples: int, size: int, labels: Sequence[str] | None = None
) -> Account:
    """The texts of both splits counted: `train` of so many examples with `size` bytes, which are not read where that is
    much, and those held out with the class of each."""
    account = Account()
    deque(account.held_out(held_out, labels), maxlen=0)
    if size <= COMPARED_BYTES:
        deque(account.training(train), maxlen=0)
    else:
        account.pass_over(examples, size)
    return account
