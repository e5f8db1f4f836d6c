"""The kinds of numbers that fields of a spec take, each with a bound beyond all use and the reason for it.

A number above is a slip of the keyboard, and would have the planner count for hours or overflow. Used by the
`spec` modules.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from orchestrator.quantities import MOST, MOST_SAMPLES, MOST_WORKERS, parse_count

MOST_CORES = 10_000
"""Of one machine: ten times the largest (HPE's Superdome Flex has some 900)."""
MOST_SMALL = 10**6
"""Of what is chosen by hand: retries, ranks, checkpoints, draws: a guess beyond all use."""
YEAR_S = 366 * 86_400.0
"""No run waits longer for anything; timers of the system end at some 292 years."""
MOST_SHOTS = 10_000
"""Of examples in a prompt: ten times the most that were published (2,000 in Agarwal et al. 2024, "Many-Shot
In-Context Learning"), and more than contexts hold."""
MOST_SEED = 2**32 - 1
"""The largest that every generator takes (numpy's legacy one)."""
LEAST, LARGEST = 1e-30, 1e6
"""Of a rate or a price: fp32 holds 1e-38 to 3e38, and both are multiplied with others."""


_AS_WRITTEN = BeforeValidator(parse_count, json_schema_input_type=int | str)

Count = Annotated[int, Field(ge=1, le=MOST), _AS_WRITTEN]
"""A positive whole number; `2M`, `10B` and `1e6` are read as numbers, here and in the next four."""
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES), _AS_WRITTEN]
CountOrZero = Annotated[int, Field(ge=0, le=MOST), _AS_WRITTEN]
WorkerCount = Annotated[int, Field(ge=1, le=MOST_WORKERS), _AS_WRITTEN]
SmallCount = Annotated[int, Field(ge=1, le=MOST_SMALL), _AS_WRITTEN]
ShotCount = Annotated[int, Field(ge=0, le=MOST_SHOTS), _AS_WRITTEN]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Rate = Annotated[float, Field(ge=LEAST, le=LARGEST)]
"""A number above zero that training multiplies with."""
RateOrZero = Annotated[float, Field(ge=0, le=LARGEST)]
