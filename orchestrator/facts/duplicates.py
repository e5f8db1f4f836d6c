"""Texts that stand in a dataset twice: exactly, after case and spacing are set aside, or nearly. Pure.

Near duplicates are pairs whose sets of word shingles have a Jaccard similarity of at least `NEAR`, estimated from
bottom-k sketches (Broder 1997): the k smallest hashes of a set are a uniform sample of it.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.intervals import Interval
from orchestrator.ratio_estimates import exactly, share_interval

NEAR = 0.7
"""Jaccard similarity of a near duplicate, as for SantaCoder (Ben Allal 2023) and StarCoder (Li 2023), from memory."""
SHINGLE_WORDS = 3
"""Words of a shingle; a guess between the 1 that any two texts on a subject share and the 5 usual for web pages: one
changed word in a snippet of 20 leaves a similarity of 0.71."""
SKETCH = 64
"""Hashes kept of a text: a standard error of 0.06 at a similarity of 0.7."""
BANDS = 6
"""Smallest hashes by which candidates are found: two texts of similarity 0.7 share one with 1 - 0.3^6 > 99.9 %, if the
hashes were independent."""
CANDIDATES = 32
"""Texts compared for one shared hash; more would be boilerplate that all texts carry."""
POOL_CHARACTERS = 1_000_000
"""Text searched for near duplicates at most: about 1 s."""
TEXT_CHARACTERS = 20_000
"""Start of a long text by which it is compared."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Repeated texts among those that are not empty, as shares with 90 % intervals."""

    exact: Interval
    """Share of rows that a removal of exact copies would drop."""
    near: Interval
    """Share of distinct texts that have a near duplicate."""
    near_pool: int
    """Distinct texts among which near duplicates were sought."""


def normalize(text: str) -> str:
    """The text without differences in case and spacing; empty for a blank one."""
    return " ".join(text.casefold().split())


def fingerprint(normalized: str) -> bytes:
    """8 bytes that equal texts share, and no others among fewer than billions."""
    return _digest(normalized)


def measure_duplicates(distinct: Mapping[bytes, str], rows: int, *, share: float, seed: int) -> Duplicates:
    """Shares of exact and near duplicates.

    `distinct` maps fingerprints to normalized texts, `rows` counts the texts behind it, copies included, and `share`
    is the part of the dataset that these are.
    """
    assert 0 < len(distinct) <= rows, "every distinct text is a row"
    pool = _pool(distinct, seed=seed)
    found = near_duplicates([distinct[key][:TEXT_CHARACTERS] for key in pool])
    return Duplicates(
        exact=_whole(rows - len(distinct), rows, share=share),
        near=_whole(found, len(pool), share=share * len(pool) / len(distinct)),
        near_pool=len(pool),
    )


def near_duplicates(texts: Sequence[str]) -> int:
    """How many of some distinct normalized texts have at least one near duplicate among the others."""
    sketches = [sketch(text) for text in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    for number, hashes in enumerate(sketches):
        for value in hashes[:BANDS]:
            if len(holders[value]) < CANDIDATES:
                holders[value].append(number)
    paired: set[int] = set()
    for number, hashes in enumerate(sketches):
        others = {other for value in hashes[:BANDS] for other in holders[value] if other != number}
        for other in others:
            if not (number in paired and other in paired) and _is_near(hashes, sketches[other]):
                paired |= {number, other}
    return len(paired)


def sketch(text: str) -> tuple[int, ...]:
    """The `SKETCH` smallest hashes of a normalized text's shingles, ascending; a short text is one shingle."""
    words = text.split()
    shingles = {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    return tuple(heapq.nsmallest(SKETCH, {int.from_bytes(_digest(shingle)) for shingle in shingles}))


def similarity(first: Sequence[int], second: Sequence[int]) -> float:
    """Jaccard similarity of the sets behind two sketches: exact for sets of at most `SKETCH` shingles together."""
    both = set(first) & set(second)
    smallest = heapq.nsmallest(SKETCH, set(first) | set(second))
    return sum(value in both for value in smallest) / len(smallest)


def _is_near(first: Sequence[int], second: Sequence[int]) -> bool:
    # What two sketches share bounds their similarity from above, at a third of the cost; most candidates end here.
    possible = len(set(first).intersection(second)) >= NEAR * max(len(first), len(second))
    return possible and similarity(first, second) >= NEAR


def _digest(text: str) -> bytes:
    # A lone surrogate, which JSON can carry, has no UTF-8 form.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _pool(distinct: Mapping[bytes, str], *, seed: int) -> list[bytes]:
    """Fingerprints drawn at random until their texts fill `POOL_CHARACTERS`; the same whatever order they came in."""
    keys = sorted(distinct)
    random.Random(seed).shuffle(keys)
    size = 0
    for number, key in enumerate(keys):
        size += min(len(distinct[key]), TEXT_CHARACTERS)
        if size > POOL_CHARACTERS:
            return keys[: max(2, number)]
    return keys


def _whole(found: int, seen: int, *, share: float) -> Interval:
    """The share in the whole dataset, of which `share` was looked at.

    A text whose only twin was not drawn looks unique, and a twin is drawn with probability `share`; so the share that
    was seen is the lower end, as if every text had many twins, and that over `share` the upper, as if each had one.
    """
    if share >= 1:
        return exactly(found / seen)
    interval = share_interval(found, seen)
    return Interval(
        low=interval.low, mid=min(1.0, interval.mid / share), high=min(1.0, max(interval.high / share, interval.high))
    )
