"""The values that cross the border between scheduling and a worker. No torch here, so that a driver stays light."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.attempts import Held
from orchestrator.runs.budget_ledger import evaluation_is_due
from orchestrator.runs.file_exchange import Exchange, exchange_at, renew
from orchestrator.runs.heartbeat import Heartbeat
from orchestrator.samples.prepare import PreparedData
from orchestrator.spec import RunSpec

Status = Literal["finished", "stopped_by_budget", "interrupted"]


WORKER_ENVIRONMENT: Mapping[str, str] = {
    "TOKENIZERS_PARALLELISM": "false",
    # Without these, glibc hands every freed large tensor back to the kernel and faults it in again at the next step:
    # 715 instead of 537 ms for a small Llama on one core. Larger ones than 128 MiB do go back: kept too, the flat
    # buffers of ZeRO-2 and 3 left holes of a quarter of the peak. (PyTorch's THP_MEM_ALLOC_ENABLE would bring these in
    # huge pages, a fifth faster, but what lies in the heap then took up to half as much again.)
    "MALLOC_TRIM_THRESHOLD_": str(10**9),
    "MALLOC_MMAP_THRESHOLD_": str(128 * 2**20),
}
"""Environment of every worker process."""

TRIALS = "trials"
"""In the run folder of a search: those of its trials."""
MODEL, OUTCOME = "model", "outcome.json"
"""In a run folder, once the training is over."""
BEST = "best"
"""In a run folder until then: the weights of the best evaluation."""
CHECKPOINTS = "checkpoints"
"""In a run folder, or in its prefix in a bucket."""
REPORTS, ENDING = "reports.jsonl", "ending.json"
"""In the run folder of a trial: its evaluations, and how it ended."""
RUNGS = "rungs.json"
"""In the run folder of a search: what its trials were compared by."""


def best_file(step: int) -> str:
    """Where in a run folder the weights of an evaluation are, while it is the best."""
    return f"{BEST}/step-{step:08d}.pt"


def bucket_of(spec: RunSpec, run_folder: Path) -> str | None:
    """URI of a run's prefix in a bucket, a trial's within its search's; None where it is kept in a folder."""
    storage = spec.checkpoint.storage
    if storage is None or not spec.checkpoint.in_a_bucket:
        return None
    is_trial = run_folder.parent.name == TRIALS
    name = "/".join(run_folder.parts[-3:]) if is_trial else run_folder.name
    return f"{storage.rstrip('/')}/{name}"


