"""A dataset as read -> what the advisor wants to know of it: sizes, classes, duplicates, lengths. Pure.

`data.sampling` reads files into a `Reading`; `describe` turns that into `DatasetFacts`. A dataset that was read
whole is counted; one that is too large for that is extrapolated from blocks drawn at random, with 90 % intervals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.data.columns import MAX_CLASSES, OPTIONS, Columns, repeats_enough
from orchestrator.data.labels import refuse_no_classes
from orchestrator.data.reading import Reading
from orchestrator.errors import DataError
from orchestrator.facts.duplicates import Duplicates, fingerprint, measure_duplicates, normalize
from orchestrator.facts.row_lengths import RowLengths
from orchestrator.facts.token_counts import SAMPLE_BYTES, CountTokens, TokenCount, estimate_tokens
from orchestrator.intervals import Interval
from orchestrator.ratio_estimates import exactly, ratio


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """One class of a labelled dataset."""

    name: str
    rows: int
    """Rows of it among those read."""
    share: float
    """Of the labelled rows."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Distribution of the length of texts that are not empty, in tokens: their bytes over the mean bytes per token."""

    p5: float
    p50: float
    p95: float
    longest: float
    """Of the texts read; a sample may miss the longest."""


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """A dataset, measured. Intervals of 90 % are degenerate where something was counted."""

    location: str
    share_read: float
    """1 when everything was read; below, the rest is extrapolated."""
    examples: Interval
    """Rows or documents, empty ones included."""
    text_bytes: Interval
    """UTF-8 bytes of the texts."""
    characters: Interval
    token_count: TokenCount
    lengths: Lengths
    row_lengths: RowLengths
    """Of the texts read, documents or rows, with the same tokens per byte for all."""
    empty_share: float
    """Of the rows, those whose text is missing or blank."""
    duplicates: Duplicates | None
    """None where pieces of documents were read, which tell nothing of copies."""
    columns: Columns
    classes: tuple[ClassCount, ...] = ()
    """The largest first; none for raw text."""
    labelled_share: float = 0.0
    """Of the rows, those with a class and a text."""
    notes: tuple[str, ...] = ()
    """What a reader of the files may not expect, a sentence each."""
    conflicting_share: float = 0.0
    """Of the distinct labelled texts, those that stand there with more than one class."""

    @property
    def is_classified(self) -> bool:
        """Whether there are classes to learn; else this is raw text."""
        return bool(self.classes)

    @property
    def labelled_examples(self) -> Interval:
        """Rows with a class and a text."""
        return self.examples.scaled(self.labelled_share)

    @property
    def imbalance(self) -> float:
        """Rows of the largest class over those of the smallest; 1 for raw text."""
        return self.classes[0].rows / self.classes[-1].rows if self.classes else 1.0


def describe(
    reading: Reading, *, count: CountTokens | None = None, sample_bytes: int = SAMPLE_BYTES, seed: int = 0
) -> DatasetFacts:
    """The facts of a reading; `count` is the base model's tokenizer, without which a proxy counts tokens.

    Raises DataError when there is no text in it, or its class column holds one class or none.
    """
    texts = [text for block in reading.blocks for text in block.texts]
    filled = [normal for text in texts if (normal := normalize(text))]
    if not filled:
        raise DataError(
            f"{reading.location} holds no text", got=f"{len(texts)} empty texts", do="check the path and the column"
        )
    text_bytes = _total(reading, [sum(_sizes(block.texts)) for block in reading.blocks])
    token_count = estimate_tokens(
        [block.texts for block in reading.blocks],
        text_bytes=text_bytes,
        share=reading.share,
        count=count,
        sample_bytes=sample_bytes,
        seed=seed,
    )
    documents = reading.document_bytes
    labels = reading.complete_labels()
    return DatasetFacts(
        location=reading.location,
        share_read=reading.share,
        examples=exactly(len(documents)) if documents else _total(reading, [len(b.texts) for b in reading.blocks]),
        text_bytes=text_bytes,
        characters=_total(reading, [sum(map(len, block.texts)) for block in reading.blocks]),
        token_count=token_count,
        row_lengths=RowLengths.of(round(size / token_count.bytes_per_token.mid) for size in _sizes(texts)),
        lengths=_lengths(documents or _sizes(texts), token_count.bytes_per_token.mid),
        empty_share=documents.count(0) / len(documents) if documents else 1 - len(filled) / len(texts),
        duplicates=_duplicates(reading, filled, seed=seed),
        columns=reading.columns,
        notes=reading.notes,
        classes=_classes(reading, labels) if labels else (),
        labelled_share=sum(label is not None for label in labels) / len(labels) if labels else 0.0,
        conflicting_share=_conflicting(texts, labels) if labels else 0.0,
    )


def _duplicates(reading: Reading, filled: Sequence[str], *, seed: int) -> Duplicates | None:
    """Copies among the normalized texts that are not empty."""
    if reading.document_bytes and reading.share < 1:
        return None
    distinct = {fingerprint(text): text for text in filled}
    return measure_duplicates(distinct, len(filled), share=reading.share, seed=seed)


def _total(reading: Reading, amounts: Sequence[int]) -> Interval:
    """An amount of the whole dataset from that of each block."""
    pairs = [(float(amount), float(block.extent)) for amount, block in zip(amounts, reading.blocks, strict=True)]
    if reading.share >= 1:
        return exactly(sum(amounts))
    return ratio(pairs, share=reading.share).interval(reading.extent)


def _sizes(texts: Sequence[str]) -> list[int]:
    """UTF-8 bytes of each text."""
    return [len(text) if text.isascii() else len(text.encode(errors="surrogatepass")) for text in texts]


def _lengths(sizes: Sequence[int], bytes_per_token: float) -> Lengths:
    """Percentiles by the nearest rank."""
    ordered = sorted(size for size in sizes if size)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / bytes_per_token

    return Lengths(p5=at(0.05), p50=at(0.5), p95=at(0.95), longest=ordered[-1] / bytes_per_token)


def _classes(reading: Reading, labels: Sequence[str | None]) -> tuple[ClassCount, ...]:
    counts = Counter(label for label in labels if label is not None)
    name, total = reading.columns.label or "", counts.total()
    refuse_no_classes(counts, column=name, location=reading.location, asking=OPTIONS)
    if not repeats_enough(len(counts), total):
        raise DataError(
            f"column {name!r} of {reading.location} is no class column",
            got=f"{len(counts)} values in {total} rows",
            allowed=f"at most {MAX_CLASSES} classes, with two rows each on average",
            do="name the class column with --label-column, or set --task causal-lm for raw text",
        )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ClassCount(name=label, rows=rows, share=rows / total) for label, rows in ordered)


def _conflicting(texts: Sequence[str], labels: Sequence[str | None]) -> float:
    found: dict[bytes, set[str]] = defaultdict(set)
    for text, label in zip(texts, labels, strict=True):
        if label is not None and (normal := normalize(text)):
            found[fingerprint(normal)].add(label)
    return sum(len(classes) > 1 for classes in found.values()) / len(found) if found else 0.0
