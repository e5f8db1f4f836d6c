"""Labelled texts: rows of text with a class each, as long as they are and padded within a batch.

Counts the tokens of a sample of the rows where there are many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.held_out import Account
from orchestrator.data.labelled_rows import Texts
from orchestrator.data.splits import SPLITS, Split, SplitRows, as_classes, measured_rows, split_rows
from orchestrator.intervals import Z90, Interval
from orchestrator.planning.length import PAD_MULTIPLE
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.ratio_estimates import exactly
from orchestrator.samples import tokenization
from orchestrator.samples.forms.base import EncodeMany, Inputs, SampleForm
from orchestrator.samples.forms.data_figures import DataLook, account_of, is_little
from orchestrator.samples.forms.token_file import read_tokens, write_tokens
from orchestrator.samples.masking import Batch, Masking
from orchestrator.samples.tokenization import Chunk, TextTokenizer

SAMPLE_ROWS = 4000
"""Rows that are tokenised of a larger table: 0.1 to 0.3 s, and a standard error of some 0.1 % of the tokens."""
LONGEST_ROWS = 32
"""Rows with the most bytes that are tokenised besides, since one of them is the longest in tokens (a guess that holds
where the text is of one kind)."""

EncodedRows = tuple[np.ndarray, np.ndarray]
"""Ids of rows, one after the other, and the length of each."""


class LabelledSamples:
    """Rows of token ids with a class each."""

    def __init__(
        self, tokens: np.ndarray, *, lengths: np.ndarray, labels: np.ndarray, pad_id: int, longest: int
    ) -> None:
        self._tokens = tokens
        self._lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._labels = labels.astype(np.int64)
        self._pad_id = pad_id
        self._longest = longest

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, without padding."""
        return int(self._lengths.sum())

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each row, without padding."""
        found: np.ndarray = self._lengths[indices]
        return found

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """The class of each row."""
        found: np.ndarray = self._labels[indices]
        return found

    def padded_length(self, indices: np.ndarray) -> int:
        """The longest row of the batch, rounded up to `PAD_MULTIPLE` but not beyond the cut-off of the spec."""
        return int(padded(self._lengths[indices].max(), self._longest))

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids` and `attention_mask`, both (samples, columns), and `labels`, the class of each sample."""
        columns = np.arange(self.padded_length(indices) if pad_to is None else pad_to)
        lengths = self._lengths[indices]
        assert lengths.max() <= len(columns), "pad_to is shorter than a row"
        real = columns < lengths[:, None]
        places = np.where(real, self._starts[indices][:, None] + columns, 0)
        ids = np.where(real, self._tokens[places], self._pad_id).astype(np.int64)
        return {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": self.labels(indices)}


class LabelledTexts(SampleForm[SplitRows]):
    """See the module."""

    name = "labelled-texts"
    unit = "rows"

    def split(self, inputs: Inputs) -> SplitRows:
        """See `SampleForm`: stratified by class."""
        spec, classes = inputs.spec, inputs.classes
        if classes is None:
            return split_rows(spec, inputs.train, inputs.validation)
        if inputs.validation:
            return measured_rows(spec, inputs.validation, classes)
        return as_classes(split_rows(spec, inputs.train, ()), classes, column=str(spec.data.label_column))

    def write(
        self, inputs: Inputs, examples: SplitRows, folder: Path, encode: EncodeMany, pause: Callable[[], None]
    ) -> tuple[TextTokenizer, dict[str, Any]]:
        """See `SampleForm`."""
        tokenizer = inputs.given_tokenizer
        inputs.check_ids(examples.splits["train" if inputs.train else "validation"][0])
        function = _encoder(inputs, tokenizer)
        account = Account()
        found: dict[str, Any] = {"label_names": examples.names}
        order: tuple[Split, ...] = ("validation", "train")
        for split in order:
            texts, labels = examples.splits[split]
            seen = account.held_out(texts, examples.labels(split)) if split == "validation" else account.training(texts)
            tokens = write_rows(folder, split, encode(function, tokenization.row_chunks(seen)), labels=labels)
            found |= {f"{split}_samples": len(texts), f"{split}_tokens": tokens}
        return tokenizer, found | self.accounted(account, inputs, examples.notes)

    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> LabelledSamples:
        """See `SampleForm`."""
        return LabelledSamples(
            read_tokens(path, split, meta),
            lengths=np.load(_lengths(path, split)),
            labels=np.load(_labels(path, split)),
            pad_id=meta["pad_id"],
            longest=meta["sequence_length"],
        )

    def shapes(self, path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
        """See `SampleForm`: the columns that each row would take alone."""
        train, validation = (
            padded(np.load(_lengths(path, split)).astype(np.int64), meta["sequence_length"]) for split in SPLITS
        )
        columns = histogram(train if len(train) else validation)
        return {"columns": columns, "longest": int(max(train.max(initial=0), validation.max()))}

    def class_sizes(self, path: Path, names: Sequence[str] | None) -> dict[str, int] | None:
        """See `SampleForm`."""
        assert names is not None, "rows have a class each"
        train, validation = (np.load(_labels(path, split)) for split in SPLITS)
        rows = np.bincount(train if len(train) else validation, minlength=len(names))
        return dict(zip(names, rows.tolist(), strict=True))

    def look(self, inputs: Inputs, examples: SplitRows) -> DataLook:
        """See `SampleForm`."""
        tokenizer, cut_off, names = inputs.given_tokenizer, inputs.spec.data.sequence_length, examples.names
        encode = _encoder(inputs, tokenizer)
        (texts, labels), held_texts = (
            examples.splits["train" if inputs.train else "validation"],
            (examples.splits["validation"][0]),
        )
        sizes, held = _sizes(texts), _sizes(held_texts)
        size, held_size = int(sizes.sum()), int(held.sum())
        is_whole = is_little(size + held_size)
        drawn, each, bytes_of_each = _strata(sizes, len(texts) if is_whole else SAMPLE_ROWS)
        lengths = _row_lengths(texts.at(drawn), encode)
        most = max(len(texts), len(held)) if is_whole else LONGEST_ROWS
        far = texts.at(np.argsort(sizes)[-most:]) + held_texts.at(np.argsort(held)[-most:])
        longest = max(int(lengths.max()), int(_row_lengths(far, encode).max()))
        # Rows have tokens in proportion to their bytes, until they are cut off.
        whole = lengths * np.where(lengths < cut_off, bytes_of_each / sizes[drawn], each)
        tokens = _stratified_total(whole, exact=len(drawn) == len(texts))
        columns = padded(lengths, cut_off)
        shares = {width: int(each[columns == width].sum()) for width in np.unique(columns).tolist()}
        counts = DatasetCounts(
            train_samples=len(texts) if inputs.train else 0,
            train_tokens=round(tokens.mid) if inputs.train else 0,
            validation_samples=len(held),
            validation_tokens=None if inputs.train else round(tokens.mid),
            vocab_size=tokenizer.vocab_size,
            num_labels=len(names),
            label_names=names,
            columns=tuple(shares.items()),
            longest=int(padded(np.array([longest]), cut_off)[0]),
        )
        trained_on, train_size = examples.splits["train"][0], size if inputs.train else 0
        labels_held = examples.labels("validation")
        account = account_of(trained_on, held_texts, examples=len(trained_on), size=train_size, labels=labels_held)
        return DataLook(
            unit=self.unit,
            train_examples=len(trained_on),
            validation_examples=len(held),
            train_bytes=train_size,
            validation_bytes=held_size,
            held_out=account.result(self.unit, asked=inputs.asked, notes=examples.notes),
            columns=inputs.columns,
            classes=dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True)),
            train_tokens=tokens,
            counted=inputs.is_exact and len(drawn) == len(texts),
            counts=counts,
            notes=(*inputs.notes, *examples.notes),
        )


