"""A spec with `search` -> the specs of its trials. Pure and seeded, so every trial is checked before any is started.

The space is walked in the order it is written. Grid values multiply; everything else is drawn once per sample, and a
value that brings a space of its own is followed only where it was taken:

    method: {grid: {full: {training.learning_rate: {loguniform: [5e-5, 2e-4]}}, head: {...}}}
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.load_spec import parse_spec, set_path
from orchestrator.methods.registry import method_of
from orchestrator.spec import RunSpec

LARGEST_BOUND = 1e18
"""Of a range: beyond every number that a field takes, and far from where a draw would overflow."""
MOST_TRIALS = 1_000
"""Of a search: far above what published ones of trainings have run (a guess); each is planned before any starts."""
_RANGES = ("uniform", "loguniform", "int_uniform")
_KINDS = ("grid", "choice", *_RANGES)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a search."""

    index: int
    overrides: dict[str, Any]
    """Field path to value."""
    spec: RunSpec

    @property
    def name(self) -> str:
        """Such as `03-lora`: the index, and the method where methods are searched."""
        method = self.overrides.get("method")
        return f"{self.index:02d}" + (f"-{method}" if method else "")


def trials(spec: RunSpec) -> list[Trial]:
    """All trials of a search, in order.

    Raises SpecError for a space that cannot be read, a field that does not exist, or a point that is no valid spec.
    """
    assert spec.search is not None
    draws = random.Random(spec.search.seed)
    points: list[dict[str, Any]] = []
    for point in (point for _ in range(spec.search.samples) for point in _points(spec.search.space, draws)):
        if len(points) == MOST_TRIALS:
            raise SpecError(
                f"the search has more than {MOST_TRIALS:,} trials",
                got=f"search.samples: {spec.search.samples} for every point of {len(spec.search.space)} distributions",
                do="lower search.samples, or give fewer values to a grid",
            )
        points.append(point)
    return [Trial(index=index, overrides=point, spec=_at(spec, point, index)) for index, point in enumerate(points)]


def _points(space: Mapping[str, Any], draws: random.Random) -> Iterator[dict[str, Any]]:
    """Every grid combination once, with one draw of all else."""
    if not space:
        yield {}
        return
    (path, distribution), *others = space.items()
    rest = dict(others)
    kind, values = _read(path, distribution)
    if kind == "grid":
        taken = list(_options(values))
    elif kind == "choice":
        options = list(_options(values))
        taken = [options[draws.randrange(len(options))]]
    else:
        taken = [(_draw(kind, values, draws), {})]
    for value, own in taken:
        for below in _points({**own, **rest}, draws):
            yield {path: value, **below}


def _options(values: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(value, the space it brings)."""
    if isinstance(values, Mapping):
        yield from ((value, own or {}) for value, own in values.items())
    else:
        yield from ((value, {}) for value in values)


def _draw(kind: str, bounds: list[float], draws: random.Random) -> float | int:
    low, high = bounds
    if kind == "uniform":
        return draws.uniform(low, high)
    if kind == "int_uniform":
        return draws.randint(int(low), int(high))
    # Three digits are all a learning rate needs, and read better in a table.
    return float(f"{math.exp(draws.uniform(math.log(low), math.log(high))):.3g}")


def _read(path: str, distribution: Any) -> tuple[str, Any]:
    """(kind, values) of a distribution; raises SpecError when it is none."""
    if not isinstance(distribution, Mapping) or len(distribution) != 1 or next(iter(distribution)) not in _KINDS:
        raise SpecError(
            f"search.space.{path} is no distribution",
            got=f"{distribution!r:.200}",
            allowed=", ".join(f"{{{kind}: ...}}" for kind in _KINDS),
            do="for example {loguniform: [1e-5, 1e-3]}",
        )
    kind, values = next(iter(distribution.items()))
    if isinstance(values, Mapping) and not all(own is None or _is_space(own) for own in values.values()):
        raise SpecError(
            f"search.space.{path}: each value of {kind} brings a space of its own",
            got=f"{values!r:.200}",
            do="write {VALUE: {FIELD: {uniform: [0, 1]}}}, or a list of values that bring none",
        )
    if kind not in _RANGES:
        if not values or not isinstance(values, list | Mapping):
            raise SpecError(f"search.space.{path}: {kind} needs a list of values or a mapping", got=f"{values!r:.200}")
        return kind, values
    numbers = isinstance(values, list) and len(values) == 2 and all(map(_is_bound, values))
    if not numbers or not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
        raise SpecError(
            f"search.space.{path}: {kind} needs [low, high] with low < high",
            got=f"{values!r:.200}",
            do="loguniform needs low above 0" if kind == "loguniform" else None,
        )
    return kind, values


def _is_space(own: Any) -> bool:
    return isinstance(own, Mapping) and all(isinstance(path, str) for path in own)


def _is_bound(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST_BOUND


def _at(spec: RunSpec, point: Mapping[str, Any], index: int) -> RunSpec:
    raw = spec.model_dump(mode="json")
    raw["search"] = None
    for path, value in point.items():
        if path.split(".")[0] in ("search", "name", "tracking", "checkpoint", "budget"):
            raise SpecError(f"search.space.{path}: this field cannot be searched over", got=path)
        set_path(raw, path, value)
    found = parse_spec(
        raw, source=f"trial {index} of the search ({', '.join(f'{k}={v!s:.60}' for k, v in point.items())})"
    )
    if not method_of(found.method).trains:
        raise SpecError(
            f"method: {found.method} trains nothing, so there is nothing to search",
            got=f"trial {index} of the search",
            do=f"take {found.method} out of the space, and run it on its own: `compare` shows both",
        )
    return found
