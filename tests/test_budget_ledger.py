from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import StorageError
from orchestrator.planning.plan import make_plan
from orchestrator.quantities import BUDGET_UNITS, Budget, BudgetUnit
from orchestrator.runs.budget_ledger import Cost, Entry, Ledger, LedgerBudget, decide, time_cost, with_ledger
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

NOTHING = Cost()
PLAN = make_plan(spec(PRETRAIN, resources__workers=2), CLUSTER)
FLOPS = Budget(amount=100.0, unit="flops")


def cost(amount: float) -> Cost:
    return Cost(hours=amount, gpu_hours=amount, usd=amount, flops=amount)


@given(st.sampled_from(BUDGET_UNITS), st.floats(0.1, 1e6), st.floats(0, 1e6), st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_step_is_taken_only_if_it_and_the_closing_work_fit(
    unit: BudgetUnit, amount: float, spent: float, step: float, closing: float
) -> None:
    budget = Budget(amount=amount, unit=unit)
    decision = decide(budget, spent=cost(spent), next_step=cost(step), closing=cost(closing))
    assert decision.go_on == (spent + step + closing <= amount)
    assert decision.go_on or f"{budget}" in decision.reason


def test_only_the_budgets_own_unit_counts() -> None:
    spent = Cost(hours=100, gpu_hours=100, usd=0.5, flops=1e30)
    assert decide(Budget(amount=1, unit="usd"), spent=spent, next_step=NOTHING, closing=NOTHING).go_on


def test_an_hour_of_two_workers_is_two_device_hours_at_their_price() -> None:
    plan = replace(PLAN, usd_per_device_hour=3.0)
    assert time_cost(3600, plan) == Cost(hours=1.0, gpu_hours=2.0, usd=6.0)


def test_a_spec_carries_its_ledger_to_a_worker_and_is_the_same_run(tmp_path: Path) -> None:
    plain = spec(PRETRAIN, budget="5usd", training__eval_every_steps=4, checkpoint__every_steps=3)
    kept = pickle.loads(pickle.dumps(with_ledger(plain, tmp_path, member="a", rungs=(2, 6))))
    assert kept.parsed_budget == LedgerBudget(
        amount=5, unit="usd", ledger=tmp_path, member="a", eval_every_steps=4, rungs=(2, 6), save_every_steps=3
    )
    assert kept.fingerprint() == plain.fingerprint()
    assert kept.model_dump() == plain.model_dump()
    assert f"{kept.parsed_budget}" == f"{plain.parsed_budget}"
    unlimited = spec(PRETRAIN)
    assert with_ledger(unlimited, tmp_path, member="a") is unlimited


# -- claims --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when told."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    return Ledger(tmp_path / "ledger", clock=clock)


def flops(amount: float) -> Cost:
    return Cost(flops=amount)


def test_a_claim_is_held_beside_what_all_others_have_spent_and_hold(ledger: Ledger) -> None:
    first = Entry(spent=flops(20), ahead=flops(10), closing=flops(5))
    assert ledger.claim(FLOPS, "a", first).go_on
    assert ledger.claim(FLOPS, "b", Entry(spent=flops(40), ahead=flops(20), closing=flops(5))).go_on
    refused = ledger.claim(FLOPS, "a", replace(first, ahead=flops(10.1)))
    assert not refused.go_on
    assert "85 spent" in refused.reason  # 20 of its own and the 65 of the other


def test_a_refused_run_keeps_what_it_takes_to_close_and_leaves_the_rest_to_others(ledger: Ledger) -> None:
    assert ledger.claim(FLOPS, "a", Entry(spent=flops(60), ahead=flops(10), closing=flops(10))).go_on
    assert not ledger.claim(FLOPS, "b", Entry(ahead=flops(20), closing=flops(5))).go_on
    assert not ledger.claim(FLOPS, "a", Entry(spent=flops(70), ahead=flops(15.1), closing=flops(10))).go_on
    assert ledger.claim(FLOPS, "a", Entry(spent=flops(70), ahead=flops(15), closing=flops(10))).go_on


def test_a_run_that_ends_gives_back_what_it_held(ledger: Ledger) -> None:
    ledger.claim(FLOPS, "pruned", Entry(spent=flops(10), ahead=flops(30), closing=flops(20)))
    other = Entry(spent=flops(50), ahead=flops(30), closing=flops(10))
    assert not ledger.claim(FLOPS, "other", other).go_on
    ledger.settle("pruned", PLAN, flops=10)
    assert ledger.claim(FLOPS, "other", other).go_on
    assert not ledger.claim(FLOPS, "other", replace(other, ahead=flops(30.1))).go_on


@pytest.mark.parametrize("unit", BUDGET_UNITS)
def test_the_time_of_the_closing_work_is_spent_too(ledger: Ledger, clock: Clock, unit: BudgetUnit) -> None:
    plan = replace(PLAN, usd_per_device_hour=3.0)
    ledger.claim(Budget(amount=1e9, unit=unit), "a", Entry(spent=time_cost(3600, plan), ahead=flops(7)))
    clock.now_s += 1800
    ledger.settle("a", plan, flops=5.0)
    entry = ledger.entry("a")
    assert entry is not None
    assert entry.spent == Cost(hours=1.5, gpu_hours=3.0, usd=9.0, flops=5.0)
    clock.now_s += 1800
    ledger.settle("a", plan, flops=5.0)
    assert ledger.entry("a") == entry, "it ended once"


def test_what_others_wrote_after_the_last_look_is_seen(tmp_path: Path) -> None:
    mine, theirs = Ledger(tmp_path), Ledger(tmp_path)
    for spent in (10, 20, 80):
        theirs.claim(FLOPS, "b", Entry(spent=flops(spent)))
        assert mine.claim(FLOPS, "a", Entry(ahead=flops(25))).go_on == (spent < 80)
    theirs.settle("b", PLAN, flops=80)
    assert not mine.claim(FLOPS, "a", Entry(ahead=flops(25))).go_on


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 30), st.floats(0, 5)), max_size=40))
@settings(max_examples=40)
def test_whatever_runs_claim_the_budget_is_never_overrun(claims: list[tuple[str, float, float]]) -> None:
    """Each run spends all that it was granted, and what it takes to close when it is refused."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        spent, reserve, over = dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 0.0), set()
        for name, step, closing in claims:
            if name in over:
                continue
            closing = min(closing, reserve[name]) if name in reserve and spent[name] else closing
            entry = Entry(spent=flops(spent[name]), ahead=flops(step), closing=flops(closing))
            first = spent[name] == 0
            if ledger.claim(FLOPS, name, entry).go_on:
                spent[name] += step
                reserve[name] = closing
            else:
                spent[name] += 0.0 if first else closing
                ledger.settle(name, PLAN, flops=spent[name])
                over.add(name)
        assert sum(spent.values()) <= 100.0 * (1 + 1e-9)


# -- who may begin -------------------------------------------------------------------------------------------------


HOURS = Budget(amount=10.0, unit="gpu-hours")


def device_hours(amount: float) -> Cost:
    return Cost(gpu_hours=amount)


def test_the_first_run_may_always_begin(ledger: Ledger) -> None:
    assert ledger.admit(FLOPS, "a", first_step=flops(1e9)).go_on
    assert ledger.is_running("a")
    assert not ledger.admit(FLOPS, "b", first_step=flops(1)).go_on
    assert not ledger.is_running("b")


def test_a_run_begins_only_if_what_others_took_to_come_to_something_is_left(ledger: Ledger) -> None:
    ledger.claim(HOURS, "a", Entry(spent=device_hours(7), least=device_hours(2)))
    assert ledger.admit(HOURS, "b", first_step=flops(1)).go_on
    assert not ledger.admit(HOURS, "c", first_step=flops(1)).go_on, "b holds what is left for its own first step"
    ledger.settle("b", PLAN, flops=0)
    assert ledger.admit(HOURS, "c", first_step=flops(1)).go_on


def test_a_run_that_ended_may_begin_again_while_something_is_left(ledger: Ledger) -> None:
    for spent in (2, 4):
        assert ledger.admit(HOURS, "a", first_step=NOTHING).go_on
        assert ledger.is_running("a")
        ledger.claim(HOURS, "a", Entry(spent=device_hours(spent)))
        ledger.settle("a", PLAN, flops=0)
        assert not ledger.is_running("a")


def test_a_refused_run_holds_nothing_and_keeps_what_it_had_spent(ledger: Ledger) -> None:
    ledger.claim(HOURS, "a", Entry(spent=device_hours(6), least=device_hours(5)))
    before = Entry(spent=device_hours(1), least=device_hours(1))
    ledger.claim(HOURS, "b", before)
    ledger.settle("b", PLAN, flops=0)
    kept = ledger.entry("b")
    assert not ledger.admit(HOURS, "b", first_step=NOTHING).go_on
    assert ledger.entry("b") == kept
    assert kept is not None
    assert kept.spent.gpu_hours >= 1


def test_after_a_drivers_death_its_runs_hold_nothing_but_their_next_steps_count(ledger: Ledger) -> None:
    ledger.claim(HOURS, "a", Entry(spent=device_hours(3), ahead=device_hours(1), closing=device_hours(4)))
    again = Ledger(ledger._folder)
    again.settle_dead()
    assert again.entry("a") == Entry(spent=device_hours(4))
    assert not again.is_running("a")
    assert again.admit(HOURS, "a", first_step=NOTHING).go_on


# -- hours of a search ---------------------------------------------------------------------------------------------


def test_the_hours_of_a_search_pass_once_however_many_trials_run(ledger: Ledger, clock: Clock) -> None:
    budget = Budget(amount=1.0, unit="hours")
    ledger.start_clock()
    clock.now_s += 1800
    ledger.tick()
    half = Entry(spent=Cost(hours=0.5), ahead=Cost(hours=0.3), closing=Cost(hours=0.1))
    for name in "abcd":
        assert ledger.claim(budget, name, half).go_on
    clock.now_s += 720
    assert not ledger.claim(budget, "a", half).go_on, "its own hours do not matter, the search's do"


def test_what_a_search_has_spent_is_what_its_runs_have_and_of_hours_its_own(ledger: Ledger, clock: Clock) -> None:
    by_flops, by_hours = Budget(amount=10.0, unit="flops"), Budget(amount=10.0, unit="hours")
    for member in ("a", "b"):
        ledger.claim(by_flops, member, Entry(spent=Cost(flops=2.0, hours=1.0), ahead=flops(3.0)))
    assert ledger.spent(by_flops) == 4.0, "what is held is not spent"
    assert ledger.spent(by_hours) == 2.0
    ledger.start_clock()
    clock.now_s += 1800
    assert ledger.spent(by_hours) == 0.5


def test_the_hours_of_a_search_stand_still_while_its_driver_is_dead(ledger: Ledger, clock: Clock) -> None:
    budget = Budget(amount=1.0, unit="hours")
    ledger.start_clock()
    clock.now_s += 1800
    ledger.tick()
    clock.now_s += 1e6
    again = Ledger(ledger._folder, clock=clock)
    again.start_clock()
    assert again.claim(budget, "a", Entry(ahead=Cost(hours=0.49))).go_on
    assert not again.claim(budget, "a", Entry(ahead=Cost(hours=0.51))).go_on
    clock.now_s += 900
    assert not again.claim(budget, "a", Entry(ahead=Cost(hours=0.26))).go_on


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_ledger_that_cannot_be_written_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"budget cannot be kept(.|\n)*checkpoint\.storage"):
        Ledger(tmp_path / "file" / "ledger").claim(FLOPS, "a", Entry())


def test_a_torn_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.entry").write_text("{")
    with pytest.raises(StorageError, match="has spent of its budget is damaged"):
        Ledger(tmp_path).entry("a")


@pytest.mark.parametrize(("said", "kept"), [(0.0, 10.0), (9.0, 10.0), (12.0, 12.0)])
def test_of_two_counts_of_a_runs_flops_the_larger_is_spent(ledger: Ledger, said: float, kept: float) -> None:
    """Neither counts too much: a claim knows no steps after it, and who settles may know only of an evaluation, or,
    where the run failed, of nothing."""
    ledger.claim(FLOPS, "a", Entry(spent=flops(10), ahead=flops(5)))
    ledger.settle("a", PLAN, flops=said)
    entry = ledger.entry("a")
    assert entry is not None
    assert entry.spent.flops == kept
