from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.plan import make_plan
from orchestrator.quantities import BUDGET_UNITS, Budget, BudgetUnit
from orchestrator.runs.attempts import Held
from orchestrator.runs.budget_ledger import Ledger, LedgerBudget
from orchestrator.runs.job import LoopState
from orchestrator.worker.budget import Account
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

PLAN = replace(make_plan(spec(PRETRAIN, resources__workers=2), CLUSTER), usd_per_device_hour=3.0)
"""Two workers, and two batches of held-out data in the accounts below."""


class Clock:
    """Time that passes when told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def account(clock: Clock) -> Account:
    return Account(PLAN, evaluated_samples=16, clock=clock)


def hours(seconds: float) -> Budget:
    return Budget(amount=seconds / 3600, unit="hours")


def take_step(account: Account, clock: Clock, seconds: float = 1.0) -> None:
    clock.now_s += seconds
    account.add_step(seconds=seconds, tokens=256, padded_tokens=256)


def test_every_second_of_an_attempt_counts_for_every_device(account: Account, clock: Clock) -> None:
    clock.now_s += 9.0  # loading and compiling
    take_step(account, clock)
    assert account.state() == LoopState(
        step=1, tokens=256, padded_tokens=256, wall_seconds=10.0, device_seconds=20.0, step_seconds=1.0
    )
    assert account.cost().gpu_hours == pytest.approx(20.0 / 3600)


def test_a_resumed_account_goes_on_from_its_checkpoint(account: Account, clock: Clock) -> None:
    account.resume(LoopState(step=5, tokens=1000, wall_seconds=50.0, device_seconds=100.0))
    assert account.pace_s == 10.0, "until this attempt has a pace of its own"
    take_step(account, clock)
    assert account.state() == LoopState(
        step=6, tokens=1256, padded_tokens=1256, wall_seconds=51.0, device_seconds=102.0, step_seconds=1.0
    )
    assert account.pace_s == 1.0


def test_room_is_kept_for_closing_before_it_was_ever_timed(account: Account, clock: Clock) -> None:
    take_step(account, clock)
    # A second spent, one for the next step, two for two batches of held-out data, four to leave; a little for the disk.
    assert not account.decide(hours(8.0)).go_on
    assert account.decide(hours(8.1)).go_on


def test_closing_is_an_evaluation_a_checkpoint_and_an_export_as_they_were_timed(account: Account, clock: Clock) -> None:
    take_step(account, clock)
    account.add_evaluation(3.0)
    account.add_evaluation(2.0)
    account.add_saving(5.0)
    assert not account.decide(hours(1.0 + 1.0 + 3.0 + 2 * 5.0 + 4.0 - 0.01)).go_on
    assert account.decide(hours(1.0 + 1.0 + 3.0 + 2 * 5.0 + 4.0 + 0.01)).go_on


def test_an_attempt_costs_from_when_its_workers_were_asked_for(clock: Clock) -> None:
    """Processes, imports and the building of the model hold the devices as much as steps do."""
    account = Account(PLAN, evaluated_samples=16, started_s_ago=30.0, clock=clock)
    assert account.cost().gpu_hours == pytest.approx(2 * 30.0 / 3600), "before the first step"
    assert not account.decide(hours(30.0)).go_on
    take_step(account, clock)
    assert account.cost().hours == pytest.approx(31.0 / 3600)
    assert account.cost().usd == pytest.approx(3.0 * 2 * 31.0 / 3600)
    assert account.pace_s == 1.0, "a start is no step"


def test_every_start_and_what_a_crash_lost_count_as_far_as_the_driver_knows(clock: Clock) -> None:
    account = Account(PLAN, evaluated_samples=16, started_s_ago=20.0, clock=clock)
    saved = LoopState(step=5, tokens=1280, wall_seconds=35.0, device_seconds=70.0, step_seconds=5.0)
    account.resume(saved, Held(wall_seconds=55.0, device_seconds=110.0))
    assert account.pace_s == 1.0, "that of the steps before, not of the time with their start"
    take_step(account, clock)
    assert account.cost().hours * 3600 == pytest.approx(55.0 + 20.0 + 1.0)
    assert account.cost().gpu_hours * 3600 == pytest.approx(110.0 + 2 * 21.0)
    again = Account(PLAN, evaluated_samples=16, clock=clock)
    again.resume(saved, Held())
    assert again.cost().hours * 3600 == pytest.approx(35.0), "of a driver that was killed the checkpoint knows"


def test_flops_are_those_of_padded_tokens_and_tokens_those_without(account: Account, clock: Clock) -> None:
    clock.now_s += 1.0
    account.add_step(seconds=1.0, tokens=100, padded_tokens=2 * PLAN.padded_tokens_per_step)
    assert account.state().tokens == 100
    assert account.cost().flops == pytest.approx(2 * PLAN.flops_per_step)


def test_a_checkpoint_that_knows_no_padding_goes_on_as_if_there_was_none(account: Account, clock: Clock) -> None:
    account.resume(LoopState(step=1, tokens=256))
    take_step(account, clock)
    assert account.cost().flops == pytest.approx(2 * 256 * PLAN.flops_per_step / PLAN.padded_tokens_per_step)


# -- with a ledger -------------------------------------------------------------------------------------------------


AMOUNT_OF_A_SECOND = {"hours": 1 / 3600, "gpu-hours": 2 / 3600, "usd": 6 / 3600, "flops": 0.0}
"""On the plan's two workers."""


