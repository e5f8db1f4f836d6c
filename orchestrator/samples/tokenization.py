"""Texts -> token ids: a tokenizer as plain values, and the encoding of chunks of text anywhere.

`TextTokenizer` is what the rest works with: a tokenizer as a JSON text, its special ids, and the files that let
`transformers.AutoTokenizer` load it. `encode_documents` and `encode_rows` are pure and pickle, so that they run in
this process or in a Ray task alike; neither imports transformers but for a tokenizer that only transformers can run.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from orchestrator.errors import ModelError

CHUNK_BYTES = 500_000
"""Text of one encoding task: about 0.4 s of one core, so that a task's start (1 to 2 ms) does not count."""
PIECE_BYTES = 50_000
"""Longer documents are cut at about this length, so that the threads of one process share a document too."""

Side = Literal["left", "right"]
Cut = Literal["words and lines", "words", "spaces", "nowhere"]
"""Where a long document may be cut so that its tokens stay the same; see `CUTS`."""

CUTS: Mapping[Cut, tuple[re.Pattern[str] | None, int]] = {
    # Before a space, or between two lines: common pre-tokenizers (GPT-2's, Llama 3's, BERT's) split there too.
    "words and lines": (re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)"), 0),
    # SentencePiece's marker of a word is its space; a line begins no word.
    "words": (re.compile(r"(?<=\S)(?= )"), 0),
    # Where the marker is put before every text, it stands for the space that is left out here.
    "spaces": (re.compile(r"(?<=\S) (?=\S)"), 1),
    "nowhere": (None, 0),
}
"""A pattern that matches where the next piece may begin, and how many characters of it are left out there."""


SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens by name, in the order in which transformers adds those that a vocabulary lacks."""


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer that only `transformers` can run: the files that `AutoTokenizer` loads, by name."""

    files: tuple[tuple[str, bytes], ...]


Encoder = str | StoredTokenizer
"""What encodes: `tokenizers`' own JSON, or files for transformers."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer as plain values."""

    json: str
    """`tokenizers`' own form, with truncation and padding switched off; empty where only transformers can encode."""
    files: dict[str, bytes]
    """Name to content of what `AutoTokenizer` needs."""
    vocab_size: int
    """Highest id plus one."""
    eos_id: int | None
    """End of a document; some encoders have none."""
    pad_id: int
    """Fills a batch; masked, so any id will do where the tokenizer names none."""
    mask_id: int | None
    """Hides a token from a masked language model; decoders have none."""
    cls_id: int | None
    """Begins a text for an encoder."""
    sep_id: int | None
    """Ends a text for an encoder, and parts of it."""
    special_ids: tuple[int, ...]
    """Ids that stand for no text, those above among them."""
    before: tuple[int, ...] = ()
    """What the tokenizer's own template puts before a text."""
    after: tuple[int, ...] = ()
    """What it puts after one."""
    cuts: Cut = "words and lines"
    """Where long documents may be cut."""
    truncation_side: Side = "right"
    """The end of a text that is cut off where it is too long."""

    @property
    def encoder(self) -> Encoder:
        """What `encode_documents` and `encode_rows` take."""
        return self.json or StoredTokenizer(tuple(sorted(self.files.items())))

    def save(self, folder: Path) -> None:
        """Writes the files into a folder, which it creates."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def fingerprint(self) -> str:
        """Changes with anything that changes ids or the saved files."""
        parts = [self.json.encode(), *itertools.chain(*((n.encode(), self.files[n]) for n in sorted(self.files)))]
        ids = f"{self.eos_id},{self.pad_id},{self.before},{self.after},{self.cuts},{self.truncation_side}"
        return hashlib.sha256(b"\0".join(parts) + ids.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Texts that one task encodes."""

    texts: tuple[str, ...]
    ends: tuple[bool, ...]
    """Whether each text ends its document; False for a piece that the next text goes on from."""
    goes_on: bool = False
    """Whether the first text goes on from the last one of the chunk before."""


