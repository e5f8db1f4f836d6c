"""What the forms for raw text share: documents become one stream of tokens, which is cut into blocks of one length.

They differ in what stands around a document and a block. Counts tokens from pieces of the documents where there are
many.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from orchestrator.data.held_out import Account
from orchestrator.data.splits import Chosen, Split, split_documents
from orchestrator.errors import DataError
from orchestrator.intervals import Interval
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.ratio_estimates import exactly, ratio
from orchestrator.samples import new_tokenizer, tokenization
from orchestrator.samples.forms.base import EncodeMany, Inputs, SampleForm
from orchestrator.samples.forms.data_figures import DataLook, account_of, is_little
from orchestrator.samples.forms.token_file import stored_tokens, write_tokens
from orchestrator.samples.patience import patiently
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.spec import RunSpec

SAMPLE_BYTES = 2_000_000
"""What is tokenised of more than a little text, in pieces: 1 s."""
PIECE = 20_000
"""Characters of a piece: a cut adds at most one token to some 5,000."""
_FEW_DOCUMENTS = 8
"""Of fewer documents it is their pieces that differ, else the documents are what was drawn."""
NEW_TOKENIZER_ERROR = 0.03
"""Relative half-width for a tokenizer that is trained on `new_tokenizer.LOOK_SAMPLE_BYTES`: of 11 MB, the source of the
Python standard library, the look expected 1.6 % more tokens than a vocabulary of 8,192 from all of it made
(measured)."""

Documents = tuple[Chosen, Chosen]
"""Those to train on and those held out."""
Ids = tuple[int, ...]


class BlockSamples:
    """What is the same for all samples that are blocks of one length: no padding. Batches are for a form to make."""

    def __init__(self, tokens: np.ndarray, *, length: int, samples: int) -> None:
        self._tokens, self._length, self._samples = tokens, length, samples

    def __len__(self) -> int:
        return self._samples

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, the special ones that a block adds included."""
        return len(self) * self._length

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The block length, for each sample."""
        return np.full(len(indices), self._length)

    def padded_length(self, indices: np.ndarray) -> int:
        """The block length, for any samples."""
        return self._length


class DocumentBlocks(SampleForm[Documents]):
    """Documents as blocks of a stream."""

    unit = "documents"
    for_encoder: ClassVar[bool]
    """Whether a tokenizer that is trained on the corpus is an encoder's."""
    beside_block: ClassVar[str]
    """In what the stream that makes one block differs from its length, for an error."""

    @abstractmethod
    def around(self, spec: RunSpec, tokenizer: TextTokenizer) -> tuple[Ids, Ids]:
        """The ids before and after each document. Raises ModelError when the tokenizer lacks what is needed."""

    @abstractmethod
    def blocks(self, tokens: int, length: int) -> int:
        """Whole blocks of `length` in a stream of so many tokens."""

    @abstractmethod
    def stream(self, blocks: int, length: int) -> int:
        """Tokens of a stream that so many blocks of `length` take up."""

    def kept_ids(self, spec: RunSpec, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The special ids that `open` needs, which `meta.json` keeps."""
        return {}

    def covered(
        self, inputs: Inputs, tokenizer: TextTokenizer, held_out: Chosen, *, held_bytes: int, left_over: int
    ) -> dict[str, Any]:
        """What `meta.json` says of the part of the held-out text that evaluation covers: of its `held_bytes`, when so
        many tokens at its end fill no block."""
        return {}

    def encoder(self, spec: RunSpec, tokenizer: TextTokenizer) -> Callable[[Chunk], np.ndarray]:
        """What turns documents into ids, here or in a Ray task. Raises what `around` raises."""
        before, after = self.around(spec, tokenizer)
        return functools.partial(tokenization.encode_documents, tokenizer=tokenizer.encoder, before=before, after=after)

    def check_tokenizer(self, spec: RunSpec, tokenizer: TextTokenizer) -> None:
        """See `SampleForm`."""
        self.around(spec, tokenizer)

    def split(self, inputs: Inputs) -> Documents:
        """See `SampleForm`."""
        return split_documents(inputs.spec, inputs.train, inputs.validation)

    def train_tokenizer(
        self, spec: RunSpec, examples: Documents, *, most_bytes: int = new_tokenizer.BPE_SAMPLE_BYTES
    ) -> TextTokenizer:
        """See `SampleForm`."""
        return new_tokenizer.train_tokenizer(
            drawn_documents(examples[0], spec.data.split_seed, most_bytes),
            vocab_size=spec.model.vocab_size,
            sequence_length=spec.data.sequence_length,
            for_encoder=self.for_encoder,
        )

    def write(
        self, inputs: Inputs, examples: Documents, folder: Path, encode: EncodeMany, pause: Callable[[], None]
    ) -> tuple[TextTokenizer, dict[str, Any]]:
        """See `SampleForm`."""
        spec, (train, validation) = inputs.spec, examples
        inputs.check_ids(train if inputs.train else validation)
        tokenizer = inputs.tokenizer or patiently(lambda: self.train_tokenizer(spec, examples), pause)
        function, length = self.encoder(spec, tokenizer), spec.data.sequence_length
        found = {**self.kept_ids(spec, tokenizer), "label_names": None}
        # The small one first: if it is too short, nothing long was encoded in vain.
        account = Account()
        splits: tuple[tuple[Split, Iterator[str]], ...] = (
            ("validation", account.held_out(_not_blank(validation))),
            ("train", account.training(_not_blank(train))),
        )
        for split, texts in splits:
            chunks = tokenization.document_chunks(texts, cuts=tokenizer.cuts)
            tokens = write_tokens(folder, split, encode(function, chunks))
            samples = self.blocks(tokens, length)
            if samples == 0 and (split == "validation" or inputs.train):
                raise self._too_short(split, tokens, inputs)
            found |= {f"{split}_samples": samples, f"{split}_tokens": samples * length}
            if split == "validation":
                left_over = tokens - self.stream(samples, length)
                found |= self.covered(inputs, tokenizer, validation, held_bytes=account.held_bytes, left_over=left_over)
        return tokenizer, found | self.accounted(account, inputs, notes_of(examples))

    def _too_short(self, split: Split, tokens: int, inputs: Inputs) -> DataError:
        spec, needed = inputs.spec, self.stream(1, inputs.spec.data.sequence_length)
        hold_out = ""
        if split == "validation" and not inputs.validation:
            # A tenth more: the text of another end has another number of tokens.
            enough = 1.1 * spec.data.validation_fraction * needed / max(1, tokens)
            value = f"set data.validation_fraction={enough:.2g}" if enough < 0.5 else "raise data.validation_fraction"
            hold_out = f"{value}, "
        short = f"the {split} data is shorter than one block"
        return DataError(
            short if tokens else f"the {split} data holds no text but white space",
            got=f"{tokens} tokens",
            allowed=f"at least {needed}: data.sequence_length {self.beside_block}",
            do=f"{hold_out}lower data.sequence_length, or give more text in data.{split}",
        )

    def shapes(self, path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
        """See `SampleForm`: the end of the stream that fills no block."""
        split: Split = "train" if meta["train_samples"] else "validation"
        used = self.stream(meta[f"{split}_samples"], meta["sequence_length"])
        return {"left_over_tokens": stored_tokens(path, split, meta) - used}

    def look(self, inputs: Inputs, examples: Documents) -> DataLook:
        """See `SampleForm`."""
        spec, (train, validation) = inputs.spec, examples
        size, held = _bytes(train), _bytes(validation)
        is_whole = is_little(size + held)
        most = new_tokenizer.BPE_SAMPLE_BYTES if is_whole else new_tokenizer.LOOK_SAMPLE_BYTES
        tokenizer = inputs.tokenizer or self.train_tokenizer(spec, examples, most_bytes=most)
        bias = 0.0 if inputs.tokenizer or is_whole else NEW_TOKENIZER_ERROR
        count = _Counter(self.encoder(spec, tokenizer), tokenizer)
        if is_whole:
            stream, held_stream = exactly(count.whole(train)), count.whole(validation)
        else:
            a_byte = _tokens_of_a_byte(train if inputs.train else validation, spec, count, bias)
            stream = Interval(**{end: round(value * size) for end, value in asdict(a_byte).items()})
            held_stream = round(a_byte.mid * held)
        length = spec.data.sequence_length
        samples, held_samples = self.blocks(int(stream.mid), length), self.blocks(held_stream, length)
        last = int(stream.mid) - self.stream(samples, length)
        if not inputs.train:
            samples, last = 0, held_stream - self.stream(held_samples, length)
        counts = DatasetCounts(
            train_samples=samples,
            train_tokens=samples * length,
            validation_samples=held_samples,
            validation_tokens=None if inputs.train else held_samples * length,
            vocab_size=tokenizer.vocab_size if inputs.tokenizer or is_whole else spec.model.vocab_size,
            left_over_tokens=last if is_whole else 0,
        )
        notes, documents = notes_of(examples), len(train.numbers)
        account = account_of(_not_blank(train), _not_blank(validation), examples=documents, size=size)
        return DataLook(
            unit=self.unit,
            train_examples=documents,
            validation_examples=len(validation.numbers),
            train_bytes=size,
            validation_bytes=held,
            held_out=account.result(self.unit, asked=inputs.asked, notes=notes),
            columns=inputs.columns,
            classes=None,
            train_tokens=(
                exactly(counts.train_tokens or held_samples * length) if is_whole or not inputs.train else stream
            ),
            counted=inputs.is_exact and is_whole,
            counts=counts,
            notes=(*inputs.notes, *notes),
        )


def notes_of(documents: Documents) -> tuple[str, ...]:
    """What a reader of the data may not expect, each once."""
    return tuple(dict.fromkeys(note for chosen in documents for note in chosen.documents.notes))


def _not_blank(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())


def drawn_documents(train: Chosen, seed: int, most_bytes: int) -> Chosen:
    """All documents, or as many drawn by the seed as it takes to hold so many bytes."""
    drawn = np.random.default_rng(seed).permutation(train.numbers)
    before = np.cumsum(train.documents.sizes[drawn]) - train.documents.sizes[drawn]
    return replace(train, numbers=np.sort(drawn[before < most_bytes]))


# -- tokens of documents, counted or estimated -------------------------------------------------------------------------


def _bytes(chosen: Chosen) -> int:
    """Of the documents, or of their part that is meant."""
    total = int(chosen.documents.sizes[chosen.numbers].sum())
    if chosen.cut is None:
        return total
    whole = int(chosen.documents.sizes[chosen.cut.number])
    return total - round(whole * (1 - chosen.cut.share if chosen.end else chosen.cut.share))


class _Counter:
    """Tokens of texts as `write` makes them."""

    def __init__(self, encode: Callable[[Chunk], np.ndarray], tokenizer: TextTokenizer) -> None:
        self._encode, self._cuts = encode, tokenizer.cuts

    def whole(self, texts: Chosen) -> int:
        """Of the whole stream of documents, with what stands between them."""
        chunks = tokenization.document_chunks(_not_blank(texts), cuts=self._cuts)
        return sum(len(self._encode(chunk)) for chunk in chunks)

    def piece(self, text: str, *, ends: bool) -> int:
        """Of a piece, with what stands after a document where it ends one."""
        return len(self._encode(Chunk(texts=(text,), ends=(ends,))))


def _tokens_of_a_byte(train: Chosen, spec: RunSpec, count: _Counter, bias: float) -> Interval:
    """From pieces of documents drawn by the seed. A packed file's bytes are those on disk."""
    drawn = drawn_documents(train, spec.data.split_seed, 2 * SAMPLE_BYTES)
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
