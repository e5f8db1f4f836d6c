"""How far a dataset lies from what a base model was trained on: bits per byte where the model is at hand, else a proxy.

Bits per byte do not depend on the vocabulary, so that models compare (Gao et al. 2020 score the Pile with them). They
do depend on the text: short ones have little context. So the reference is cut to the length of the data's texts, and
it is prose written for this purpose, because passages that everybody knows are in every model's memory.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator import locations
from orchestrator.errors import DataError, ModelError, one_line
from orchestrator.facts.domains import Domain
from orchestrator.samples.base_tokenizer import VOCABULARY_FILES, load_tokenizer
from orchestrator.samples.tokenization import TextTokenizer, from_files, read_object

Method = Literal["bits-per-byte", "fertility proxy", "compression proxy"]

SAMPLE_BYTES = 16_000
"""Text that a model reads of the data, and at most of the reference: about 4,000 tokens, 20 s of one core for 135M
parameters (estimated: 2 FLOPs a parameter and token at 50 GFLOP/s)."""
PROXY_SAMPLE_BYTES = 200_000
"""Text that a proxy reads of the data: 0.1 s."""
TEXT_BYTES = 2_000
"""Start of a text that is looked at; more texts tell more than longer ones."""
TOKENS_TOGETHER = 512
"""Tokens that a model reads at a time, about those of a long text: short ones one by one would each wait for all
weights to pass through a core (24 texts of 20 tokens and 135M parameters took a seventh of the time, measured)."""
SHORTEST_REFERENCE = 40
"""Bytes of the shortest piece that the reference is cut into: half a sentence."""
LARGEST_ON_CPU_BYTES = 4_000_000_000
"""Weights on disk up to which a model is asked without a GPU: 2B parameters in 16 bits, some 5 minutes. A guess at
what a person waits for."""

NEAR_BITS, FAR_BITS = 1.25, 1.5
"""Bits per byte over those on the model's own kind of text from which data is near, and far. A guess between GPT-2's
published 1.16 bits on Wikipedia's markup (enwik8) against about 1 on prose, and what models trained here on Python
source for a minute need against their own text: more of it 1.1 times, technical notes 1.4, movie reviews 1.55, medical
prose 1.85, German 2.3, tables of numbers 2.6."""
NEAR_SPLIT, FAR_SPLIT = 0.05, 0.25
"""Share of words that the tokenizer splits, above that of the reference. A guess; measured with MiniLM's: licences
0.03, movie reviews 0.08, technical notes 0.13, Python source 0.20, medical prose 0.47, German 0.58."""
NEAR_GAIN, FAR_GAIN = 0.7, 0.2
"""What the reference helps to compress the data, over what it helps to compress more of itself. A guess; measured:
movie reviews 0.5, technical notes 0.5, licences 0.4, Python source 0.3, medical prose 0.1, German below 0."""
UNFAMILIAR_BITS = 2.0
"""A model that needs more for plain English was not trained on it: xz, which learns as it reads, needs as much for the
100 MB of enwik8."""
OWN_SPLIT = 0.1
"""Share of words of its own kind of text that a vocabulary splits at most; a guess, for 8,000 entries and more."""

_WORD = re.compile(r"[^\W\d_]+")
_PIECE_BYTES = 2_000
"""Text compressed at a time, with the reference before it: small, so that the piece has little to refer to itself."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far data lies from a base model's training text, and how that was found."""

    kind: Domain
    method: Method
    """`bits-per-byte` is a measurement of the model; the others are proxies."""
    reason: str
    """One sentence with the figures."""
    bits_per_byte: float | None = None
    """On the data: of the model, or of a compressor that knows the reference; None for the fertility proxy."""
    reference_bits_per_byte: float | None = None
    """The same on the model's own kind of text."""


def measure_distance(texts: Sequence[str], base: str | None, *, seed: int = 0) -> Distance:
    """The distance of some texts from a base model: a folder, `package://NAME/path`, or a hub name.

    Nothing is downloaded: a hub name counts as at hand when it was downloaded before. Raises DataError when the texts
    are empty, and ModelError when a model at hand cannot be loaded.
    """
    filled = [text for text in texts if text.strip()]
    if not filled:
        raise DataError("there is no text to compare with the base model", got=f"{len(texts)} empty texts")
    folder = None if base is None else _at_hand(base)
    tokenizer = None if base is None else find_tokenizer(base)
    if folder is None or tokenizer is None:
        about = "no base model is given" if base is None else f"no tokenizer of {base} is on this machine"
        return compression_distance(_draw(filled, PROXY_SAMPLE_BYTES, seed), why=about)
    why = _why_not_asked(folder)
    if why is None:
        return bits_per_byte_distance(_draw(filled, SAMPLE_BYTES, seed), folder, tokenizer, seed=seed)
    return fertility_distance(_draw(filled, PROXY_SAMPLE_BYTES, seed), tokenizer, why=f"{base} {why}")


