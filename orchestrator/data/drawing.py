"""Which documents and rows are drawn, and where a document is cut: pure functions of sizes or classes, and a seed.

Called by `splits`. Nothing here depends on tokens, so that trials with other tokenizers or block lengths hold out the
same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEAR_BYTES = 64
"""A document is cut at a line break or space at most so far from the exact place, and held-out text that is off by so
little needs no cut. Half a line of 120 characters (a guess), and below one block of the shortest usual length."""
_ROUNDS = 64
"""Passes over the documents that still fit. The room halves about every second one; after that a cut fills it."""
_PIECE_ROWS = 1 << 16
"""Rows that are sorted at once: some hundred kB."""


@dataclass(frozen=True, kw_only=True)
class DrawnDocuments:
    """What of some documents is held out."""

    whole: np.ndarray
    """Sorted numbers of the documents that are held out as they are."""
    cut: int | None
    """The document of which only the end is held out."""
    end_bytes: int
    """How much of its end; 0 without a cut."""


def draw_documents(sizes: np.ndarray, fraction: float, seed: int) -> DrawnDocuments:
    """Documents drawn until they hold `fraction` of all bytes, to within `NEAR_BYTES`: some text, never all.

    In a random order, each one that does not exceed the share is held out whole, so that one long book among many short
    ones is not; the first that did exceed it is cut where these do not meet the share.
    """
    total = float(sizes.sum())
    gap = fraction * total
    near = min(float(NEAR_BYTES), gap / 2, (total - gap) / 2)
    left = order = np.random.default_rng(seed).permutation(len(sizes))
    taken: list[np.ndarray] = []
    for _ in range(_ROUNDS):
        fitting = left[sizes[left] <= gap + near]
        count = int(np.searchsorted(np.cumsum(sizes[fitting]), gap + near, side="right"))
        if count == 0:
            break
        taken.append(fitting[:count])
        gap -= float(sizes[fitting[:count]].sum())
        left = fitting[count:]
        if gap <= near:
            break
    whole = np.sort(np.concatenate([*taken, np.empty(0, dtype=np.int64)]))
    if gap <= near:
        return DrawnDocuments(whole=whole, cut=None, end_bytes=0)
    others = order[~np.isin(order, whole)]
    # The first that was passed over is larger than the room there was, and the room only shrinks.
    return DrawnDocuments(whole=whole, cut=int(others[0]), end_bytes=max(1, round(gap)))


def cut_near_end(text: str, *, share: float) -> int:
    """The index that leaves about `share` of a text's UTF-8 bytes behind it: after a line break or before a space.

    The nearest line break within `NEAR_BYTES`, else the nearest space, else between two characters.
    """
    raw = text.encode("utf-8", "surrogatepass")
    place = min(max(round(len(raw) * (1 - share)), 0), len(raw))
    start, end = max(1, place - NEAR_BYTES), min(len(raw) - 1, place + NEAR_BYTES)
    after_break = [p for p in range(start, end + 1) if raw[p - 1] == ord("\n")]
    at_space = [p for p in range(start, end + 1) if raw[p] in b" \t"]
    if near := after_break or at_space:
        place = min(near, key=lambda p: abs(p - place))
    while place < len(raw) and raw[place] & 0xC0 == 0x80:  # inside a character
        place += 1
    return len(raw[:place].decode("utf-8", "surrogatepass"))


def draw_stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` rows: one of each class, the rest in proportion to the classes.

    Of a class with two rows or more one stays undrawn where `count` allows, so that both sides know every class.
    scikit-learn's split promises neither, and refuses counts that leave fewer rows than classes (999 of 1,000).
    """
    sizes = class_sizes(labels, int(labels.max()) + 1)
    by_class = _shuffled_by_class(labels, np.cumsum(sizes) - sizes, seed)
    sizes = sizes[sizes > 0]
    first = np.cumsum(sizes) - sizes
    last = (first + sizes - 1)[sizes > 1]
    assert len(first) <= count <= len(labels), "the caller checks that every class can be drawn"
    kept = np.sort(np.concatenate([first, last]))
    free = len(labels) - len(kept)
    more = count - len(first)
    # Evenly spaced places in rows sorted by class: each class gets its share, give or take one.
    taken = min(more, free)
    places = (2 * np.arange(taken) + 1) * free // max(1, 2 * taken)
    places += np.searchsorted(kept - np.arange(len(kept)), places, side="right")  # counted without those that are kept
    rest = by_class[last][: more - taken]
    return np.sort(np.concatenate([by_class[first], by_class[places], rest])).astype(np.int64)


def class_sizes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Rows of each class. In pieces: `np.bincount` makes a copy with 8 bytes a row first."""
    sizes = np.zeros(classes, dtype=np.int64)
    for start in range(0, len(labels), _PIECE_ROWS):
        sizes += np.bincount(labels[start : start + _PIECE_ROWS], minlength=classes)
    return sizes


def _shuffled_by_class(labels: np.ndarray, begins: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers in a random order, those of each class together; `begins` says where each class's begin.

    A counting sort in pieces: a stable argsort of a large table takes four times the memory, and twice the time.
    """
    kind = np.int32 if len(labels) < 1 << 31 else np.int64
    shuffled = np.arange(len(labels), dtype=kind)
    np.random.default_rng(seed).shuffle(shuffled)
    sorted_rows, free = np.empty_like(shuffled), begins.copy()
    narrow = np.uint16 if len(begins) <= 1 << 16 else np.int64  # numpy sorts 16 bits by radix, others by comparing
    for start in range(0, len(shuffled), _PIECE_ROWS):
        piece = shuffled[start : start + _PIECE_ROWS]
        classes = labels[piece].astype(narrow)
        counts = np.bincount(classes, minlength=len(begins))
        within = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        sorted_rows[np.repeat(free, counts) + within] = piece[np.argsort(classes, kind="stable")]
        free += counts
    return sorted_rows
