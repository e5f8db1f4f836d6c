from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import DatasetCounts, RunPlan
from orchestrator.runs.job import WORKER_ENVIRONMENT
from orchestrator.worker.measurement import WARMUP_STEPS, Pace, figures, host_peak_gib, reset_host_peak
from tests import training_runs
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

COUNTS = DatasetCounts(train_samples=900, train_tokens=28_800, validation_samples=100, vocab_size=512)


def pace(*steps: tuple[float, int]) -> Pace:
    found = Pace()
    for seconds, tokens in steps:
        found.add_step(seconds=seconds, tokens=tokens)
    return found


def plan(**changes: object) -> RunPlan:
    return make_plan(spec(PRETRAIN, resources__workers=2, **changes), CLUSTER, counts=COUNTS)


def test_the_first_steps_are_left_out_where_others_follow() -> None:
    warmup = [(10.0, 100)] * WARMUP_STEPS
    measured = pace(*warmup, (1.0, 100), (2.0, 100), (3.0, 150))
    assert (measured.steps, measured.step_s, measured.tokens_per_second) == (3, 2.0, 50.0)
    assert pace(*warmup).step_s == 10.0
    assert pace().steps == 0


def test_a_pause_in_one_step_does_not_move_the_medians() -> None:
    steady = [(1.0, 100)] * 20
    assert pace(*steady, (500.0, 100)).tokens_per_second == pace(*steady).tokens_per_second


def test_pauses_between_steps_count_and_those_after_the_last_do_not() -> None:
    measured = pace(*[(1.0, 100)] * (WARMUP_STEPS + 5))
    measured.add_pause(2.0)
    measured.add_pause(3.0)
    assert measured.goodput == 1
    measured.add_step(seconds=1.0, tokens=100)
    measured.add_pause(50.0)
    assert measured.goodput == pytest.approx(6 / 11)
    assert (measured.step_s, measured.tokens_per_second) == (1.0, pytest.approx(600 / 11))
    measured.add_step(seconds=1.0, tokens=100)
    measured.add_step(seconds=1.0, tokens=100)
    assert measured.goodput == pytest.approx(8 / 63), "each pause counts once"


def test_predicted_stands_beside_measured() -> None:
    planned = plan()
    assert planned.gpu_hours is not None
    found = figures(planned, pace((0.5, 256)), counts=COUNTS, step=6, gpu_hours=0.01, peak_gib=0.7)
    assert found["predicted/gpu_hours"] == pytest.approx(planned.gpu_hours.mid)
    assert (found["measured/gpu_hours"], found["measured/peak_gib"]) == (0.01, 0.7)
    assert found["predicted/peak_gib"] == planned.peak_gib.mid
    assert found["measured/tokens_per_second"] == 512
    assert (found["measured/steps"], found["data/train_tokens"]) == (1, 28_800)
    assert {name.partition("/")[0] for name in found} == {"predicted", "measured", "data"}


def test_the_predicted_pace_is_that_of_steps_without_the_start() -> None:
    short, long = (
        figures(plan(training__steps=steps), pace((1, 1)), counts=COUNTS, step=1, gpu_hours=1, peak_gib=1)
        for steps in (6, 6000)
    )
    key = "predicted/tokens_per_second"
    assert short[key] == pytest.approx(long[key])
    assert short["predicted/gpu_hours"] == pytest.approx(long["predicted/gpu_hours"])


def test_what_was_predicted_is_scaled_to_the_steps_done() -> None:
    some = [
        figures(plan(), pace((1, 1)), counts=COUNTS, step=step, gpu_hours=1, peak_gib=1)["predicted/gpu_hours"]
        for step in (1, 3, 6)
    ]
    assert some == sorted(some)
    assert some[0] < some[-1]


def test_the_peak_of_a_process_holds_what_it_has_let_go_until_it_is_reset() -> None:
    reset_host_peak()
    before = host_peak_gib()
    block = bytearray(256 << 20)
    del block
    assert host_peak_gib() == pytest.approx(before + 0.25, abs=0.05)
    reset_host_peak()
    assert host_peak_gib() == pytest.approx(before, abs=0.05)


def test_what_an_earlier_training_has_freed_is_no_part_of_the_next_ones_peak() -> None:
    """In a worker's environment glibc keeps freed memory, for the next step to use."""
    script = (
        "from orchestrator.worker.measurement import host_peak_gib, reset_host_peak\n"
        "blocks = [bytearray(64 << 20) for _ in range(4)]\n"
        "end = bytearray(1 << 20)  # lies behind them, so the heap cannot shrink by itself\n"
        "del blocks\n"
        "reset_host_peak()\n"
        "print(host_peak_gib())"
    )
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


@pytest.mark.slow
def test_a_training_logs_predicted_beside_measured_and_a_resumed_one_its_own_pace(tmp_path: Path) -> None:
    changes = {"resources__workers": 2, "training__steps": 12, "training__eval_every_steps": 4}
    job = training_runs.pretrain(tmp_path, **changes)
    assert not [name for name in training_runs.run(job, stop_at=5).metrics if name.startswith("measured/")]
    metrics = training_runs.run(job).metrics
    assert metrics["measured/steps"] == 12 - 5 - WARMUP_STEPS
    assert metrics["predicted/peak_gib"] == job.plan.peak_gib.mid
    assert 0.2 < metrics["measured/peak_gib"] < 3, "a process with torch and DeepSpeed, resident"
    assert metrics["measured/gpu_hours"] >= metrics["cost/gpu_hours"] > 0
    assert metrics["measured/tokens_per_second"] <= job.plan.tokens_per_step / metrics["measured/step_s"] * 1.5
    assert 0 < metrics["measured/goodput"] < 1
    assert training_runs.run(job).metrics == metrics, "a finished run that runs again keeps its measurements"