def find_tokenizer(base: str) -> TextTokenizer | None:
    """A base model's tokenizer to count tokens with, or None where none is on this machine that runs without
    transformers.

    A tokenizer.json is taken as it stands, which spares transformers' import. Raises ModelError when there is a
    tokenizer that cannot be read.
    """
    folder = _at_hand(base)
    if folder is None or not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    if not (folder / "tokenizer.json").is_file():
        found = load_tokenizer(str(folder))
        return found if found.json else None
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return from_files(files, read_object(files, "config.json", base), base)


def reference_text() -> str:
    """6.5 kB of plain English prose of several kinds, written for this project."""
    return Path(__file__).with_name("reference-english.txt").read_text(encoding="utf-8")


def compression_distance(texts: Sequence[str], *, why: str) -> Distance:
    """How unlike plain English texts are, the likely training text of an unknown base, by a compressor.

    zlib reads each piece alone and after the reference; what it saves is compared with what it saves on pieces of the
    reference itself after the rest of it.
    """
    reference = reference_text().encode()
    own = _pieces(reference)
    pieces = _pieces("\n".join(texts).encode(errors="surrogatepass"))
    alone, after = _compressed(pieces, b""), _compressed(pieces, reference)
    own_alone = _compressed(own, b"")
    own_after = statistics.fmean(_compressed([piece], reference.replace(piece, b"")) for piece in own)
    gain = (1 - after / alone) / (1 - own_after / own_alone)
    return Distance(
        kind="same" if gain >= NEAR_GAIN else "near" if gain >= FAR_GAIN else "far",
        method="compression proxy",
        reason=f"{why}: plain English helps to compress the data {max(0.0, gain):.0%} as much as it helps itself",
        bits_per_byte=after,
        reference_bits_per_byte=own_after,
    )


def fertility_distance(texts: Sequence[str], tokenizer: TextTokenizer, *, why: str) -> Distance:
    """How often a base model's tokenizer splits the data's words, against plain English."""
    split = split_words(texts, tokenizer)
    reference = min(split_words([reference_text()], tokenizer), OWN_SPLIT)
    excess = split - reference
    return Distance(
        kind="same" if excess < NEAR_SPLIT else "near" if excess < FAR_SPLIT else "far",
        method="fertility proxy",
        reason=f"{why}: its tokenizer splits {split:.0%} of the data's words, and {reference:.0%} of its own kind",
    )


def split_words(texts: Sequence[str], tokenizer: TextTokenizer) -> float:
    """Share 0..1 of words that become more than one token; 1 for texts without a word."""
    words = [word for text in texts for word in _WORD.findall(text)]
    distinct = sorted(set(words))
    encodings = _parsed(tokenizer).encode_batch([f" {word}" for word in distinct], add_special_tokens=False)
    whole = {word for word, encoding in zip(distinct, encodings, strict=True) if len(encoding.ids) == 1}
    return sum(word not in whole for word in words) / len(words) if words else 1.0


