"""What `run` and `advise` do with the texts of a table: pick some, and tell which are blank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from orchestrator.data.formats.arrow_memory import memory
from orchestrator.data.tables import Table

_MAY_BE_SPACE = np.zeros(256, dtype=bool)
"""First bytes in UTF-8 of all characters that `str.isspace` takes for white space, and of some others."""
_MAY_BE_SPACE[
    [*{chr(point).encode("utf-8", "surrogatepass")[0] for point in range(0x3001) if chr(point).isspace()}]
] = True


def is_blank(texts: Any) -> np.ndarray:
    """For each string of a pyarrow array without nulls, whether it is empty or white space alone."""
    offsets, buffer = _offsets(texts), texts.buffers()[2]
    starts = offsets[:-1]
    blank: np.ndarray = offsets[1:] == starts
    data = np.frombuffer(buffer or b"", dtype=np.uint8)
    if blank.any():  # the last of them may start where the data ends
        suspects = np.flatnonzero(~blank)
        suspects = suspects[_MAY_BE_SPACE[data[starts[suspects]]]]
    else:
        suspects = np.flatnonzero(_MAY_BE_SPACE[data[starts]])
    for index in suspects:  # few: most texts begin with a letter
        blank[index] = texts[int(index)].as_py().isspace()
    return blank


def byte_lengths(texts: Any) -> np.ndarray:
    """UTF-8 bytes of each string of a pyarrow array, int64."""
    return np.diff(_offsets(texts)).astype(np.int64)


def coded(values: Any) -> tuple[Any, np.ndarray]:
    """(the distinct strings of a pyarrow array without nulls, the number of each value among them)."""
    import pyarrow.compute as pc

    found = pc.dictionary_encode(values, memory_pool=memory())
    indices = found.indices
    numbers = np.frombuffer(indices.buffers()[1], dtype=np.int32)
    return found.dictionary, numbers[indices.offset : indices.offset + len(indices)]


def _offsets(texts: Any) -> np.ndarray:
    # `to_numpy` would import pandas: half a second and 40 MB.
    if not len(texts):
        return np.zeros(1, dtype=np.int32)
    return np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]


def chosen_texts(table: Table, column: str, chosen: np.ndarray | None) -> Iterator[str]:
    """Texts of some rows, by their sorted numbers over all files of a table; without numbers, of all."""
    start = done = 0
    if chosen is None:
        for batch in table.batches([column]):
            yield from batch.columns[0].to_pylist()
        return
    if not len(chosen):
        return
    for batch in table.batches([column]):
        end = done + int(np.searchsorted(chosen[done:], start + len(batch)))
        if end > done:
            texts = batch.columns[0]
            whole = end - done == len(batch)
            yield from (texts if whole else texts.take(chosen[done:end] - start)).to_pylist()
        start, done = start + len(batch), end
        if done == len(chosen):
            return
