from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import CapacityError
from orchestrator.planning.hardware import requested_cluster
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.planning.search_plan import plan_search, share_of_steps, trials_at_a_time
from orchestrator.planning.throughput import STARTUP_SECONDS
from orchestrator.quantities import parse_budget
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER


def trial(steps: int = 900, cluster: ClusterShape = CLUSTER) -> RunPlan:
    return make_plan(spec(PRETRAIN, training__steps=steps), cluster)


@pytest.mark.parametrize(
    ("steps", "rungs", "share"),
    [
        (900, (), 1.0),
        (900, (100, 300), (100 + 200 / 3 + 600 / 9) / 900),
        (250, (100, 300), (100 + 150 / 3) / 250),
        (100, (100, 300), 1.0),
    ],
)
def test_after_each_rung_one_in_three_takes_the_next_steps(steps: int, rungs: tuple[int, ...], share: float) -> None:
    assert share_of_steps(steps, rungs, 3) == pytest.approx(share)


def test_a_search_takes_what_its_trials_take_together_and_halving_pays_every_start_whole() -> None:
    plans = [trial(), trial(), trial(450)]
    found = plan_search(plans, names="abc", rungs=(100, 300), reduction_factor=3, at_a_time=2)
    whole, cut = found.all_to_their_end, found.halving
    assert whole is not None
    assert cut is not None
    hours = [plan.gpu_hours.mid for plan in plans if plan.gpu_hours]
    assert (whole.steps, whole.gpu_hours.mid) == (2250, pytest.approx(sum(hours)))
    assert whole.usd is not None
    assert whole.usd.mid == pytest.approx(sum(hours) * plans[0].usd_per_device_hour)
    assert whole.wall_hours.mid == pytest.approx(sum(hours) / 2), "two at a time, one worker each"
    assert cut.steps == round(2 * 900 * share_of_steps(900, (100, 300), 3) + 450 * share_of_steps(450, (100, 300), 3))
    start = STARTUP_SECONDS.mid / 3600
    assert cut.gpu_hours.mid - 3 * start == pytest.approx(
        2 * (hours[0] - start) * share_of_steps(900, (100, 300), 3)
        + (hours[2] - start) * share_of_steps(450, (100, 300), 3)
    )
    assert cut.wall_hours.mid >= hours[0], "the best trial runs to its end"
    beside = plan_search(plans, names="abc", rungs=(), reduction_factor=3, at_a_time=9).all_to_their_end
    assert beside is not None
    assert beside.wall_hours.mid == max(hours), "however many run beside it"


def test_a_search_whose_steps_are_open_has_no_total_and_one_without_rungs_no_halving() -> None:
    open_length = replace(trial(), steps=None, wall_hours=None, gpu_hours=None, usd=None)
    found = plan_search([trial(), open_length], names="ab", rungs=(100,), reduction_factor=3, at_a_time=1)
    assert (found.all_to_their_end, found.halving) == (None, None)
    assert plan_search([trial()], names="a", rungs=(), reduction_factor=3, at_a_time=1).halving is None


def test_trials_that_may_not_fit_are_named() -> None:
    found = plan_search(
        [trial(), replace(trial(), fits=False)], names=("00", "01"), rungs=(), reduction_factor=3, at_a_time=1
    )
    assert (found.fits, found.refused) == (False, ("01",))


def test_trials_run_beside_each_other_as_far_as_there_are_devices() -> None:
    gpus = requested_cluster("H100", 8)
    four = make_plan(spec(PRETRAIN, resources__workers=4), gpus)
    assert trials_at_a_time([trial(cluster=gpus), four], gpus, most=None) == 2
    assert trials_at_a_time([four], gpus, most=1) == 1
    assert trials_at_a_time([trial(), trial()], CLUSTER, most=None) == 2
    with pytest.raises(CapacityError, match="not even one trial fits"):
        trials_at_a_time([four], CLUSTER, most=None)


@pytest.mark.parametrize(("budget", "enough"), [("0.001gpu-hours", False), ("1e6flops", False), ("10usd", True)])
def test_a_budget_below_what_all_trials_take_is_pointed_out(budget: str, enough: bool) -> None:
    found = plan_search(
        [trial(), trial()],
        names="ab",
        rungs=(100,),
        reduction_factor=3,
        at_a_time=1,
        budget=parse_budget(budget),
    )
    assert found.all_to_their_end is not None
    assert found.all_to_their_end.flops == pytest.approx(2 * 900 * trial().flops_per_step)
    assert (found.notes == ()) is enough
    assert enough or "if rungs halve they take" in found.notes[0]
