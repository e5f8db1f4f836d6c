"""The ledger of a budget: what each run has spent and reserved, in a folder that outlives the runs.

One small file for each run that spends from the budget. From its own a run knows what the work cost that a crash has
lost. The trials of a search share one budget: each reserves the cost of its next steps and of its closing work, starts
a step only if that fits beside what the others have reserved, and releases the remainder. Trials on machines that see
no common folder keep their ledger in the run's bucket, and only there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from orchestrator.atomic_file import damaged
from orchestrator.errors import StorageError
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.runs.file_exchange import CommonFolder, Exchange, exchange_at
from orchestrator.spec import RunSpec

LEDGER = "ledger"
"""In the run folder of a training, or of a search for all its trials."""
_ENTRY, _CLOCK = ".entry", "search.clock"
"""Files of a ledger, in JSON."""
_TICK_S = 1.0
"""How much of a search's hours is forgotten, at most, when its driver is killed."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run, or a part of one, has cost."""

    hours: float = 0.0
    """Wall-clock hours."""
    gpu_hours: float = 0.0
    """Hours times devices held."""
    usd: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return self._merged(other, lambda one, two: one + two)

    def at_least(self, other: Cost) -> Cost:
        """The larger of both in every unit."""
        return self._merged(other, max)

    def of(self, budget: Budget) -> float:
        """The amount in the budget's unit."""
        return {"hours": self.hours, "gpu-hours": self.gpu_hours, "usd": self.usd, "flops": self.flops}[budget.unit]

    def _merged(self, other: Cost, merge: Callable[[float, float], float]) -> Cost:
        return Cost(**{unit.name: merge(getattr(self, unit.name), getattr(other, unit.name)) for unit in fields(Cost)})


def time_cost(seconds: float, plan: RunPlan) -> Cost:
    """What holding a run's devices for some seconds costs."""
    hours = seconds / 3600
    gpu_hours = hours * plan.workers
    return Cost(hours=hours, gpu_hours=gpu_hours, usd=gpu_hours * plan.usd_per_device_hour)


@dataclass(frozen=True, kw_only=True)
class BudgetDecision:
    """Whether to take another step, and why."""

    go_on: bool
    reason: str


def decide(budget: Budget, *, spent: Cost, next_step: Cost, closing: Cost) -> BudgetDecision:
    """Go on only if the next step and then closing (evaluation, checkpoint, export) still fit.

    `closing` is what those took last time, or an estimate before the first time.
    """
    after = (spent + next_step + closing).of(budget)
    if after <= budget.amount:
        return BudgetDecision(go_on=True, reason="")
    return BudgetDecision(
        go_on=False,
        reason=f"budget {budget}: {spent.of(budget):.4g} spent, and the next step with the closing work would make "
        f"{after:.4g}",
    )


# -- a budget kept in a ledger -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LedgerBudget(Budget):
    """A budget whose spending stands in a ledger."""

    ledger: Path
    ledger_at: str | None = None
    """Where in a bucket the ledger is kept; None where it is that folder."""
    member: str
    """Name of the run in the ledger."""
    eval_every_steps: int | None
    rungs: tuple[int, ...] = ()
    save_every_steps: int | None
    """Work that falls due before the next step is paid for, too."""

    def open_ledger(self) -> Ledger:
        """The ledger. Raises StorageError when its bucket cannot be opened."""
        return open_ledger(self.ledger, self.ledger_at)


class LedgerSpec(RunSpec):
    """A spec as its workers get it, with the ledger in which its budget is kept."""

    ledger: Path = Field(exclude=True)
    """Folder of the ledger, which every node sees unless it is kept in a bucket."""
    ledger_at: str | None = Field(default=None, exclude=True)
    """See `LedgerBudget`."""
    member: str = Field(exclude=True)
    """Name of this run in the ledger."""
    rungs: tuple[int, ...] = Field(default=(), exclude=True)
    """Steps after which it is evaluated besides those that the spec says (`TrainingJob.rungs`)."""

    @property
    def parsed_budget(self) -> LedgerBudget | None:
        """The budget with its ledger."""
        budget = super().parsed_budget
        if budget is None:
            return None
        return LedgerBudget(
            amount=budget.amount,
            unit=budget.unit,
            ledger=self.ledger,
            ledger_at=self.ledger_at,
            member=self.member,
            eval_every_steps=self.training.eval_every_steps,
            rungs=self.rungs,
            save_every_steps=every if isinstance(every := self.checkpoint.every_steps, int) else None,
        )