def checkpoints_of(spec: RunSpec, run_folder: Path) -> Path | str:
    """Folder of a run's checkpoints, or the URI of its prefix in a bucket."""
    bucket = bucket_of(spec, run_folder)
    return run_folder / CHECKPOINTS if bucket is None else f"{bucket}/{CHECKPOINTS}"


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What to train, on what, and where it is kept."""

    spec: RunSpec
    plan: RunPlan
    data: PreparedData
    run_folder: Path
    """Holds `checkpoints/`, `outbox/`, `model/` and `outcome.json`."""
    final_checkpoint: bool = True
    """Whether the end of the training is saved as a checkpoint too; a search's trials need only their model."""
    stop_after_step: int | None = None
    """The training saves and ends, interrupted, after this step of its plan; None goes to the plan's end."""
    hold_after_step: int | None = None
    """Rank 0 waits after this step, once it is told, for as long as `hold_file` is there: someone kills a worker."""
    rungs: tuple[int, ...] = ()
    """Steps after which it is evaluated in any case: a search compares its trials there."""
    attempt: int = 0
    """Number of this start of the run's workers (`attempts`); 0 where nobody else can start them too."""
    started_s: float | None = None
    """Unix time at which the workers of this attempt were asked for; None where they are just here."""
    held_before: Held = Held()  # noqa: RUF009  a frozen value
    """What the attempts before this one took, as far as a driver has seen them end."""
    exchanged_at: str | None = None
    """Where in a bucket the run's machines exchange what lies in its folder; None where all of them see that."""
    life: str = ""
    """Which life of the run it is: another one where it was started over, so that copies of before do not count."""

    def is_evaluated_after(self, step: int) -> bool:
        """Whether an evaluation falls due between this step and the next."""
        return evaluation_is_due(step, every=self.spec.training.eval_every_steps, rungs=self.rungs)

    @property
    def started_s_ago(self) -> float:
        """Seconds since the workers of this attempt were asked for; clocks of two machines may differ a little."""
        return 0.0 if self.started_s is None else max(0.0, time.time() - self.started_s)

    @property
    def checkpoints(self) -> Path | str:
        """Folder of this run's checkpoints, or the URI of its prefix in a bucket."""
        return checkpoints_of(self.spec, self.run_folder)

    def exchange(self) -> Exchange:
        """What this machine takes part in. Raises StorageError when the bucket cannot be opened."""
        return exchange_at(self.run_folder, self.exchanged_at)

    def renew(self) -> None:
        """What this machine has kept of the run from before it was started over is removed."""
        if self.exchanged_at is not None:
            renew(self.run_folder, self.life)

    @property
    def hold_file(self) -> Path:
        """See `hold_after_step`."""
        return self.run_folder / "hold"

    @property
    def model_folder(self) -> Path:
        """Where the finished model goes, as a Hugging Face folder."""
        return self.run_folder / MODEL

    @property
    def outcome_file(self) -> Path:
        """Written last: its presence says that the run is over."""
        return self.run_folder / OUTCOME

    @property
    def budget_stop_file(self) -> Path:
        """The outcome of a stop by the budget: what the same command gives again until the budget is raised."""
        return self.run_folder / "budget-stop.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, for whoever watches it."""

    step: int
    steps: int
    tokens_per_second: float = 0.0
    eta_s: float = 0.0
    """Seconds to the last step at the recent pace, evaluations and checkpoints left out."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest `train/loss` and `eval/...` figures."""
    phase: str = "training"
    """`starting`, `training`, `evaluating`, `saving` or `exporting`."""
    spent: float = 0.0
    """What the run has cost up to now, in `unit`."""
    unit: str = "usd"
    """That of the budget; without one `usd`, or `gpu-hours` where no price is known."""
    budget: str | None = None
    """The whole of it, as a spec writes it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _ignore(*_: Any) -> None:
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker knows of its surroundings; the defaults make a single process without Ray."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    """Machines that the workers are on."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """What this rank does now, for whoever looks for hangs."""
    report: Callable[[int, Mapping[str, float]], None] = _ignore
    """Called on rank 0 with (step, metrics) after every evaluation; may not return when the trial is stopped."""
    progress: Callable[[Progress], None] = _ignore
    """Called on rank 0 at every step; must be cheap."""
    stop_requested: Callable[[], bool] = _never
    """Asked on rank 0 at every step; must be cheap."""


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """What a checkpoint keeps besides weights and optimizer: how far the run is and what it has cost."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, without padding."""
    padded_tokens: int = 0
    """Tokens computed, with padding; 0 in the checkpoints of earlier versions, which did not know."""
    device_seconds: float = 0.0
    """Seconds times devices held, over all attempts up to this state, each from when its workers were asked for."""
    wall_seconds: float = 0.0
    """Seconds, over all attempts up to this state, likewise."""
    step_seconds: float = 0.0
    """Seconds of them in optimizer steps; 0 in the checkpoints of earlier versions, which did not know."""
    evaluated_step: int = 0
    """Step of the newest evaluation."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of every metric, so that the outcome of a resumed run knows them all."""
    best: float | None = None
    """The best evaluation of the ranked metric, where `training.stop` asks for it."""
    waited: int = 0
    """Evaluations since then."""
    best_step: int | None = None
    """Step of the best evaluation, whose weights are kept; None where there is none."""
    best_metrics: Mapping[str, float] = field(default_factory=dict)
    """What was evaluated there."""
    retained_before: float | None = None
    """The loss on general data before the first step, where `retain.data` asks for it."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What `divergence_guard` knows of recent steps, so that a resumed run judges as the uninterrupted one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended."""

    status: Status
    step: int
    steps: int
    metrics: dict[str, float]
    """The last value of every metric; of evaluations, those of the model."""
    checkpoint: str | None
    """Newest complete checkpoint."""
    model_path: str | None
    """Hugging Face folder; None unless the run came to its end or its budget's."""
    notes: tuple[str, ...] = ()
    """What a user should know, such as a torn checkpoint that was passed over."""
    model_step: int | None = None
    """The step whose weights the model has, where that is an earlier one than `step`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_dict` gave, also after JSON."""
        return cls(**{**value, "notes": tuple(value["notes"])})
