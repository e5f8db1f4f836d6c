"""Several trainings as one: the fields `stages` and `cycles` of a spec, and the trainings in the order they run in.

`load_stages` reads them. Each training begins with the model that the one before has left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from orchestrator.errors import OrchestratorError
from orchestrator.quantities import Budget
from orchestrator.spec import RunSpec, TrackingSpec
from orchestrator.spec_survival import Block

STAGES, CYCLES = "stages", "cycles"
"""Keys of a spec file."""
MOST_CYCLES = 100
"""Each is a training or more; nobody has published a tenth of that (a guess beyond all use)."""


class StagesSpec(Block):
    """What a file with stages holds beside the fields that they share."""

    stages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """Trainings that run one after the other, each with a `name` and the fields in which it differs from those beside
    `stages`. The first begins with `model`, each other one with the model of the one before."""
    cycles: Annotated[int, Field(ge=1, le=MOST_CYCLES)] = 1
    """How often the stages run through; each pass begins with the model of the one before."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of several."""

    name: str
    cycle: int
    """Which pass through the stages it belongs to, from 1 on."""
    cycles: int
    spec: RunSpec
    """Its whole spec. The base of every stage but the first is a placeholder until there is the model."""

    @property
    def label(self) -> str:
        """How messages call it: `classify`, or `classify (cycle 2)`."""
        return self.name if self.cycles == 1 else f"{self.name} (cycle {self.cycle})"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the stage in what is raised meanwhile."""
        try:
            yield
        except OrchestratorError as error:
            raise error.within(f"stage {self.label}") from error


@dataclass(frozen=True, kw_only=True)
class StagedSpec:
    """Several trainings that run one after the other."""

    name: str
    stages: tuple[Stage, ...]
    """In the order they run in, those of later cycles included."""

    @property
    def first(self) -> RunSpec:
        """The training that all begins with; tracking, storage and budget beside it are those of the whole."""
        return self.stages[0].spec

    @property
    def tracking(self) -> TrackingSpec:
        """Where results go."""
        return self.first.tracking

    @property
    def budget(self) -> Budget | None:
        """What all stages may spend together."""
        return self.first.parsed_budget

    def fingerprint(self) -> str:
        """Eight hex digits over all that shapes the results, as `RunSpec.fingerprint`."""
        parts = [[stage.name, stage.cycle, stage.spec.identity()] for stage in self.stages]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
