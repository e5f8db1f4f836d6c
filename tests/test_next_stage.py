from __future__ import annotations

from typing import Any

import pytest

from orchestrator.load_stages import parse_stages
from orchestrator.quantities import parse_budget
from orchestrator.scheduling.decisions.next_stage import (
    Begin,
    DoneStage,
    Over,
    metrics_of_whole,
    next_stage,
)
from orchestrator.spec_stages import StagedSpec
from tests.test_load_stages import STAGES


def staged(**fields: Any) -> StagedSpec:
    return parse_stages({**STAGES, **fields})


def done(model: str = "runs/domain/model", *, spent: float = 0.0, status: str = "finished") -> DoneStage:
    return DoneStage(status=status, model_path=model, spent=spent)


def begun(step: Begin | Over) -> Begin:
    assert isinstance(step, Begin), step
    return step


def test_the_first_stage_begins_as_it_is() -> None:
    step = begun(next_stage(staged(), []))
    assert step.spec == staged().first
    assert step.reason == "stage 1 of 2: domain"


def test_a_later_stage_begins_with_the_model_of_the_one_before() -> None:
    step = begun(next_stage(staged(), [done()]))
    assert (step.spec.name, step.spec.model.base) == ("films.classify", "runs/domain/model")
    assert step.reason == "stage 2 of 2: classify, from the model of domain"


def test_the_first_stage_of_a_later_cycle_begins_with_the_model_of_the_last_stage() -> None:
    step = begun(next_stage(staged(cycles=2), [done(), done("runs/classify/model")]))
    assert (step.spec.name, step.spec.model.base) == ("films.domain.2", "runs/classify/model")
    assert step.reason == "stage 3 of 4: domain (cycle 2), from the model of classify (cycle 1)"


def test_after_the_last_stage_all_is_finished() -> None:
    assert next_stage(staged(), [done(), done()]) == Over(status="finished", reason="all 2 stages are finished")


def test_a_stage_may_spend_what_those_before_it_have_left() -> None:
    step = begun(next_stage(staged(budget="5usd"), [done(spent=1.5)]))
    left = step.spec.parsed_budget
    assert left is not None
    assert (left.amount, left.unit) == (3.5, "usd")
    assert step.reason.endswith("; 3.5usd of 5usd are left")


@pytest.mark.parametrize("spent", [0.1 + 0.2, 1 / 3, 1e-7, 4.999999])
def test_what_is_left_is_the_same_to_the_last_bit_when_it_is_asked_again(spent: float) -> None:
    left = [begun(next_stage(staged(budget="5hours"), [done(spent=spent)])).spec.budget for _ in range(2)]
    assert left[0] == left[1]
    assert parse_budget(str(left[0])).amount == 5 - spent


def test_a_budget_that_is_spent_before_a_stage_begins_ends_the_whole() -> None:
    step = next_stage(staged(budget="5usd"), [done(spent=5.0)])
    assert isinstance(step, Over)
    assert step.status == "stopped_by_budget"
    assert "5usd was spent before stage classify began" in step.reason


def test_a_stage_that_the_budget_stopped_ends_the_whole_even_where_it_is_the_last() -> None:
    for before in ([], [done()]):
        step = next_stage(staged(budget="5usd"), [*before, done(spent=4.9, status="stopped_by_budget")])
        assert isinstance(step, Over)
        assert step.status == "stopped_by_budget"
        assert ("classify" if before else "domain") in step.reason


def test_the_whole_has_the_figures_of_the_last_stage_and_the_costs_of_all() -> None:
    first, last = {"eval/loss": 2.9, "cost/usd": 1.0, "cost/flops": 5.0}, {"eval/accuracy": 0.8, "cost/usd": 0.5}
    assert metrics_of_whole([first, last]) == {"eval/accuracy": 0.8, "cost/usd": 1.5, "cost/flops": 5.0}