def from_files(files: dict[str, bytes], config: dict[str, Any], location: str) -> TextTokenizer:
    """The tokenizer of a tokenizer.json as it stands, without transformers: exact for one that was trained here, and
    near enough to count tokens with that of a base model, whose other files may change it.

    `config` is the model's; `location` names it in messages. Raises ModelError when a file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # The Rust side raises Exception itself.
        raise ModelError(f"the tokenizer.json of {location} cannot be read", got=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = {**read_object(files, "special_tokens_map.json", location)}
    named |= read_object(files, "tokenizer_config.json", location)
    added = _added_ids(tokenizer, {**read_object(files, "added_tokens.json", location)}, named)
    ids = {name: _named_id(tokenizer, named.get(f"{name}_token"), added) for name in SPECIAL}
    known = {i: token for token, i in added.items()}
    eos_id, pad_id = (
        first_id(ids[name], config.get(f"{name}_token_id"), known=lambda i: known.get(i) or tokenizer.id_to_token(i))
        for name in ("eos", "pad")
    )
    pad_id = eos_id if pad_id is None else pad_id
    return TextTokenizer(
        json=tokenizer.to_str(),
        files=files,
        vocab_size=1 + max(highest_id(tokenizer), *added.values(), -1),
        eos_id=eos_id,
        pad_id=0 if pad_id is None else pad_id,
        mask_id=ids["mask"],
        cls_id=ids["cls"],
        sep_id=ids["sep"],
        special_ids=special_tokens(tokenizer),
    )


def encode_documents(
    chunk: Chunk, *, tokenizer: Encoder, before: Sequence[int] = (), after: Sequence[int] = ()
) -> np.ndarray:
    """Ids of all texts in one array: `before` each one that begins its document, `after` each one that ends it, and no
    other special token.

    `tokenizer` is `TextTokenizer.encoder`; the result is uint16 where the vocabulary allows, else uint32.
    """
    encoding = _loaded(tokenizer)
    ids: list[int] = []
    begins = not chunk.goes_on
    for row, ends in zip(encoding.encode(list(chunk.texts), special=False), chunk.ends, strict=True):
        if begins:
            ids.extend(before)
        ids.extend(row)
        if ends:
            ids.extend(after)
        begins = ends
    return np.array(ids, dtype=token_dtype(encoding.vocab_size))


def encode_rows(
    chunk: Chunk, *, tokenizer: Encoder, sequence_length: int, pad_id: int, side: Side = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all texts in one array, int32 length of each), with special tokens, each cut to `sequence_length`.

    The cut falls inside the text, so special tokens stay; `side` is that of `TextTokenizer.truncation_side`. A text
    without a token becomes one `pad_id`.
    """
    encoding = _loaded(tokenizer, sequence_length, side)
    rows = [row or [pad_id] for row in encoding.encode(list(chunk.texts), special=True)]
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return np.array(list(itertools.chain.from_iterable(rows)), dtype=token_dtype(encoding.vocab_size)), lengths


def locate_tokens(
    texts: Sequence[str], borders: Sequence[Sequence[int]], *, tokenizer: Encoder
) -> list[tuple[list[int], list[int]]]:
    """(ids, the character at which each token begins) of each text, without special tokens that stand in none.

    `borders` are places in each text that matter: a tokenizer that only transformers can run does not say where tokens
    lie, so each piece between them is encoded alone, and its tokens are said to begin where it does.
    """
    return _loaded(tokenizer).locate(texts, borders)


def count_tokens(text: str, *, tokenizer: Encoder) -> int:
    """How many ids a text gets, without special tokens."""
    return len(_loaded(tokenizer).encode([text], special=False)[0])


def end_of_tokens(text: str, count: int, *, tokenizer: Encoder) -> int:
    """Characters of a text up to the end of its first `count` tokens; all of them where it has no more than these.

    Exact to the character where `tokenizers` says where tokens lie; a tokenizer that only transformers can run does
    not, and there it is the longest beginning of the text that has no more tokens than that.
    """
    return _loaded(tokenizer).end_of(text, count)


def document_chunks(texts: Iterable[str], *, cuts: Cut = "words and lines") -> Iterator[Chunk]:
    """Documents in chunks of about `CHUNK_BYTES`; long ones are cut between words, so that cores share them."""
    return _chunks((piece, last) for text in texts for piece, last in pieces(text, cuts))


def row_chunks(texts: Iterable[str]) -> Iterator[Chunk]:
    """Rows in chunks of about `CHUNK_BYTES`."""
    return _chunks((text, True) for text in texts)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smaller of the two types that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _chunks(parts: Iterable[tuple[str, bool]]) -> Iterator[Chunk]:
    held: list[tuple[str, bool]] = []
    size, goes_on = 0, False
    for text, ends in parts:
        held.append((text, ends))
        size += len(text)
        if size >= CHUNK_BYTES:
            yield _chunk(held, goes_on)
            held, size, goes_on = [], 0, not ends
    if held:
        yield _chunk(held, goes_on)


def _chunk(held: list[tuple[str, bool]], goes_on: bool) -> Chunk:
    return Chunk(texts=tuple(t for t, _ in held), ends=tuple(e for _, e in held), goes_on=goes_on)


