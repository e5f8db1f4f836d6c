"""Tokenizers of base models, kept once transformers has loaded them: what reads one again needs no transformers.

    $ORCHESTRATOR_HOME/cache/tokenizers/KEY.json    KEY: a hash of all files that shape it, and transformers' version

`prepare` needs the very ids of `AutoTokenizer`, so it loads and keeps them; a look at data takes what was kept, else
the tokenizer.json as it stands, which is near enough to count tokens with.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer, tokenization
from orchestrator.samples.tokenization import TextTokenizer

_FORMAT = 1
"""Part of the key: raise it when `TextTokenizer` of the same files would be another."""
_SHAPING = (".json", ".txt", ".model", ".jinja", ".codes", ".vocab", ".bpe", ".tiktoken")
"""Endings of the files that a tokenizer is stored in; weights have others."""


def load_exactly(location: str) -> tuple[TextTokenizer, Literal[True]]:
    """What `base_tokenizer.load_tokenizer` gives, kept or loaded. Raises what it raises."""
    kept = _kept(location)
    if kept is not None:
        return kept, True
    found = base_tokenizer.load_tokenizer(location)
    file = _file(location)
    with suppress(OSError):  # it is loaded again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _to_json(found))
    return found, True


def load_at_hand(location: str) -> tuple[TextTokenizer, bool]:
    """(the tokenizer, whether its ids are known to be those of `AutoTokenizer`), without transformers where it can be.

    Raises ModelError when there is none.
    """
    kept = _kept(location)
    if kept is not None:
        return kept, True
    folder = base_tokenizer.tokenizer_folder(location)
    stored = {name: (folder / name).read_bytes() for name in _NAMES if (folder / name).is_file()}
    settings, config = (
        tokenization.read_object(stored, name, location) for name in ("tokenizer_config.json", "config.json")
    )
    if "tokenizer.json" not in stored or "auto_map" in settings:
        return load_exactly(location)
    files = {name: content for name, content in stored.items() if name != "config.json"}
    return tokenization.from_files(files, config, location), False


_NAMES = (*base_tokenizer.TOKENIZER_FILES, "config.json")


def _kept(location: str) -> TextTokenizer | None:
    with suppress(OSError, AttributeError, KeyError, TypeError, ValueError):  # then it is made anew
        value = read_json(_file(location))
        return None if value is None else _from_json(value)
    return None


def _file(location: str) -> Path:
    folder = base_tokenizer.tokenizer_folder(location)
    digest = hashlib.sha256(f"{_FORMAT} {importlib.metadata.version('transformers')}".encode())
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in _SHAPING and file.is_file():
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    except OSError as error:
        raise ModelError(f"the tokenizer of {location} cannot be read", got=str(error)) from error
    return locations.home() / "cache" / "tokenizers" / f"{digest.hexdigest()[:32]}.json"


def _to_json(tokenizer: TextTokenizer) -> dict[str, Any]:
    value = {field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(tokenizer)}
    return value | {"files": {name: base64.b64encode(raw).decode() for name, raw in tokenizer.files.items()}}


def _from_json(value: Mapping[str, Any]) -> TextTokenizer:
    lists = {name: tuple(found) for name, found in value.items() if isinstance(found, list)}
    files = {name: base64.b64decode(text) for name, text in value["files"].items()}
    return TextTokenizer(**{**value, **lists, "files": files})