def kept(folder: Path, seconds: float, unit: BudgetUnit = "hours", **every: Any) -> LedgerBudget:
    amount = seconds * AMOUNT_OF_A_SECOND[unit]
    cadence: dict[str, Any] = {"eval_every_steps": None, "save_every_steps": None, **every}
    return LedgerBudget(amount=amount, unit=unit, ledger=folder, member="run", **cadence)


def new_attempt(clock: Clock, state: LoopState | None = None) -> Account:
    account = Account(PLAN, evaluated_samples=16, clock=clock)
    if state is not None:
        account.resume(state)
    return account


def train(account: Account, clock: Clock, budget: Budget, *, step_s: float, most: int = 1000) -> int:
    """The loop's way with an account: steps as long as it allows them; gives their number."""
    steps = 0
    while steps < most and account.decide(budget).go_on:
        take_step(account, clock, step_s)
        steps += 1
    return steps


def close(account: Account, clock: Clock, *, evaluation_s: float, saving_s: float) -> None:
    clock.now_s += evaluation_s + 2 * saving_s
    account.add_evaluation(evaluation_s)
    account.add_saving(saving_s)


@given(st.sampled_from([unit for unit in BUDGET_UNITS if unit != "flops"]), st.floats(0.01, 2.0), st.floats(15, 30))
@settings(max_examples=40)
def test_steps_evaluations_checkpoints_and_the_end_stay_within_any_budget_of_time(
    tmp_path_factory: pytest.TempPathFactory, unit: BudgetUnit, step_s: float, seconds: float
) -> None:
    clock = Clock()
    account = new_attempt(clock)
    began = clock.now_s
    budget = kept(
        tmp_path_factory.mktemp("ledger"), seconds, unit, eval_every_steps=3, save_every_steps=4, rungs=(2, 3, 10)
    )
    close(account, clock, evaluation_s=2.0, saving_s=1.0)  # so that all is timed
    for _ in range(5000):
        if not account.decide(budget).go_on:
            break
        if account.step and (account.step % 3 == 0 or account.step in (2, 10)):
            clock.now_s += 2.0
        if account.step and account.step % 4 == 0:
            clock.now_s += 1.0
        take_step(account, clock, step_s)
    close(account, clock, evaluation_s=2.0, saving_s=1.0)
    clock.now_s += 4.0  # until the process has let go of its devices
    took_s = clock.now_s - began
    assert took_s <= seconds * (1 + 1e-9)
    assert took_s > seconds - step_s - 3.0 - 1e-6, "no more is left than a step with what fell due before it"


