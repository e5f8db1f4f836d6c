"""The file of a split's token ids, one after the other, as every form of text has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.splits import Split


def write_tokens(folder: Path, split: Split, parts: Iterable[np.ndarray]) -> int:
    """Writes ids part by part; how many there are."""
    tokens = 0
    with _path(folder, split).open("wb") as stream:
        for ids in parts:
            stream.write(ids.data)
            tokens += len(ids)
    return tokens


def read_tokens(folder: Path, split: Split, meta: Mapping[str, Any]) -> np.ndarray:
    """The ids, mapped into memory, of the type that `meta.json` names. Raises OSError when the file is gone."""
    # A plain array over the same map: np.memmap's own indexing costs 10 us more each time.
    return np.asarray(np.memmap(_path(folder, split), dtype=meta["dtype"], mode="r"))


def stored_tokens(folder: Path, split: Split, meta: Mapping[str, Any]) -> int:
    """How many ids the file holds."""
    size: int = np.dtype(meta["dtype"]).itemsize
    return _path(folder, split).stat().st_size // size


def _path(folder: Path, split: Split) -> Path:
    return folder / f"{split}.bin"
