"""Chats: conversations in blocks that several share, none of which sees another; an assistant's tokens are predicted.

Each conversation counts its positions from 0. Where a model is given no mask and no cache, transformers takes that for
the border between samples; of architectures that do not do so, each conversation has a block of its own.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.architectures.families import LLAMA_LIKE, model_config
from orchestrator.data.conversations import Conversations, said
from orchestrator.data.held_out import Account
from orchestrator.data.splits import SPLITS, Chosen, Split, split_conversations
from orchestrator.errors import DataError
from orchestrator.intervals import Interval
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.ratio_estimates import exactly, ratio
from orchestrator.samples import base_tokenizer, tokenization
from orchestrator.samples.chat_encoding import ChatEncoding, EncodedChats, encode_chats
from orchestrator.samples.chat_templates import template_of, with_template
from orchestrator.samples.forms.base import EncodeMany, Inputs, SampleForm
from orchestrator.samples.forms.data_figures import DataLook, account_of, is_little
from orchestrator.samples.forms.document_blocks import SAMPLE_BYTES, drawn_documents, notes_of
from orchestrator.samples.forms.labelled_texts import histogram, padded
from orchestrator.samples.forms.token_file import read_tokens, write_tokens
from orchestrator.samples.masking import Batch, Masking
from orchestrator.samples.packing import Packs, alone, pack
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.spec import RunSpec
from orchestrator.tasks.masked_lm import NO_LABEL

SEPARATE = ("gpt2", "gpt_neox", *LLAMA_LIKE)
"""Architectures that keep conversations apart by their positions (transformers 5.23; a test asks each). OPT does not:
it counts positions from a mask."""
Examples = tuple[Chosen, Chosen]
"""Those to train on and those held out."""


class ChatSamples:
    """Blocks of conversations."""

    def __init__(
        self, tokens: np.ndarray, *, spoken: np.ndarray, lengths: np.ndarray, packs: Packs, pad_id: int, longest: int
    ) -> None:
        self._tokens, self._spoken = tokens, spoken
        self._lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._packs, self._pad_id, self._longest = packs, pad_id, longest
        self._sizes = block_sizes(self._lengths, packs)
        self._shares = len(packs) < len(lengths)

    def __len__(self) -> int:
        return len(self._packs)

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, without padding."""
        return int(self._lengths.sum())

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each block, without padding."""
        found: np.ndarray = self._sizes[indices]
        return found

    def padded_length(self, indices: np.ndarray) -> int:
        """The fullest block of the batch, rounded up to `PAD_MULTIPLE` but not beyond the length of the spec."""
        return int(padded(self._sizes[indices].max(), self._longest))

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids`, `labels` (the next token where an assistant says it, else `NO_LABEL`) and, where conversations
        share blocks, `position_ids`; all (blocks, columns). No sample pads to the left, so none needs a mask."""
        shape = len(indices), self.padded_length(indices) if pad_to is None else pad_to
        ids, labels = np.full(shape, self._pad_id, dtype=np.int64), np.full(shape, NO_LABEL, dtype=np.int64)
        positions = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
        for row, block in enumerate(indices):
            place = 0
            for member in self._packs.of(int(block)):
                begin, length = self._starts[member], self._lengths[member]
                own, end = self._tokens[begin : begin + length].astype(np.int64), place + length
                ids[row, place:end] = own
                labels[row, place : end - 1] = np.where(self._spoken[begin + 1 : begin + length], own[1:], NO_LABEL)
                positions[row, place:end] = np.arange(length)
                place = end
            positions[row, place:] = np.arange(shape[1] - place)
        batch = {"input_ids": ids, "labels": labels}
        return {**batch, "position_ids": positions} if self._shares else batch


