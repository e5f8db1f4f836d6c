"""The tokenizer of a base model, by the rules of `transformers.AutoTokenizer`, as the values that encoding needs.

A tokenizer.json alone does not say which ids a model was trained on: tokenizer_config.json and others change it, and
older models have none. So transformers loads it, and what it made is taken over; `check_sample` compares the two.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import locations
from orchestrator.architectures.families import model_config
from orchestrator.errors import ModelError, one_line
from orchestrator.planning.base_fit import check_tokenizer
from orchestrator.samples import tokenization
from orchestrator.samples.tokenization import Chunk, Cut, TextTokenizer
from orchestrator.spec import ModelSpec, RunSpec

VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
"""Any of them makes a tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
"""Names of files that a tokenizer is stored in."""
SAMPLE_CHARACTERS = 200_000
"""Text that is encoded a second time, by transformers itself: about 0.2 s."""
_LONGEST_SAMPLE = 2 * tokenization.PIECE_BYTES + 20_000
"""Of one text: enough that a long document is cut, so that the cut is compared too."""
# What `_cuts` tries a cut on: words, signs, digits, other scripts, lines.
_PROBES = (
    "The cat (number 12) sat\non the mat,\ncalled <it>: zoë 一行 ok",
    "x = f(1)\n\treturn  x.y # so\nend",
    "Ja\nund",
)


def tokenizer_location(model: ModelSpec) -> str | None:
    """Where the tokenizer comes from, as the spec says it; None means one trained on the corpus."""
    return model.base if model.tokenizer == "auto" else model.tokenizer


def check_fit(spec: RunSpec, tokenizer: TextTokenizer) -> None:
    """Raises ModelError where a base's embedding has no row for some id of the tokenizer."""
    if spec.model.base is not None:
        ids = {name: getattr(tokenizer, f"{name}_id") for name in ("eos", "pad", "mask", "cls", "sep")}
        check_tokenizer(spec, model_config(spec.model), vocab_size=tokenizer.vocab_size, special=ids)


def load_tokenizer(location: str) -> TextTokenizer:
    """The tokenizer in a folder, a package or on the hub, with the ids of `AutoTokenizer`.

    Raises ModelError when there is none, or it needs what is not installed.
    """
    folder = tokenizer_folder(location)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    stored = {path.name: path.read_bytes() for path in (folder / "config.json",) if path.is_file()}
    config = tokenization.read_object(stored, "config.json", location)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        tokenization.read_object(files, name, location)
    loaded = _loaded(folder, files, location)
    own = {name for name in loaded.vocab_files_names.values() if (folder / name).is_file()}
    files |= {name: (folder / name).read_bytes() for name in own - files.keys()}
    return _as_values(loaded, _as_files(loaded, files, location), config)


def _loaded(folder: Path, files: dict[str, bytes], location: str) -> Any:
    """What `AutoTokenizer` makes of a folder."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        # Code that a folder brings along is never run.
        found = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # Its loaders raise ValueError, OSError, ImportError and their dependencies' kinds.
        if "tokenizer.json" in files:
            tokenization.from_files(files, {}, location)  # names a file that is broken
        raise _unusable(location, folder, error) from error
    wanted = set(found.vocab_files_names.values())
    if wanted and not any((folder / name).is_file() for name in wanted | set(VOCABULARY_FILES)):
        # transformers gives an empty vocabulary where there is none.
        raise ModelError(
            f"{location} holds no tokenizer that transformers can load",
            got=f"none of {', '.join(sorted(wanted | {'tokenizer.json'}))}",
            do="set model.tokenizer to a folder or hub name with one",
        )
    return found


def _unusable(location: str, folder: Path, error: Exception) -> ModelError:
    said = one_line(error, most=None)
    model = next((folder / name for name in ("tokenizer.model",) if (folder / name).is_file()), None)
    if "tiktoken" in said and model is not None and not re.match(rb"[A-Za-z0-9+/=]+ \d+\s", model.read_bytes()[:1000]):
        return ModelError(
            f"the {model.name} of {location} cannot be read",
            got=f"{model.stat().st_size} bytes that are neither a sentencepiece model nor a tiktoken vocabulary",
            do="copy the file again, or set model.tokenizer to a folder or hub name with a tokenizer.json",
        )
    needs = re.search(r"pip3? install (?:-U |--upgrade )?[`'\"]?([A-Za-z][\w.\[\]-]*\w)", said)
    if needs:
        return ModelError(
            f"the tokenizer of {location} needs a package that is not installed",
            got=said[:300],
            do=f"pip install {needs[1]}, on every machine of the cluster",
        )
    if "trust_remote_code" in said:
        return ModelError(
            f"the tokenizer of {location} is a program of its own, which is not run",
            got="auto_map in its tokenizer_config.json",
            do="set model.tokenizer to a folder or hub name whose tokenizer transformers has",
        )
    return ModelError(
        f"{location} holds no tokenizer that transformers can load",
        got=said[:300],
        do="set model.tokenizer to a folder or hub name with a tokenizer.json",
    )


def _as_files(loaded: Any, files: dict[str, bytes], location: str) -> dict[str, bytes]:
    """What an exported folder needs: the files as they are where they say which class reads them, else written anew."""
    if "tokenizer_class" in tokenization.read_object(files, "tokenizer_config.json", location):
        return files  # saved anew, a Llama tokenizer with `legacy` loses that
    with tempfile.TemporaryDirectory() as place:
        loaded.save_pretrained(place)
        return {file.name: file.read_bytes() for file in Path(place).iterdir() if file.is_file()}


def _as_values(loaded: Any, files: dict[str, bytes], config: dict[str, Any]) -> TextTokenizer:
    # Special tokens in the text itself may be split by a switch that the JSON does not keep.
    text = _json(loaded) if loaded.is_fast and not loaded.split_special_tokens else ""
    known = loaded.convert_ids_to_tokens
    eos_id = tokenization.first_id(loaded.eos_token_id, _known(config.get("eos_token_id"), loaded), known=known)
    pad_id = tokenization.first_id(loaded.pad_token_id, _known(config.get("pad_token_id"), loaded), eos_id, known=known)
    before, after = _template(loaded)
    special = {*loaded.all_special_ids, *(i for i, t in loaded.added_tokens_decoder.items() if t.special)}
    return TextTokenizer(
        json=text,
        files=files,
        vocab_size=max(loaded.get_vocab().values(), default=-1) + 1,
        eos_id=eos_id,
        pad_id=0 if pad_id is None else pad_id,
        mask_id=loaded.mask_token_id,
        cls_id=loaded.cls_token_id,
        sep_id=loaded.sep_token_id,
        special_ids=tuple(sorted(special)),
        before=before,
        after=after,
        cuts=_cuts(lambda text: loaded(text, add_special_tokens=False)["input_ids"]),
        truncation_side=loaded.truncation_side,
    )


def _known(configured: Any, loaded: Any) -> Any:
    """An id of the model's configuration, if the tokenizer has such an entry."""
    first = configured[0] if isinstance(configured, list) and configured else configured
    return first if isinstance(first, int) and 0 <= first < len(loaded) else None


