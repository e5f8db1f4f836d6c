"""A look at a spec's data before anything is encoded: examples and classes counted, tokens from a sample of the text.

Reads and splits the data as `prepare` does, so what cannot work is refused here too. Data that is encoded already, or
so small that all of it is tokenised, gives exact figures, others a 90 % interval. Called by `plan`; no torch.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.held_out import Account, HeldOut
from orchestrator.data.labelled_rows import Texts
from orchestrator.data.splits import Chosen, SplitRows
from orchestrator.intervals import Z90, Interval
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.ratio_estimates import exactly, ratio
from orchestrator.samples import batches, tokenization
from orchestrator.samples.encoders import document_encoder, row_encoder, sample, tokenizer_of
from orchestrator.samples.new_tokenizer import BPE_SAMPLE_BYTES
from orchestrator.samples.prepare import PreparedData, Unprepared, document_notes, find_data, of_general_data
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of

SAMPLE_ROWS = 4000
"""Rows that are tokenised of a larger table: 0.1 to 0.3 s, and a standard error of some 0.1 % of the tokens."""
LONGEST_ROWS = 32
"""Rows with the most bytes that are tokenised besides, since one of them is the longest in tokens (a guess that holds
where the text is of one kind)."""
WHOLE_BYTES = 2_000_000
"""Text that is tokenised whole: 1 s."""
SAMPLE_BYTES = 2_000_000
"""What is tokenised of more, in pieces: 1 s."""
PIECE = 20_000
"""Characters of a piece: a cut adds at most one token to some 5,000."""
_FEW_DOCUMENTS = 8
"""Of fewer documents it is their pieces that differ, else the documents are what was drawn."""
COMPARED_BYTES = 200_000_000
"""Text to train on that is read to find held-out texts in it: 1 s. `run`, which reads it all, tells of more."""
NEW_TOKENIZER_BYTES = 4_000_000
"""Text that a new tokenizer is trained on for the look, 2 s, where `prepare` takes five times as much."""
NEW_TOKENIZER_ERROR = 0.03
"""Relative half-width for that: of 11 MB, the source of the Python standard library, the look expected 1.6 % more
tokens than a vocabulary of 8,192 from all of it made (measured)."""
_NAMED_CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class DataLook:
    """What a spec's data holds."""

    unit: str
    """`documents` or `rows`."""
    train_examples: int | None
    """None where an earlier version encoded the data and did not count."""
    validation_examples: int
    train_bytes: int
    validation_bytes: int
    held_out: HeldOut
    """What will be measured on, in the figures that `run` gives of it."""
    columns: Mapping[str, str]
    """Those in use, by what they hold: `text` and, for classification, `label`; none for files that are documents."""
    classes: Mapping[str, int] | None
    """Rows of each class to train on, by its name, in the order of their numbers."""
    train_tokens: Interval
    """Of one pass, special ones included."""
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
        examples = "" if self.train_examples is None else f"{self.train_examples:,} {self.unit}, "
        yield f"{examples}{self.train_bytes:,} bytes to train on"
        yield self.held_out.sentence()
        tokens = self.train_tokens
        about = "" if self.counted else f" (estimated, {tokens.low:,.0f} to {tokens.high:,.0f})"
        if not self.counted and tokens.low == tokens.high:
            about = " (by the base's tokenizer.json alone)"
        samples = "" if self.unit == "rows" else f" in {self.counts.train_samples:,} blocks"
        yield f"{tokens.mid:,.0f} tokens a pass{about}{samples}"
        if self.columns:
            yield "columns: " + ", ".join(f"{column!r} is the {holds}" for holds, column in self.columns.items())
        if self.classes is not None:
            most = Counter(self.classes).most_common(_NAMED_CLASSES)
            named = ", ".join(f"{name} {rows:,}" for name, rows in most)
            yield f"{len(self.classes)} classes: {named}" + (", ..." if len(self.classes) > _NAMED_CLASSES else "")
        yield from self.notes


def look(spec: RunSpec, *, cache: Path) -> DataLook:
    """What the data of a spec holds; `cache` is where `prepare` would keep it.

    Raises what `prepare` raises, but for text that is too short for one block.
    """
    found = _look(spec, cache)
    with of_general_data(spec) as general:
        retained = None if general is None else _look(general, cache)
    if retained is None:
        return found
    said = tuple(f"general data: {sentence}" for sentence in retained.sentences())
    counts = replace(found.counts, retained=retained.counts)
    return replace(found, counts=counts, notes=(*found.notes, *said))


def _look(spec: RunSpec, cache: Path) -> DataLook:
    """Of one block of data."""
    found = find_data(spec, cache=cache, exactly=False)
    if isinstance(found, PreparedData):
        return _encoded(found)
    if isinstance(found.split, SplitRows):
        assert found.tokenizer is not None, "classification fine-tunes a base model, which has a tokenizer"
        return _rows(found, found.split, found.tokenizer)
    return _documents(found, *found.split)


