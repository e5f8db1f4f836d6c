"""Random numbers without a state: a hash of what each is for (Steele, Lea and Flood 2014).

Whoever draws the same thing draws the same number, on any rank, after any resume.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""splitmix64's step from one number of a stream to the next: 2^64 over the golden ratio."""


def mix(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 on uint64: every bit of the result depends on every bit of the value."""
    mixed = values + GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
