"""What is held out, in figures: how much, which text, and what of it stands in the training data too.

`prepare` lets an `Account` see the texts of both splits on their way, and keeps its `HeldOut` with the data.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Unit = Literal["documents", "rows"]

_MODULUS = 1 << 128


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The examples that a run is measured on."""

    unit: Unit
    """What an example is: a document for language modelling, a row with its label for classification."""
    examples: int
    """How many are held out; the end of a document that was cut is one."""
    bytes: int
    """Their UTF-8 bytes."""
    share: float
    """Of all examples in use: in bytes for documents, in rows for rows."""
    asked: float | None
    """`data.validation_fraction`; None where the held-out data was given, or limits keep another share."""
    fingerprint: str
    """16 hex digits over their texts and labels in any order: equal for equal text, wherever it lies, whatever
    tokenizer reads it."""
    repeated: int | None
    """Held-out examples whose text stands in the training data too, letter for letter; None where that was not read."""
    notes: tuple[str, ...] = ()
    """Why it is not exactly what was asked, and what was left out of the data."""

    def sentence(self) -> str:
        """All of it in one line, without the notes."""
        share = f"{self.share:.2%}" if self.share >= 0.001 else f"{self.share:.2g} of all"
        of = "" if self.asked is None else f", asked {100 * self.asked:g}%"
        again = f"; {self.repeated:,} of them also in the training data" if self.repeated else ""
        size = f"{self.examples:,} {self.unit if self.examples != 1 else self.unit[:-1]}, {self.bytes:,} bytes"
        what = f"measured on: {size}" if self.share == 1 else f"held out: {size} ({share}{of})"
        return f"{what}, fingerprint {self.fingerprint}{again}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, value: dict[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(**{**value, "notes": tuple(value["notes"])})


class Account:
    """Counts the texts of both splits as they go by: the held-out ones first, then those to train on.

    Memory goes with the held-out examples alone: a hash of each.
    """

    def __init__(self) -> None:
        self.held_bytes = self.training_bytes = 0
        self._held: Counter[int] = Counter()
        self._again: set[int] = set()
        self._has_seen_all = True
        self._sum = self._count = self.training_count = 0

    def held_out(self, texts: Iterable[str], labels: Sequence[str] | None = None) -> Iterator[str]:
        """The texts, unchanged, counted as held out; `labels` has the class of each."""
        for index, text in enumerate(texts):
            raw = text.encode()
            self.held_bytes += len(raw)
            self._held[_short(raw)] += 1
            label = b"" if labels is None else labels[index].encode()
            self._sum = (self._sum + _long(raw, label)) % _MODULUS
            self._count += 1
            yield text

    def training(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, unchanged, counted as trained on."""
        for text in texts:
            raw = text.encode()
            self.training_bytes += len(raw)
            self.training_count += 1
            if (key := _short(raw)) in self._held:
                self._again.add(key)
            yield text

    def pass_over(self, count: int, size: int) -> None:
        """Counts texts to train on without a look at them: so many, of so many bytes together."""
        self.training_count += count
        self.training_bytes += size
        self._has_seen_all = False

    def result(self, unit: Unit, *, asked: float | None, notes: Sequence[str] = ()) -> HeldOut:
        """What was seen."""
        held, training = (
            (self._count, self.training_count) if unit == "rows" else (self.held_bytes, self.training_bytes)
        )
        return HeldOut(
            unit=unit,
            examples=self._count,
            bytes=self.held_bytes,
            share=held / max(1, held + training),
            asked=asked,
            fingerprint=hashlib.sha256(f"{self._count} {self._sum:032x}".encode()).hexdigest()[:16],
            repeated=sum(self._held[key] for key in self._again) if self._has_seen_all else None,
            notes=tuple(notes),
        )


def _short(raw: bytes) -> int:
    """A key of a text: two of a billion texts share one with a chance of 3 % (2**64 keys)."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _long(raw: bytes, label: bytes) -> int:
    """A number of an example; sums of such numbers are equal for the same examples in any order."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=16, key=hashlib.sha256(label).digest()).digest(), "little")