class Chats(SampleForm[Examples]):
    """See the module."""

    name = "chats"
    unit = "rows"

    def own_tokenizer(self, spec: RunSpec, tokenizer: TextTokenizer) -> tuple[TextTokenizer, str | None]:
        """See `SampleForm`: with the template of the spec."""
        return with_template(tokenizer, spec.data.chat_template, location=_location(spec))

    def split(self, inputs: Inputs) -> Examples:
        """See `SampleForm`."""
        assert inputs.layout is not None, "told with the columns"
        return split_conversations(inputs.spec, inputs.layout, inputs.train, inputs.validation)

    def write(
        self, inputs: Inputs, examples: Examples, folder: Path, encode: EncodeMany, pause: Callable[[], None]
    ) -> tuple[TextTokenizer, dict[str, Any]]:
        """See `SampleForm`."""
        train, validation = examples
        tokenizer, account = inputs.given_tokenizer, Account()
        inputs.check_ids(map(said, train if inputs.train else validation))
        function = functools.partial(encode_chats, encoding=_encoding(inputs))
        found: dict[str, Any] = {"label_names": None, "turn_ends": []}
        notes = [*notes_of(examples)]
        both: tuple[tuple[Split, Chosen, Callable[[Iterable[str]], Iterator[str]]], ...] = (
            ("validation", validation, account.held_out),
            ("train", train, account.training),
        )
        for split, chosen, see in both:
            chunks = tokenization.row_chunks(_seen(chosen, see))
            written = _Written(folder, split, length=inputs.spec.data.sequence_length)
            tokens = write_tokens(folder, split, written.taking(encode(function, chunks), chosen))
            if len(chosen.numbers) and not tokens:
                raise _nothing_fits(split, inputs.spec)
            blocks = written.end(_packer(inputs.spec))
            found |= {f"{split}_samples": blocks, f"{split}_tokens": tokens}
            found["turn_ends"] = sorted({*found["turn_ends"], *written.ends})
            notes += written.notes()
        return tokenizer, found | self.accounted(account, inputs, notes)

    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> ChatSamples:
        """See `SampleForm`."""
        return ChatSamples(
            read_tokens(path, split, meta),
            spoken=np.load(_file(path, split, "spoken"), mmap_mode="r"),
            lengths=np.load(_file(path, split, "lengths")),
            packs=_packs(path, split),
            pad_id=meta["pad_id"],
            longest=meta["sequence_length"],
        )

    def shapes(self, path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
        """See `SampleForm`: the columns that each block would take alone."""
        train, validation = (
            padded(block_sizes(np.load(_file(path, split, "lengths")), _packs(path, split)), meta["sequence_length"])
            for split in SPLITS
        )
        return _shapes(train, validation)

    def look(self, inputs: Inputs, examples: Examples) -> DataLook:
        """See `SampleForm`."""
        train, validation = examples
        size, held_size = _bytes(train), _bytes(validation)
        is_whole = is_little(size + held_size)
        both = [_seen_of(chosen, inputs, is_whole=is_whole) for chosen in examples]
        main, held = both if inputs.train else (both[1], both[1])
        for split, chosen, half in zip(SPLITS, examples, both, strict=True):
            if len(chosen.numbers) and not len(half.columns):
                raise _nothing_fits(split, inputs.spec)
        shapes = _shapes(both[0].columns, held.columns)
        counts = DatasetCounts(
            train_samples=both[0].blocks,
            train_tokens=round(both[0].tokens.mid),
            validation_samples=held.blocks,
            validation_tokens=None if inputs.train else round(held.tokens.mid),
            vocab_size=inputs.given_tokenizer.vocab_size,
            columns=tuple((width, max(1, round(main.times * blocks))) for width, blocks in shapes["columns"]),
            longest=shapes["longest"],
        )
        notes = (*notes_of(examples), *both[0].lost("to train on"), *held.lost("held out"))
        account = account_of(map(said, train), map(said, validation), examples=len(train.numbers), size=size)
        return DataLook(
            unit=self.unit,
            train_examples=len(train.numbers),
            validation_examples=len(validation.numbers),
            train_bytes=size,
            validation_bytes=held_size,
            held_out=account.result(self.unit, asked=inputs.asked, notes=notes),
            columns=inputs.columns,
            classes=None,
            train_tokens=main.tokens,
            counted=inputs.is_exact and is_whole,
            counts=counts,
            notes=(*inputs.notes, *notes),
        )


@dataclass(frozen=True, kw_only=True)
class _Lost:
    """Samples that were too long."""

    length: int
    """Tokens that there was room for."""
    cut: int = 0
    left_out: int = 0

    def __add__(self, part: EncodedChats) -> _Lost:
        return replace(self, cut=self.cut + part.cut, left_out=self.left_out + part.left_out)

    def sentences(self, which: str) -> Iterator[str]:
        """What became of them."""
        if self.cut:
            yield f"{self.cut:,} conversations {which} of more than {self.length:,} tokens lost their end"
        if self.left_out:
            yield f"{self.left_out:,} conversations {which} have no answer within {self.length:,} tokens: left out"


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a look finds of one split."""

    columns: np.ndarray
    """Of each block that was made of what was looked at."""
    times: float
    """How much more there is."""
    tokens: Interval
    losses: _Lost

    @property
    def blocks(self) -> int:
        """Of all of it."""
        return max(1, round(len(self.columns) * self.times)) if len(self.columns) else 0

    def lost(self, which: str) -> Iterator[str]:
        """What is cut or left out, where all of it was looked at."""
        return self.losses.sentences(which) if self.times == 1 else iter(())


class _Written:
    """The files of a split beside its tokens."""

    def __init__(self, folder: Path, split: Split, *, length: int) -> None:
        self._folder, self._split = folder, split
        self._lengths: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
        self._spoken: list[np.ndarray] = [np.empty(0, dtype=np.uint8)]
        self._lost = _Lost(length=length)
        self.ends: set[int] = set()
        """Special tokens that end an assistant's turns."""

    def taking(self, parts: Iterable[EncodedChats], chosen: Chosen) -> Iterator[np.ndarray]:
        """The ids of each part. Raises DataError for a conversation that cannot be encoded, with its place."""
        before = 0
        for part in parts:
            if part.problem is not None:
                number, error = part.problem
                raise _placed(error, chosen, before + number) from error
            before += part.conversations
            self._lengths.append(part.lengths)
            self._spoken.append(part.spoken)
            self._lost += part
            self.ends |= part.ends
            yield part.tokens

    def end(self, place: Callable[[np.ndarray], Packs]) -> int:
        """Writes them; how many blocks there are."""
        lengths = np.concatenate(self._lengths)
        packs = place(lengths)
        for name, array in (
            ("lengths", lengths),
            ("spoken", np.concatenate(self._spoken)),
            ("members", packs.members),
            ("starts", packs.starts),
        ):
            np.save(_file(self._folder, self._split, name), array)
        return len(packs)

    def notes(self) -> Iterator[str]:
        """What was cut or left out, a sentence each."""
        return self._lost.sentences("held out" if self._split == "validation" else "to train on")


def block_sizes(lengths: np.ndarray, packs: Packs) -> np.ndarray:
    """Tokens of each block, int64."""
    ends = np.concatenate([[0], np.cumsum(lengths[packs.members].astype(np.int64))])
    sizes: np.ndarray = np.diff(ends[packs.starts])
    return sizes


def _shapes(train: np.ndarray, validation: np.ndarray) -> dict[str, Any]:
    longest = int(max(train.max(initial=0), validation.max(initial=0)))
    return {"columns": histogram(train if len(train) else validation), "longest": longest}


def _file(folder: Path, split: Split, name: str) -> Path:
    return folder / f"{split}.{name}.npy"


def _packs(folder: Path, split: Split) -> Packs:
    return Packs(members=np.load(_file(folder, split, "members")), starts=np.load(_file(folder, split, "starts")))


def _location(spec: RunSpec) -> str:
    return base_tokenizer.tokenizer_location(spec.model) or "the tokenizer"


def _packer(spec: RunSpec) -> Callable[[np.ndarray], Packs]:
    """How conversations of these lengths share blocks."""
    if str(model_config(spec.model).get("model_type")) in SEPARATE:
        return functools.partial(pack, room=spec.data.sequence_length)
    return lambda lengths: alone(len(lengths))


def _encoding(inputs: Inputs) -> ChatEncoding:
    tokenizer, data = inputs.given_tokenizer, inputs.spec.data
    return ChatEncoding(
        template=template_of(tokenizer, location=_location(inputs.spec)),
        tokenizer=tokenizer.encoder,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        length=data.sequence_length,
        too_long=data.too_long,
    )


def _seen(chosen: Chosen, see: Callable[[Iterable[str]], Iterator[str]]) -> Iterator[str]:
    """The conversations, what is said in each of them counted as it goes by."""
    for text in chosen:
        deque(see((said(text),)), maxlen=0)
        yield text


def _placed(error: DataError, chosen: Chosen, number: int) -> DataError:
    rows = chosen.documents
    assert isinstance(rows, Conversations), "split as such"
    place = rows.place(int(chosen.numbers[number]))
    got = place if error.got is None else f"{place}: {error.got}"
    return DataError(error.what, got=got, allowed=error.allowed, do=error.do or "correct or remove this row")


def _nothing_fits(split: Split, spec: RunSpec) -> DataError:
    return DataError(
        f"no conversation of the {split} data has an answer within data.sequence_length",
        got=f"data.sequence_length: {spec.data.sequence_length}",
        do="raise it",
    )


def _bytes(chosen: Chosen) -> int:
    return int(chosen.documents.sizes[chosen.numbers].sum())


def _seen_of(chosen: Chosen, inputs: Inputs, *, is_whole: bool) -> _Seen:
    """A look at a split, or at a sample of it. Raises DataError as `write` would."""
    encoding, room = _encoding(inputs), inputs.spec.data.sequence_length
    part = chosen if is_whole else drawn_documents(chosen, inputs.spec.data.split_seed, SAMPLE_BYTES)
    lengths: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    units: list[tuple[float, float]] = []
    losses = _Lost(length=room)
    for number, text in enumerate(part):
        found = encode_chats(Chunk(texts=(text,), ends=(True,)), encoding=encoding)
        if found.problem is not None:
            raise _placed(found.problem[1], part, number) from found.problem[1]
        lengths.append(found.lengths)
        units.append((float(found.lengths.sum()), float(len(said(text).encode()))))
        losses += found
    every, size = np.concatenate(lengths), _bytes(chosen)
    times = 1.0 if len(part.numbers) == len(chosen.numbers) else size / sum(of for _, of in units)
    tokens = exactly(float(every.sum()))
    if times > 1:
        tokens = ratio(units, share=1 / times).interval(size)
    columns = padded(block_sizes(every, _packer(inputs.spec)(every)), room)
    return _Seen(columns=columns, times=times, tokens=tokens, losses=losses)
