"""Fields of a spec that say what a run is given and how it lives through faults: resources, checkpoints, bad steps.

`spec` puts them into the `RunSpec`; rules between these and other fields stand there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from orchestrator.object_store import check_writable_uri, is_remote
from orchestrator.spec_numbers import MOST_CORES, MOST_SMALL, YEAR_S, Count, RateOrZero, SmallCount, WorkerCount

MOST_GBIT = 100_000.0
"""A node of eight GPUs with a card of 400 Gbit/s for each has 3,200."""
Workers = WorkerCount | Literal["auto"] | tuple[WorkerCount, WorkerCount]
"""A number, the planner's choice, or the least and the most of an elastic run."""
Spikes = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
"""YAML reads a bare `off` as false."""

NEWEST_KEPT = 3
"""Checkpoints that stay where nothing else is asked for: one that is damaged, and one that a rewind passes over, leave
one (a guess)."""


class Block(BaseModel):
    """Frozen; unknown keys and infinite numbers are refused; the sentence under a field describes it in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class BadStepsSpec(Block):
    """What to do about a step whose loss or gradient is not finite, or whose loss is far above its recent ones: go back
    to the newest checkpoint and leave the step's samples out."""

    spikes: Spikes = "auto"
    """`auto` judges a loss by the spread of recent ones; `off` lets spikes pass, and only what is not finite counts."""
    max_rewinds: Annotated[int, Field(ge=0, le=MOST_SMALL)] = 3
    """How often a run goes back within 1,000 steps before it gives up; with 0 the first bad step ends it."""


class StopSpec(Block):
    """When a run ends before its length: it no longer gets better on the held-out data."""

    patience: SmallCount
    """How many evaluations in a row, of those every `eval_every_steps`, may pass without a better one."""
    min_delta: RateOrZero = 0.0
    """By how much the ranked metric must be better than the best before to count as better."""


class ResourcesSpec(Block):
    """What each training gets from the cluster."""

    workers: Workers = 1
    """Ray Train workers of one training, each one rank. `[2, 8]` is elastic: the run shrinks when it loses workers and
    grows when there is room, between sizes that split the batch. `auto` is the number that the planner finds cheapest.
    """
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """GPUs of a worker; `auto` takes one where the cluster has GPUs."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=MOST_CORES)] = 1
    """CPU cores of a worker, and its threads."""
    max_failures: Annotated[int, Field(ge=0, le=MOST_SMALL)] = 3
    """How often dead workers are replaced and the run goes on from its newest checkpoint."""
    capacity_timeout_s: Annotated[float, Field(ge=0, le=YEAR_S)] = 1800.0
    """Seconds that a run waits for nodes, those its autoscaler starts or those it has lost, before it gives up: a
    guess, since a machine comes or is replaced within minutes, and what takes longer than half an hour is better
    started again by hand. Time behind other trainings does not count: they may take as long as they do."""
    hang_timeout_s: Literal["auto"] | Annotated[float, Field(gt=0, le=YEAR_S)] = "auto"
    """Seconds that a rank may stand still in a step before the workers are taken to hang; `auto` is 60. Ten usual steps
    are waited for in any case; start, first step, evaluation, saving and export are given multiples."""
    usd_per_device_hour: RateOrZero | None = None
    """Price of one device for an hour; none given takes the catalogue's (`configs/devices.yaml`)."""
    network_gbit: Annotated[float, Field(gt=0, le=MOST_GBIT)] | None = None
    """Gbit/s in one direction between a node and the others, for plans and times: of `iperf3`, or the machine type's.
    None given takes the catalogue's for GPUs; what nodes of CPU cores send each other is then not counted."""

    @field_validator("workers", mode="wrap")
    @classmethod
    def _one_size_or_a_range(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            workers = check(value)
        except ValidationError as error:
            raise ValueError(
                f"resources.workers is a number, [LEAST, MOST] for a run that shrinks and grows, or auto; got {value!r}"
            ) from error
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(
                f"resources.workers is [LEAST, MOST], and {workers[0]} is more than {workers[1]}: "
                f"use [{workers[1]}, {workers[0]}]"
            )
        return workers

    @property
    def is_elastic(self) -> bool:
        """Whether the run may change its number of workers."""
        return isinstance(self.workers, tuple)


class CheckpointSpec(Block):
    """When and where the run is saved."""

    every_steps: Literal["auto"] | Count | None = None
    """Save every so many steps; always also at the end and when stopped. `auto` weighs the measured cost of saving
    against the work that failures are expected to undo."""
    keep: Literal["auto", "best"] | SmallCount = "auto"
    """`best` leaves the model of the best evaluation, by the metric that ranks runs, instead of the last step's; a
    number leaves the last step's, and is how many of the newest checkpoints stay (else 3). `auto` is best where there
    is `training.eval_every_steps`."""
    storage: str | None = None
    """Where runs are kept: a folder that every node sees, or a bucket by its URI: `s3://BUCKET/PATH`, `gs://`,
    `abfs://`, `hdfs://` or another scheme of pyarrow or fsspec; none given is `runs` below `$ORCHESTRATOR_HOME`
    (`~/.orchestrator`). With a bucket a training or a search needs no folder that its machines share."""

    @field_validator("storage")
    @classmethod
    def _is_a_folder_or_a_bucket(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            check_writable_uri(value, what="checkpoint.storage")
        return value

    @property
    def newest_kept(self) -> int:
        """How many of the newest checkpoints stay."""
        return self.keep if isinstance(self.keep, int) else NEWEST_KEPT

    @property
    def in_a_bucket(self) -> bool:
        """Whether runs are kept in object storage."""
        return self.storage is not None and is_remote(self.storage)