def _encoded(data: PreparedData) -> DataLook:
    classes = None
    if data.label_names is not None:
        rows = np.bincount(np.load(data.path / "train.labels.npy"), minlength=len(data.label_names))
        classes = dict(zip(data.label_names, rows.tolist(), strict=True))
    return DataLook(
        unit=data.held_out.unit,
        train_examples=data.train_examples,
        validation_examples=data.held_out.examples,
        train_bytes=data.bytes,
        validation_bytes=data.validation_bytes,
        held_out=data.held_out,
        columns=data.columns,
        classes=classes,
        train_tokens=exactly(data.counts.train_tokens),
        counted=True,
        counts=data.counts,
        notes=(*data.notes, *data.held_out.notes),
    )


# -- labelled rows -----------------------------------------------------------------------------------------------------


def _rows(found: Unprepared, rows: SplitRows, tokenizer: TextTokenizer) -> DataLook:
    cut_off, encode = found.spec.data.sequence_length, row_encoder(found.spec, tokenizer)
    texts, labels = rows.splits["train"]
    sizes, held = (_sizes(rows.splits[split][0]) for split in ("train", "validation"))
    is_whole = sizes.sum() + held.sum() <= WHOLE_BYTES
    drawn, each, bytes_of_each = _strata(sizes, len(texts) if is_whole else SAMPLE_ROWS)
    lengths = _row_lengths(texts.at(drawn), encode)
    most = max(len(texts), len(held)) if is_whole else LONGEST_ROWS
    far = texts.at(np.argsort(sizes)[-most:]) + rows.splits["validation"][0].at(np.argsort(held)[-most:])
    longest = max(int(lengths.max()), int(_row_lengths(far, encode).max()))
    # Rows have tokens in proportion to their bytes, until they are cut off.
    whole = lengths * np.where(lengths < cut_off, bytes_of_each / sizes[drawn], each)
    tokens = _stratified_total(whole, exact=len(drawn) == len(texts))
    columns = batches.padded(lengths, cut_off)
    shares = {width: int(each[columns == width].sum()) for width in np.unique(columns).tolist()}
    counts = DatasetCounts(
        train_samples=len(texts),
        train_tokens=round(tokens.mid),
        validation_samples=len(held),
        vocab_size=tokenizer.vocab_size,
        num_labels=len(rows.names),
        label_names=rows.names,
        columns=tuple(shares.items()),
        longest=int(batches.padded(np.array([longest]), cut_off)[0]),
    )
    per_class = np.bincount(labels, minlength=len(rows.names)).tolist()
    return DataLook(
        unit="rows",
        train_examples=len(texts),
        validation_examples=len(held),
        train_bytes=int(sizes.sum()),
        validation_bytes=int(held.sum()),
        held_out=_held_out_rows(found, rows, int(sizes.sum())),
        columns=found.columns,
        classes=dict(zip(rows.names, per_class, strict=True)),
        train_tokens=tokens,
        counted=found.is_exact and len(drawn) == len(texts),
        counts=counts,
        notes=(*found.notes, *rows.notes),
    )


def _held_out_rows(found: Unprepared, rows: SplitRows, size: int) -> HeldOut:
    account, texts = Account(), rows.splits["train"][0]
    deque(account.held_out(rows.splits["validation"][0], rows.labels("validation")), maxlen=0)
    if size <= COMPARED_BYTES:
        deque(account.training(texts), maxlen=0)
    else:
        account.pass_over(len(texts), size)
    return account.result("rows", asked=found.asked, notes=rows.notes)


def _sizes(texts: Texts) -> np.ndarray:
    """UTF-8 bytes of each."""
    return np.fromiter((len(text.encode()) for text in texts), dtype=np.int64, count=len(texts))


