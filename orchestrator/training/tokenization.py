"""Texts -> token ids. Finds or trains the tokenizer, and encodes chunks of text anywhere.

`TextTokenizer` is what the rest works with: a tokenizer as a JSON text, its special ids, and the files that let
`transformers.AutoTokenizer` load it. `encode_documents` and `encode_rows` are pure and pickle, so that they run in
this process or in a Ray task alike; neither imports transformers.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import locations
from orchestrator.errors import ModelError
from orchestrator.spec import ModelSpec

END_OF_TEXT = "<|endoftext|>"
BPE_SAMPLE_BYTES = 20_000_000
"""Text that a new tokenizer is trained on at most: about 10 s on two cores. That more would not help is a guess."""
ENCODER_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""Special tokens of an encoder's tokenizer, with the names and in the order of RoBERTa's (Liu et al. 2019)."""
BYTES = 256
"""Entries that a byte-level BPE cannot do without, beside its special tokens."""
CHUNK_BYTES = 500_000
"""Text of one encoding task: about 0.4 s of one core, so that a task's start (1 to 2 ms) does not count."""
PIECE_BYTES = 50_000
"""Longer documents are cut at about this length, so that the threads of one process share a document too."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
# Before a space, or between two lines: common pre-tokenizers (GPT-2's, Llama 3's, BERT's) split there too, so that the
# tokens are the same with and without the cut. SentencePiece's may add one space marker there.
_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)")


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer as plain values."""

    json: str
    """`tokenizers`' own form, with truncation and padding switched off."""
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

    def save(self, folder: Path) -> None:
        """Writes the files into a folder, which it creates."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def fingerprint(self) -> str:
        """Changes with anything that changes ids or the saved files."""
        parts = [self.json.encode(), *itertools.chain(*((n.encode(), self.files[n]) for n in sorted(self.files)))]
        return hashlib.sha256(b"\0".join(parts) + f"{self.eos_id},{self.pad_id}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Texts that one task encodes."""

    texts: tuple[str, ...]
    ends: tuple[bool, ...]
    """Whether each text ends its document; False for a piece that the next text goes on from."""


def tokenizer_location(model: ModelSpec) -> str | None:
    """Where the tokenizer comes from, as the spec says it; None means one trained on the corpus."""
    return model.base if model.tokenizer == "auto" else model.tokenizer


def load_tokenizer(location: str) -> TextTokenizer:
    """The tokenizer in a folder, a package or on the hub; transformers is imported only without a tokenizer.json.

    Raises ModelError when there is none.
    """
    folder = _folder(location)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        files = _converted(folder, location)
    config = {"config.json": (folder / "config.json").read_bytes()} if (folder / "config.json").is_file() else {}
    return _from_files(files, _object(config, "config.json", location), location)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, sequence_length: int, for_encoder: bool = False
) -> TextTokenizer:
    """A byte-level BPE (Radford et al. 2019) of the first `BPE_SAMPLE_BYTES` of texts; equal for equal texts.

    That of a decoder has one special token, the end of a text; that of an encoder has `ENCODER_TOKENS`, and puts texts
    between the first and the last. Small corpora give fewer entries than asked for. Raises ModelError when `vocab_size`
    has no room for every byte and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    named = (
        ENCODER_TOKENS
        if for_encoder
        else dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    )
    special = list(dict.fromkeys(named.values()))
    if vocab_size < BYTES + len(special):
        raise ModelError(
            "the tokenizer's vocabulary is too small",
            got=f"model.vocab_size={vocab_size}",
            allowed=f"at least {BYTES + len(special)}: {BYTES} bytes and {', '.join(special)}",
            do="set model.vocab_size=8192",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    if for_encoder:
        tokenizer.post_processor = _between_special_tokens(tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sequence_length, **named}
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}
    return _from_files({name: text.encode() for name, text in files.items()}, {}, "a tokenizer of the corpus")


def _between_special_tokens(tokenizer: Any) -> Any:
    """What puts the special tokens around a text, or around two, as RoBERTa's tokenizer does."""
    from tokenizers import processors

    first, last = ENCODER_TOKENS["cls_token"], ENCODER_TOKENS["sep_token"]
    return processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )


def encode_documents(chunk: Chunk, *, tokenizer: str, eos_id: int) -> np.ndarray:
    """Ids of all texts in one array, with `eos_id` after each one that ends its document, and no other special token.

    `tokenizer` is `TextTokenizer.json`; the result is uint16 where the vocabulary allows, else uint32.
    """
    parsed, dtype = _parse(tokenizer)
    encodings = parsed.encode_batch_fast(list(chunk.texts), add_special_tokens=False)
    ids: list[int] = []
    for encoding, ends in zip(encodings, chunk.ends, strict=True):
        ids.extend(encoding.ids)
        if ends:
            ids.append(eos_id)
    return np.array(ids, dtype=dtype)