def pieces(text: str, cuts: Cut) -> Iterator[tuple[str, bool]]:
    """(piece, whether the document ends with it); a text with no place to cut stays whole."""
    pattern, left_out = CUTS[cuts]
    start = 0
    while pattern and len(text) - start > 2 * PIECE_BYTES and (cut := pattern.search(text, start + PIECE_BYTES)):
        yield text[start : cut.start()], False
        start = cut.start() + left_out
    yield text[start:], True


class _Encoding(Protocol):
    """A tokenizer that is ready in this process."""

    vocab_size: int

    def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Ids of each text, within the template's special tokens or without them."""
        ...

    def locate(self, texts: Sequence[str], borders: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
        """See `locate_tokens`."""
        ...

    def end_of(self, text: str, count: int) -> int:
        """See `end_of_tokens`."""
        ...


@functools.lru_cache(maxsize=4)
def _loaded(tokenizer: Encoder, cut: int | None = None, side: Side = "right") -> _Encoding:
    """The tokenizer, once per process: parsing a vocabulary of 50,000 takes 0.1 s."""
    return _Parsed(tokenizer, cut, side) if isinstance(tokenizer, str) else _Slow(tokenizer, cut, side)


class _Parsed:
    def __init__(self, text: str, cut: int | None, side: Side) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(text)
        if cut is not None:
            self._tokenizer.enable_truncation(cut, direction=side)
        self.vocab_size = highest_id(self._tokenizer) + 1

    def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [encoding.ids for encoding in found]

    def locate(self, texts: Sequence[str], borders: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [begin for begin, _ in encoding.offsets]) for encoding in found]

    def end_of(self, text: str, count: int) -> int:
        ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        return len(text) if count >= len(ends) else max(ends[:count], default=0)


class _Slow:
    def __init__(self, stored: StoredTokenizer, cut: int | None, side: Side) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as place:
            for name, content in stored.files:
                (Path(place) / name).write_bytes(content)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        self._tokenizer.truncation_side = side
        self._cut = cut
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        cut = {} if self._cut is None else {"truncation": True, "max_length": self._cut}
        return [self._tokenizer(text, add_special_tokens=special, **cut)["input_ids"] for text in texts]

    def locate(self, texts: Sequence[str], borders: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
        return [self._located(text, places) for text, places in zip(texts, borders, strict=True)]

    def _located(self, text: str, borders: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        begins: list[int] = []
        for begin, end in itertools.pairwise(sorted({0, *borders, len(text)})):
            found = self.encode([text[begin:end]], special=False)[0]
            ids += found
            begins += [begin] * len(found)
        return ids, begins

    def end_of(self, text: str, count: int) -> int:
        def has_more(characters: int) -> bool:
            return len(self.encode([text[:characters]], special=False)[0]) > count

        return bisect.bisect_left(range(1, len(text) + 1), True, key=has_more)


def highest_id(tokenizer: Any) -> int:
    """Of any entry of a `tokenizers.Tokenizer`; added tokens may lie beyond the count of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of a `tokenizers.Tokenizer` that stand for no text."""
    return tuple(i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special)


def first_id(*candidates: Any, known: Any) -> int | None:
    """The first candidate that is the id of an entry, or a list that begins with one; `known(id)` gives the entry."""
    for candidate in candidates:
        one = candidate[0] if isinstance(candidate, list) and candidate else candidate
        if isinstance(one, int) and known(one) is not None:
            return one
    return None


def read_object(files: Mapping[str, bytes], name: str, location: str) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is no such file. Raises ModelError for anything else."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"the {name} of {location} is not valid JSON", got=str(error)) from error
    return found if isinstance(found, dict) else {}


def text_of(named: Any) -> Any:
    """The text of a special token, as the tokenizer's files give it: plain or as an object."""
    return named.get("content") if isinstance(named, dict) else named


def _named_id(tokenizer: Any, named: Any, added: Mapping[str, int]) -> int | None:
    text = text_of(named)
    if not isinstance(text, str):
        return None
    found: int | None = tokenizer.token_to_id(text)
    return added.get(text, found)


def _added_ids(tokenizer: Any, listed: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, int]:
    """Entries that other files add to a tokenizer.json, with the ids that transformers gives them."""
    decoder = named.get("added_tokens_decoder")
    found = {str(token): i for token, i in listed.items() if isinstance(i, int)}
    if isinstance(decoder, dict):
        found |= {str(text_of(token)): int(i) for i, token in decoder.items() if str(i).isdigit()}
    found = {token: i for token, i in found.items() if tokenizer.token_to_id(token) is None}
    for name in SPECIAL:
        text = text_of(named.get(f"{name}_token"))
        if isinstance(text, str) and text not in found and tokenizer.token_to_id(text) is None:
            found[text] = 1 + max(highest_id(tokenizer), *found.values(), -1)
    return found