def _strata(sizes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(drawn rows, how many rows and how many bytes each stands for): one at random of each of `most` strata of rows
    alike in size."""
    order = np.argsort(sizes, kind="stable")
    if len(order) <= most:
        return order, np.ones(len(order), dtype=np.int64), sizes[order]
    edges = np.linspace(0, len(order), most + 1).astype(np.int64)
    rows = np.diff(edges)
    return order[edges[:-1] + np.random.default_rng(0).integers(rows)], rows, np.add.reduceat(sizes[order], edges[:-1])


def _stratified_total(whole: np.ndarray, *, exact: bool) -> Interval:
    """The total of strata, each known from one draw; neighbours tell how much draws differ (Cochran, Sampling
    Techniques, 1977, section 5A.12: collapsed strata)."""
    total = float(whole.sum())
    if exact:
        return exactly(total)
    pairs = whole[: len(whole) // 2 * 2].reshape(-1, 2)
    half = Z90 * math.sqrt(float(((pairs[:, 0] - pairs[:, 1]) ** 2).sum()))
    return Interval(low=total - half, mid=total, high=total + half)


def _row_lengths(texts: Sequence[str], encode: Callable[[Chunk], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([encode(chunk)[1] for chunk in tokenization.row_chunks(texts)])


# -- documents ---------------------------------------------------------------------------------------------------------


def _documents(found: Unprepared, train: Chosen, validation: Chosen) -> DataLook:
    spec, is_masked = found.spec, task_of(found.spec.task).hides_tokens
    size, held = _bytes(train), _bytes(validation)
    is_whole = size + held <= WHOLE_BYTES
    most = BPE_SAMPLE_BYTES if is_whole else NEW_TOKENIZER_BYTES
    tokenizer = found.tokenizer or tokenizer_of(spec, train, most_bytes=most)
    bias = 0.0 if found.tokenizer or is_whole else NEW_TOKENIZER_ERROR
    count = _Counter(spec, tokenizer)
    if is_whole:
        stream, held_stream = exactly(count.whole(train)), count.whole(validation)
    else:
        a_byte = _tokens_of_a_byte(train, spec, count, bias)
        stream = Interval(**{end: round(value * size) for end, value in asdict(a_byte).items()})
        held_stream = round(a_byte.mid * held)
    samples_of = batches.masked_samples if is_masked else batches.packed_samples
    used_by = batches.masked_tokens if is_masked else batches.packed_tokens
    length = spec.data.sequence_length
    samples = samples_of(int(stream.mid), length)
    counts = DatasetCounts(
        train_samples=samples,
        train_tokens=samples * length,
        validation_samples=samples_of(held_stream, length),
        vocab_size=tokenizer.vocab_size if found.tokenizer or is_whole else spec.model.vocab_size,
        left_over_tokens=int(stream.mid) - used_by(samples, length) if is_whole else 0,
    )
    return DataLook(
        unit="documents",
        train_examples=len(train.numbers),
        validation_examples=len(validation.numbers),
        train_bytes=size,
        validation_bytes=held,
        held_out=_held_out_documents(found, train, validation, size),
        columns=found.columns,
        classes=None,
        train_tokens=exactly(counts.train_tokens) if is_whole else stream,
        counted=found.is_exact and is_whole,
        counts=counts,
        notes=(*found.notes, *document_notes(train, validation)),
    )


def _held_out_documents(found: Unprepared, train: Chosen, validation: Chosen, size: int) -> HeldOut:
    account = Account()
    deque(account.held_out(_kept(validation)), maxlen=0)
    if size <= COMPARED_BYTES:
        deque(account.training(_kept(train)), maxlen=0)
    else:
        account.pass_over(len(train.numbers), size)
    return account.result("documents", asked=found.asked, notes=document_notes(train, validation))


def _kept(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())


def _bytes(chosen: Chosen) -> int:
    """Of the documents, or of their part that is meant."""
    total = int(chosen.documents.sizes[chosen.numbers].sum())
    if chosen.cut is None:
        return total
    whole = int(chosen.documents.sizes[chosen.cut.number])
    return total - round(whole * (1 - chosen.cut.share if chosen.end else chosen.cut.share))


class _Counter:
    """Tokens of texts as `prepare` makes them."""

    def __init__(self, spec: RunSpec, tokenizer: TextTokenizer) -> None:
        self._encode, self._cuts = document_encoder(spec, tokenizer), tokenizer.cuts

    def whole(self, texts: Chosen) -> int:
        """Of the whole stream of documents, with what stands between them."""
        chunks = tokenization.document_chunks(_kept(texts), cuts=self._cuts)
        return sum(len(self._encode(chunk)) for chunk in chunks)

    def piece(self, text: str, *, ends: bool) -> int:
        """Of a piece, with what stands after a document where it ends one."""
        return len(self._encode(Chunk(texts=(text,), ends=(ends,))))


def _tokens_of_a_byte(train: Chosen, spec: RunSpec, count: _Counter, bias: float) -> Interval:
    """From pieces of documents drawn by the seed. A packed file's bytes are those on disk."""
    drawn = sample(train, spec.data.split_seed, 2 * SAMPLE_BYTES)
    share_of_each = min(1.0, SAMPLE_BYTES / max(1, _bytes(drawn)))
    draw = np.random.default_rng(spec.data.split_seed)
    units: list[tuple[float, float]] = []
    seen = 0
    for number, text in zip(drawn.numbers, drawn, strict=True):
        starts = np.arange(0, len(text), PIECE)
        wanted = max(1, round(share_of_each * len(starts)))
        pairs = []
        for start in np.sort(draw.permutation(starts)[:wanted]):
            piece = text[start : start + PIECE]
            pairs.append((count.piece(piece, ends=bool(start + PIECE >= len(text))), len(piece.encode())))
        if not pairs:
            continue
        on_disk = _packed(train, int(number), text)
        several = len(drawn.numbers) < _FEW_DOCUMENTS
        parts = pairs if several else [(sum(p[0] for p in pairs), sum(p[1] for p in pairs))]
        units += [(tokens, size * on_disk) for tokens, size in parts]
        seen += sum(size for _, size in pairs)
    return ratio(units, share=min(0.99, seen / max(1, _bytes(train)))).interval(systematic=bias)


def _packed(train: Chosen, number: int, text: str) -> float:
    """Bytes on disk for a byte of text; 1 but for packed files, and for the cut document, of which a part is read."""
    if train.cut is not None and train.cut.number == number:
        return 1.0
    return float(train.documents.sizes[number]) / max(1, len(text.encode()))
