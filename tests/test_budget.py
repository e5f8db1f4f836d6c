from hypothesis import given
from hypothesis import strategies as st

from orchestrator.quantities import BUDGET_UNITS, Budget
from orchestrator.training.budget import Cost, decide

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