def bits_per_byte_distance(texts: Sequence[str], folder: Path, tokenizer: TextTokenizer, *, seed: int) -> Distance:
    """Bits per byte of a causal language model on texts, against those on its own kind of text.

    That is plain English, or what the model writes itself when it does not know English: a model's text has, as far
    as the model is calibrated, the entropy of what it was trained on.
    """
    model = _load(folder)
    found = bits_per_byte(texts, model, tokenizer)
    length = round(statistics.median(len(text.encode(errors="surrogatepass")) for text in texts))
    pieces = _pieces(reference_text().encode(), max(SHORTEST_REFERENCE, length))
    reference = bits_per_byte([piece.decode(errors="ignore") for piece in pieces], model, tokenizer)
    own = "plain English"
    if reference > UNFAMILIAR_BITS:
        written = _write(model, tokenizer, count=max(4, SAMPLE_BYTES // length), length=length, seed=seed)
        own, reference = "text it writes itself", min(reference, bits_per_byte(written, model, tokenizer))
    times = found / reference
    return Distance(
        kind="same" if times < NEAR_BITS else "near" if times < FAR_BITS else "far",
        method="bits-per-byte",
        reason=f"the base model needs {found:.2f} bits a byte for the data and {reference:.2f} for {own}: "
        f"{times:.2f} times",
        bits_per_byte=found,
        reference_bits_per_byte=reference,
    )


def bits_per_byte(texts: Sequence[str], model: Any, tokenizer: TextTokenizer) -> float:
    """Mean information of a UTF-8 byte under a causal language model that sees each text alone, up to its context."""
    import torch

    parsed = _parsed(tokenizer)
    start = _start_id(model, tokenizer)
    window = min(int(getattr(model.config, "max_position_embeddings", 0) or TEXT_BYTES), TEXT_BYTES)
    rows: list[list[int]] = []
    size = 0
    for text in texts:
        encoding = parsed.encode(text, add_special_tokens=False)
        ids = encoding.ids[: window - 1]
        if ids:
            rows.append([start, *ids])
            size += len(text[: encoding.offsets[len(ids) - 1][1]].encode(errors="surrogatepass"))
    if not size:
        raise DataError("the base model's tokenizer makes no tokens of the texts", got=f"{len(texts)} texts")
    nats = 0.0
    for batch in _batches(rows):
        longest = len(batch[-1])
        # What stands behind a text changes nothing before it, and counts as no token of it.
        ids_of = torch.tensor([[*row, *[start] * (longest - len(row))] for row in batch], device=model.device)
        lengths = torch.tensor([[len(row)] for row in batch], device=model.device)
        real = torch.arange(1, longest, device=model.device) < lengths
        with torch.inference_mode():
            logits = model(input_ids=ids_of).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_of[:, 1:].flatten(), reduction="none")
        nats += float(each[real.flatten()].double().sum())
    return nats / math.log(2) / size


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Rows alike in length, at most so many tokens together; a longer one alone."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > TOKENS_TOGETHER:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _write(model: Any, tokenizer: TextTokenizer, *, count: int, length: int, seed: int) -> list[str]:
    """Texts drawn from the model itself, of about `length` bytes."""
    import torch

    tokens = max(8, min(length // 4, 256))  # about 4 bytes a token
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        rows = last = torch.full((min(count, 32), 1), _start_id(model, tokenizer), device=model.device)
        seen = None
        for _ in range(tokens):
            step = model(input_ids=last, past_key_values=seen, use_cache=True)
            last, seen = torch.multinomial(step.logits[:, -1].float().softmax(-1), 1), step.past_key_values
            rows = torch.cat([rows, last], dim=1)
    return [text for text in _parsed(tokenizer).decode_batch(rows[:, 1:].tolist()) if text.strip()]


def _start_id(model: Any, tokenizer: TextTokenizer) -> int:
    """The token that a text begins after: the model's own, else the one that ends the text before it."""
    start = getattr(model.config, "bos_token_id", None)
    return next(token for token in (start, tokenizer.eos_id, tokenizer.pad_id) if isinstance(token, int))


def _load(folder: Path) -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.bfloat16 if cuda else torch.float32, local_files_only=True
        )
    except Exception as error:  # OSError, ValueError, KeyError, RuntimeError and the kinds of the file formats.
        raise ModelError(
            "the base model cannot be loaded to measure its distance from the data",
            got=f"{folder} ({one_line(error)})",
            do="give a folder with config.json and model.safetensors, or state --domain-distance same, near or far",
        ) from error
    return model.to("cuda" if cuda else "cpu").eval()


def _at_hand(base: str) -> Path | None:
    """The folder of a model that is on this machine."""
    folder = Path(locations.resolve(base))
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base):
        return None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(base, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _why_not_asked(folder: Path) -> str | None:
    """Why a model's bits per byte are not measured, or None where they can be."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the config.json of {folder} cannot be read", got=str(error)) from error
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ()):
        return "is no causal language model"
    weights = [file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    if not weights:
        return "has no weights on this machine"
    if sum(file.stat().st_size for file in weights) <= LARGEST_ON_CPU_BYTES:
        return None
    import torch

    return None if torch.cuda.is_available() else "is too large to ask without a GPU"


def _draw(texts: Sequence[str], size: int, seed: int) -> list[str]:
    """The starts of texts drawn at random until they have `size` bytes."""
    drawn: list[str] = []
    left = size
    for number in random.Random(seed).sample(range(len(texts)), len(texts)):
        start = texts[number][: min(TEXT_BYTES, left)]
        drawn.append(start)
        left -= len(start.encode(errors="surrogatepass"))
        if left <= 0:
            break
    return drawn


def _pieces(content: bytes, length: int = _PIECE_BYTES) -> list[bytes]:
    """Pieces of equal length, without a short rest."""
    whole = [content[at : at + length] for at in range(0, len(content) - length + 1, length)]
    return whole or [content]


def _compressed(pieces: Sequence[bytes], before: bytes) -> float:
    """Bits per byte that zlib needs for pieces, each after the same text."""
    size = 0
    for piece in pieces:
        # Raw deflate: no header or checksum; without a text before it, the dictionary is empty.
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, before)
        size += len(packer.compress(piece)) + len(packer.flush())
    return 8 * size / sum(map(len, pieces))


def _parsed(tokenizer: TextTokenizer) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.json)