def _json(loaded: Any) -> str:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    text: str = plain.to_str()
    return text


def _template(loaded: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that stand before and after a text."""
    text = "a"
    plain = loaded(text, add_special_tokens=False)["input_ids"]
    whole = loaded(text)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _cuts(encode: Callable[[str], Sequence[int]]) -> Cut:
    """The first kind of cut that leaves the tokens of all probes as they are."""
    for kind, (pattern, left_out) in tokenization.CUTS.items():
        if pattern is None or all(
            [*encode(text[: cut.start()]), *encode(text[cut.start() + left_out :])] == list(encode(text))
            for text in _PROBES
            for cut in pattern.finditer(text)
        ):
            return kind
    raise AssertionError("the last kind always fits")


def check_sample(tokenizer: TextTokenizer, location: str, texts: Iterable[str]) -> None:
    """Compares the ids of some texts with those of `AutoTokenizer`. Raises ModelError naming the first that differs."""
    loaded = _loaded(tokenizer_folder(location), tokenizer.files, location)
    left = SAMPLE_CHARACTERS
    for number, text in enumerate(texts):
        given = text[:_LONGEST_SAMPLE]
        expected = loaded(given)["input_ids"]
        (row, _), parts = _row(tokenizer, given), _document(tokenizer, given)
        for found in (row, parts):
            if found != expected and expected:
                raise _differs(number, given, found, expected, location)
        left -= len(given)
        if left <= 0:
            return


def _row(tokenizer: TextTokenizer, text: str) -> tuple[list[int], int]:
    ids, lengths = tokenization.encode_rows(
        Chunk(texts=(text,), ends=(True,)),
        tokenizer=tokenizer.encoder,
        sequence_length=1 << 30,
        pad_id=tokenizer.pad_id,
    )
    return ids.tolist(), int(lengths[0])


def _document(tokenizer: TextTokenizer, text: str) -> list[int]:
    found = [
        tokenization.encode_documents(
            chunk, tokenizer=tokenizer.encoder, before=tokenizer.before, after=tokenizer.after
        ).tolist()
        for chunk in tokenization.document_chunks([text], cuts=tokenizer.cuts)
    ]
    return [i for ids in found for i in ids]


def _differs(number: int, text: str, found: Sequence[int], expected: Sequence[int], location: str) -> ModelError:
    first = next((at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    return ModelError(
        "the tokenizer gives other ids here than transformers' AutoTokenizer, which the exported model is used with",
        got=f"text {number + 1} of the training data, {text[:60]!r}, token {first + 1}: "
        f"{list(found[first : first + 3])} instead of {list(expected[first : first + 3])} ({location})",
        do="save the tokenizer anew with transformers' save_pretrained, and set model.tokenizer to that folder",
    )


def tokenizer_folder(location: str) -> Path:
    """The folder of a tokenizer; a hub name is downloaded unless it was before. Raises ModelError for any other."""
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
            got=one_line(error, most=None),
            do="check path, name and connection",
        ) from error
    return Path(folder)
