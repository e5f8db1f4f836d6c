import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.plan import make_plan
from orchestrator.quantities import BUDGET_UNITS, Budget
from orchestrator.training.budget import Account, Cost, decide
from orchestrator.training.job import LoopState
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

NOTHING = Cost(hours=0, gpu_hours=0, usd=0, flops=0)


def cost(amount: float) -> Cost:
    return Cost(hours=amount, gpu_hours=amount, usd=amount, flops=amount)


@given(st.sampled_from(BUDGET_UNITS), st.floats(0.1, 1e6), st.floats(0, 1e6), st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_step_is_taken_only_if_it_and_the_closing_work_fit(
    unit: str, amount: float, spent: float, step: float, closing: float
) -> None:
    decision = decide(Budget(amount=amount, unit=unit), spent=cost(spent), next_step=cost(step), closing=cost(closing))  # type: ignore[arg-type]
    assert decision.go_on == (spent + step + closing <= amount)
    assert decision.go_on or f"{Budget(amount=amount, unit=unit)}" in decision.reason  # type: ignore[arg-type]


def test_only_the_budgets_own_unit_counts() -> None:
    spent = Cost(hours=100, gpu_hours=100, usd=0.5, flops=1e30)
    assert decide(Budget(amount=1, unit="usd"), spent=spent, next_step=NOTHING, closing=NOTHING).go_on


# -- an account --------------------------------------------------------------------------------------------------------


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
    plan = make_plan(spec(PRETRAIN, resources__workers=2), CLUSTER)
    return Account(plan, validation_samples=16, clock=clock)


def hours(seconds: float) -> Budget:
    return Budget(amount=seconds / 3600, unit="hours")


def take_step(account: Account, clock: Clock, seconds: float = 1.0) -> None:
    clock.now_s += seconds
    account.add_step(seconds=seconds, tokens=256)


def test_every_second_of_an_attempt_counts_for_every_device(account: Account, clock: Clock) -> None:
    clock.now_s += 9.0  # loading and compiling
    take_step(account, clock)
    assert account.state() == LoopState(step=1, tokens=256, wall_seconds=10.0, device_seconds=20.0)
    assert account.cost().gpu_hours == pytest.approx(20.0 / 3600)


def test_a_resumed_account_goes_on_from_its_checkpoint(account: Account, clock: Clock) -> None:
    account.resume(LoopState(step=5, tokens=1000, wall_seconds=50.0, device_seconds=100.0))
    assert account.pace_s == 10.0, "until this attempt has a pace of its own"
    take_step(account, clock)
    assert account.state() == LoopState(step=6, tokens=1256, wall_seconds=51.0, device_seconds=102.0)
    assert account.pace_s == 1.0


def test_room_is_kept_for_closing_before_it_was_ever_timed(account: Account, clock: Clock) -> None:
    take_step(account, clock)
    # One second spent, one for the next step, two for two batches of held-out data, and something for the disk.
    assert not account.decide(hours(4.0)).go_on
    assert account.decide(hours(4.1)).go_on


def test_closing_is_an_evaluation_a_checkpoint_and_an_export_as_they_were_timed(account: Account, clock: Clock) -> None:
    take_step(account, clock)
    account.add_evaluation(3.0)
    account.add_evaluation(2.0)
    account.add_saving(5.0)
    assert not account.decide(hours(1.0 + 1.0 + 3.0 + 2 * 5.0 - 0.01)).go_on
    assert account.decide(hours(1.0 + 1.0 + 3.0 + 2 * 5.0 + 0.01)).go_on