def with_ledger(
    spec: RunSpec, ledger: Path, *, member: str, rungs: tuple[int, ...] = (), ledger_at: str | None = None
) -> RunSpec:
    """The spec with its budget kept in a ledger; without a budget, the spec itself."""
    if spec.budget is None:
        return spec
    return LedgerSpec(**dict(spec), ledger=ledger, ledger_at=ledger_at, member=member, rungs=rungs)


def open_ledger(ledger: Path, ledger_at: str | None) -> Ledger:
    """The ledger of a folder, or the one that stands for it in a run's prefix in a bucket.

    Raises StorageError when the bucket cannot be opened.
    """
    return Ledger(ledger, exchange_at(ledger.parent, ledger_at))


def evaluation_is_due(step: int, *, every: int | None, rungs: tuple[int, ...]) -> bool:
    """Whether a training is evaluated after this step: at every multiple of `every`, and at the rungs of its search."""
    return step > 0 and (step in rungs or (every is not None and step % every == 0))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one run has taken from a budget."""

    spent: Cost = field(default_factory=Cost)
    ahead: Cost = field(default_factory=Cost)
    """Held for its next steps."""
    closing: Cost = field(default_factory=Cost)
    """Held for its end."""
    least: Cost = field(default_factory=Cost)
    """What its first step and its end took together: with less, another run like it comes to nothing."""
    running: bool = False
    """Whether it may still spend what it holds."""
    noted_s: float = 0.0
    """Unix time of the entry."""

    def ended(self) -> Entry:
        """After a death that nobody timed: what was held for steps counts as spent, the rest is given back."""
        return Entry(spent=self.spent + self.ahead, least=self.least)


class Ledger:
    """A folder of entries, one for each run that spends from a budget. Raises StorageError when it cannot be used.

    There is no lock: a claim is written before the others are read, so when two runs claim the last of a budget at the
    same moment at least one of them sees the other's claim. So it is in a bucket, however slow: what has been written
    is read by all from then on. One that is away is waited for, which takes time that a budget of time has to bear.
    """

    def __init__(
        self, folder: Path, exchange: Exchange | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`exchange` is that of the folder above."""
        self._folder, self._exchange, self._now_s = folder, exchange or CommonFolder(folder.parent), clock
        self.period_s = self._exchange.period_s
        """How long steps should last that are claimed at a time, for what a claim costs; 0 where that is nothing."""
        self._ended: dict[str, Entry] = {}
        self._earlier_s = self._started_s = self._ticked_s = 0.0

    def entry(self, member: str) -> Entry | None:
        """What a run has written last."""
        return self._look()[0].get(member)

    def spent(self, budget: Budget) -> float:
        """What all runs together have spent, in the budget's unit; of hours those that a search has run."""
        entries, ticks = self._look()
        search_s = _search_s(ticks, self._now_s())
        if budget.unit == "hours" and search_s is not None:
            return search_s / 3600
        return sum(entry.spent.of(budget) for entry in entries.values())

    def claim(self, budget: Budget, member: str, entry: Entry) -> BudgetDecision:
        """Holds what an entry asks for if that fits beside all others, else only what it takes to close."""
        self._write(member, replace(entry, running=True, noted_s=self._now_s()))
        spent = entry.spent
        entries, ticks = self._look()
        for name, other in entries.items():
            if name != member:
                spent += other.spent + other.ahead + other.closing
        search_s = _search_s(ticks, self._now_s())
        if search_s is not None:
            spent = replace(spent, hours=search_s / 3600)
        decision = decide(budget, spent=spent, next_step=entry.ahead, closing=entry.closing)
        if not decision.go_on:
            self._write(member, replace(entry, ahead=Cost(), running=True, noted_s=self._now_s()))
        return decision

    def admit(self, budget: Budget, member: str, *, first_step: Cost) -> BudgetDecision:
        """Lets a run begin, or begin again, if it can come to something; holds for it what others took for that.

        The first of all may always begin, since nobody knows yet what it takes.
        """
        entries, _ = self._look()
        before = entries.get(member, Entry())
        before = before.ended() if before.running else before
        least = first_step
        for other in entries.values():
            least = least.at_least(other.least)
        decision = self.claim(budget, member, replace(before, closing=least))
        if decision.go_on or not entries:
            return BudgetDecision(go_on=True, reason="")
        self._write(member, before)
        return decision

    def is_running(self, member: str) -> bool:
        """Whether a run was let begin and has not ended."""
        entry = self.entry(member)
        return entry is not None and entry.running

    def settle(self, member: str, plan: RunPlan, *, flops: float) -> None:
        """A run has ended: the time since its last claim was spent, and it gives back what it holds beyond that.

        `flops` is what it is known to have computed in all.
        """
        entry = self.entry(member)
        if entry is not None and entry.running:
            spent = entry.spent + time_cost(max(0.0, self._now_s() - entry.noted_s), plan)
            self._write(member, Entry(spent=replace(spent, flops=max(flops, spent.flops)), least=entry.least))

    def settle_dead(self) -> None:
        """Before a search goes on: the processes of entries that still run are gone with the driver of before."""
        for member, entry in self._look()[0].items():
            if entry.running:
                self._write(member, entry.ended())

    # -- the hours of a search, which pass once, however many trials run ---------------------------------------

    def start_clock(self) -> None:
        """A search begins or goes on; whoever runs it calls `tick` from then on."""
        self._earlier_s = _search_s(self._look()[1], None) or 0.0
        self._started_s = self._now_s()
        self.tick()

    def tick(self) -> None:
        """Notes now and then that the search still runs."""
        now_s = self._now_s()
        if now_s - self._ticked_s >= max(_TICK_S, self.period_s):
            self._ticked_s = now_s
            times = {"earlier_s": self._earlier_s, "started_s": self._started_s, "seen_s": now_s}
            self._write_file(_CLOCK, times)

    # -- files -------------------------------------------------------------------------------------------------

    def _look(self) -> tuple[dict[str, Entry], dict[str, float] | None]:
        """All entries, of which those of runs that have ended are read once; and the clock of a search."""
        known = {f"{member}{_ENTRY}" for member in self._ended}
        try:
            texts = self._exchange.texts(self._folder.name, without=known, patience_s=PATIENCE_S)
        except OSError as error:
            raise self._unusable(error) from error
        found = dict(self._ended)
        for name, text in texts.items():
            member, dot, kind = name.rpartition(".")
            if dot + kind == _ENTRY:
                value = self._parsed(name, text)
                costs = {part: Cost(**value[part]) for part in ("spent", "ahead", "closing", "least")}
                entry = found[member] = Entry(**{**value, **costs})
                if not entry.running:
                    self._ended[member] = entry
        return found, self._parsed(_CLOCK, texts[_CLOCK]) if _CLOCK in texts else None

    def _parsed(self, name: str, text: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise damaged("what the run has spent of its budget", self._folder / name, error) from error
        return value

    def _write(self, member: str, entry: Entry) -> None:
        self._ended.pop(member, None)
        self._write_file(f"{member}{_ENTRY}", asdict(entry))

    def _write_file(self, name: str, value: Mapping[str, Any]) -> None:
        try:
            self._exchange.put(f"{self._folder.name}/{name}", value, patience_s=PATIENCE_S)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            "what was spent of the budget cannot be kept",
            got=f"{self._folder} ({error})",
            do="free space, or set checkpoint.storage to a folder that every node can write",
        )


def _search_s(ticks: Mapping[str, float] | None, now_s: float | None) -> float | None:
    """Seconds that a search has run up to now, or up to its last tick; None where there is no search. Pure."""
    if ticks is None:
        return None
    return ticks["earlier_s"] + (ticks["seen_s"] if now_s is None else now_s) - ticks["started_s"]