def test_flops_are_kept_to_the_step(tmp_path: Path, clock: Clock) -> None:
    account = new_attempt(clock)
    budget = replace(kept(tmp_path, 0), amount=5.5 * PLAN.flops_per_step, unit="flops")
    assert train(account, clock, budget, step_s=0.001) == 5


def test_seconds_that_a_crash_lost_are_spent(tmp_path: Path, clock: Clock) -> None:
    budget = kept(tmp_path, 100.0)
    saved = LoopState(step=5, tokens=5 * 256, wall_seconds=5.0, device_seconds=10.0)
    train(new_attempt(clock), clock, budget, step_s=1.0, most=30)
    clock.now_s += 1e4  # nobody holds a device until the next attempt
    after = new_attempt(clock, saved)
    train(after, clock, budget, step_s=1.0, most=1)
    assert after.cost().hours * 3600 == pytest.approx(31.0), "the thirty steps of before and one"
    assert after.cost().gpu_hours * 3600 == pytest.approx(62.0)
    assert after.cost().flops == pytest.approx(6 * 256 * PLAN.flops_per_step / PLAN.tokens_per_step)


def test_a_run_that_crashes_again_and_again_does_not_overrun(tmp_path: Path, clock: Clock) -> None:
    budget, began, paused = kept(tmp_path, 60.0), clock.now_s, 0.0
    for _ in range(20):  # always back to the start
        account = new_attempt(clock)
        if not train(account, clock, budget, step_s=1.0, most=7):
            break
        clock.now_s += 50.0
        paused += 50.0
    assert 50 < clock.now_s - began - paused <= 60.0


def test_what_a_run_spent_after_its_last_checkpoint_is_known_to_the_next_command(tmp_path: Path, clock: Clock) -> None:
    first = new_attempt(clock)
    train(first, clock, kept(tmp_path, 10.0), step_s=1.0)
    saved = first.state()
    unix = Clock()
    ledger = Ledger(tmp_path, clock=unix)
    entry = ledger.entry("run")
    assert entry is not None
    unix.now_s = entry.noted_s + 5.0  # exporting
    ledger.settle("run", PLAN, flops=0.0)
    again = new_attempt(clock, saved)
    again.decide(kept(tmp_path, 1000.0))
    assert again.cost().hours * 3600 == pytest.approx(saved.wall_seconds + 5.0)


def test_a_crash_before_the_first_checkpoint_says_nothing_of_the_pace(tmp_path: Path, clock: Clock) -> None:
    train(new_attempt(clock), clock, kept(tmp_path, 100.0), step_s=1.0, most=30)
    after = new_attempt(clock)
    assert after.decide(kept(tmp_path, 100.0)).go_on
    assert after.pace_s == 0.0


def test_the_ledger_is_not_asked_at_every_short_step(tmp_path: Path, clock: Clock) -> None:
    budget = replace(kept(tmp_path, 0), amount=1e30, unit="flops")
    account = Account(replace(PLAN, steps=1000), evaluated_samples=16, clock=clock)
    train(account, clock, budget, step_s=0.001, most=5)
    file = tmp_path / "run.entry"
    written = file.stat().st_ino, file.stat().st_mtime_ns
    train(account, clock, budget, step_s=0.001, most=50)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == written


def test_a_rewind_undoes_steps_and_not_the_time_they_took(clock: Clock) -> None:
    """Their devices were held and are paid for; their tokens and FLOPs count once, when they are done again."""
    account = new_attempt(clock, LoopState(step=2, tokens=512, wall_seconds=20.0, device_seconds=40.0))
    for _ in range(3):
        take_step(account, clock)
    account.rewind(LoopState(step=1, tokens=256, wall_seconds=5.0, device_seconds=10.0))
    take_step(account, clock)
    state = account.state()
    assert (state.step, state.tokens) == (2, 512)
    assert (state.wall_seconds, state.device_seconds) == (24.0, 48.0)