def write_rows(folder: Path, split: Split, parts: Iterable[EncodedRows], *, labels: np.ndarray) -> int:
    """Writes rows part by part, and the class of each; the number of their tokens."""
    lengths: list[np.ndarray] = []

    def ids() -> Iterator[np.ndarray]:
        for found, each in parts:
            lengths.append(each)
            yield found

    tokens = write_tokens(folder, split, ids())
    np.save(_lengths(folder, split), np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64))
    np.save(_labels(folder, split), labels)
    return tokens


def padded(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Columns that rows of these lengths take: rounded up to `PAD_MULTIPLE`, but not beyond the cut-off."""
    columns: np.ndarray = np.minimum(-(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE, longest)
    return columns


def histogram(columns: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(columns, how many rows take them), the fewest columns first."""
    values, counts = np.unique(columns, return_counts=True)
    return tuple(zip(values.tolist(), counts.tolist(), strict=True))


def _lengths(folder: Path, split: Split) -> Path:
    return folder / f"{split}.lengths.npy"


def _labels(folder: Path, split: Split) -> Path:
    return folder / f"{split}.labels.npy"


def _encoder(inputs: Inputs, tokenizer: TextTokenizer) -> Callable[[Chunk], EncodedRows]:
    """What turns rows into ids and their lengths, cut off where the spec says; here or in a Ray task."""
    return functools.partial(
        tokenization.encode_rows,
        tokenizer=tokenizer.encoder,
        sequence_length=inputs.spec.data.sequence_length,
        pad_id=tokenizer.pad_id,
        side=tokenizer.truncation_side,
    )


# -- tokens of rows, counted or estimated ------------------------------------------------------------------------------


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


def _row_lengths(texts: Sequence[str], encode: Callable[[Chunk], EncodedRows]) -> np.ndarray:
    return np.concatenate([encode(chunk)[1] for chunk in tokenization.row_chunks(texts)])