def encode_rows(chunk: Chunk, *, tokenizer: str, sequence_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all texts in one array, int32 length of each), with special tokens, each cut to `sequence_length`.

    The cut falls inside the text, so a final special token stays. A text without a token becomes one `pad_id`.
    """
    parsed, dtype = _parse(tokenizer, sequence_length)
    rows = [encoding.ids or [pad_id] for encoding in parsed.encode_batch_fast(list(chunk.texts))]
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return np.array(list(itertools.chain.from_iterable(rows)), dtype=dtype), lengths


def document_chunks(texts: Iterable[str]) -> Iterator[Chunk]:
    """Documents in chunks of about `CHUNK_BYTES`; long ones are cut between words, so that cores share them."""
    return _chunks((piece, last) for text in texts for piece, last in _pieces(text))


def row_chunks(texts: Iterable[str]) -> Iterator[Chunk]:
    """Rows in chunks of about `CHUNK_BYTES`."""
    return _chunks((text, True) for text in texts)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smaller of the two types that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _chunks(pieces: Iterable[tuple[str, bool]]) -> Iterator[Chunk]:
    held: list[tuple[str, bool]] = []
    size = 0
    for text, ends in pieces:
        held.append((text, ends))
        size += len(text)
        if size >= CHUNK_BYTES:
            yield Chunk(texts=tuple(t for t, _ in held), ends=tuple(e for _, e in held))
            held, size = [], 0
    if held:
        yield Chunk(texts=tuple(t for t, _ in held), ends=tuple(e for _, e in held))


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether the document ends with it); a text with no place to cut stays whole."""
    start = 0
    while len(text) - start > 2 * PIECE_BYTES and (cut := _CUT.search(text, start + PIECE_BYTES)):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = BPE_SAMPLE_BYTES
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


@functools.lru_cache(maxsize=4)
def _parse(tokenizer: str, cut: int | None = None) -> tuple[Any, type[np.uint16] | type[np.uint32]]:
    """The tokenizer, once per process: parsing a vocabulary of 50,000 takes 0.1 s."""
    from tokenizers import Tokenizer

    parsed = Tokenizer.from_str(tokenizer)
    if cut is not None:
        parsed.enable_truncation(cut)
    return parsed, token_dtype(_vocab_size(parsed))


def _vocab_size(tokenizer: Any) -> int:
    # Added tokens may lie beyond the count of entries.
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _from_files(files: dict[str, bytes], config: dict[str, Any], location: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # The Rust side raises Exception itself.
        raise ModelError(f"the tokenizer.json of {location} cannot be read", got=str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = {**_object(files, "special_tokens_map.json", location), **_object(files, "tokenizer_config.json", location)}
    eos_id = _special_id(tokenizer, named.get("eos_token"), config.get("eos_token_id"))
    pad_id = _special_id(tokenizer, named.get("pad_token"), config.get("pad_token_id"))
    if pad_id is None:
        pad_id = 0 if eos_id is None else eos_id
    return TextTokenizer(
        json=tokenizer.to_str(),
        files=files,
        vocab_size=_vocab_size(tokenizer),
        eos_id=eos_id,
        pad_id=pad_id,
        mask_id=_special_id(tokenizer, named.get("mask_token"), None),
        cls_id=_special_id(tokenizer, named.get("cls_token"), None),
        sep_id=_special_id(tokenizer, named.get("sep_token"), None),
        special_ids=tuple(i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special),
    )


def _special_id(tokenizer: Any, named: Any, configured: Any) -> int | None:
    """The id of a special token, by its name in the tokenizer's files, else by the model's config."""
    text = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if found is not None:
        return int(found)
    first = configured[0] if isinstance(configured, list) and configured else configured
    return first if isinstance(first, int) and tokenizer.id_to_token(first) is not None else None


def _folder(location: str) -> Path:
    """The folder of a tokenizer; a hub name is downloaded unless it was before."""
    path = Path(locations.resolve(location))
    if path.is_dir():
        return path
    if path.is_file() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", location):
        raise ModelError(
            f"{location} is no folder with a tokenizer", got=path, do="set model.tokenizer to a folder or a hub name"
        )
    import huggingface_hub

    wanted = [*TOKENIZER_FILES, "config.json"]
    try:
        try:
            folder = huggingface_hub.snapshot_download(location, allow_patterns=wanted, local_files_only=True)
        except huggingface_hub.errors.LocalEntryNotFoundError:
            folder = huggingface_hub.snapshot_download(location, allow_patterns=wanted)
    except Exception as error:  # The hub's HTTP client, and so the kind of a lost connection, differs by version.
        raise ModelError(
            f"{location} is neither a local folder nor a model the hub gave",
            got=" ".join(str(error).split()),
            do="check path, name and connection",
        ) from error
    return Path(folder)


def _converted(folder: Path, location: str) -> dict[str, bytes]:
    """The files of a tokenizer in an older form, as `transformers` writes them anew."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        with tempfile.TemporaryDirectory() as place:
            tokenizer.save_pretrained(place)
            files = {file.name: file.read_bytes() for file in Path(place).iterdir() if file.is_file()}
    except Exception as error:  # Its loaders raise ValueError, OSError, ImportError and their dependencies' kinds.
        raise ModelError(
            f"{location} holds no tokenizer that transformers can load",
            got=" ".join(str(error).split()),
            do="set model.tokenizer to a folder or hub name with a tokenizer.json",
        ) from error
    if "tokenizer.json" not in files:
        raise ModelError(f"{location} has no fast tokenizer", do="set model.tokenizer to one with a tokenizer.json")
    return files


def _object(files: dict[str, bytes], name: str, location: str) -> dict[str, Any]:
    """The JSON object in a file, or an empty one where there is no such file."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"the {name} of {location} is not valid JSON", got=str(error)) from error
    return found if isinstance(found, dict) else {}
