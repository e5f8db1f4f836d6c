from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.intervals import Interval
from orchestrator.planning.hardware import find_device
from orchestrator.policy.corrections import (
    Correction,
    RunRecord,
    corrected,
    corrections,
    what_changed,
)

RUN = RunRecord(
    run_id="0",
    name="tiny",
    kind="pretrain",
    method="full",
    task="causal-lm",
    device_name="cpu",
    workers=2,
    precision="fp32",
    parameters=1_000_000,
    trainable_parameters=1_000_000,
    sequence_length=128,
    tokens_per_step=4096,
    flops_per_step=2.5e10,
    steps=100,
    measured_steps=97,
    predicted_tokens_per_second=1000.0,
    measured_tokens_per_second=1000.0,
    predicted_peak_gib=1.0,
    measured_peak_gib=1.0,
    predicted_gpu_hours=0.1,
    measured_gpu_hours=0.1,
    train_samples=1000,
    train_tokens=128_000,
    tokens_seen=409_600,
    data_source="reviews.csv",
    data_fingerprint="abc",
    eval_loss=3.0,
)
HOURS = Interval(low=0.7, mid=1.2, high=3.0)
INTERVALS = st.tuples(st.floats(1e-3, 1e6), st.floats(1.0001, 10), st.floats(1.0001, 10)).map(
    lambda drawn: Interval(low=drawn[0] / drawn[1], mid=drawn[0], high=drawn[0] * drawn[2])
)
SPEEDS = st.lists(st.floats(0.2, 4), max_size=8)


def runs_at(speeds: list[float], **changes: object) -> list[RunRecord]:
    return [replace(RUN, measured_tokens_per_second=1000 * speed, **changes) for speed in speeds]  # type: ignore[arg-type]


def throughput(speeds: list[float], **changes: object) -> Correction:
    return corrections(runs_at(speeds, **changes)).throughput("cpu", "fp32")


def noisy(speed: float, count: int, *, seed: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [speed * math.exp(drawn.gauss(0, 0.08)) for _ in range(count)]


def width(interval: Interval) -> float:
    return math.log(interval.high / interval.low)


# -- throughput ------------------------------------------------------------------------------------------------------


def test_without_runs_the_factor_is_one_as_wide_as_the_catalogue_says() -> None:
    found = throughput([])
    achieved = find_device("cpu").achieved_fraction
    assert (found.runs, found.factor.mid) == (0, 1.0)
    assert width(found.factor) == pytest.approx(math.log(achieved.high / achieved.low))
    assert "no run on cpu in fp32" in found.reason


def test_runs_on_another_device_or_in_another_precision_say_nothing() -> None:
    assert throughput([0.5] * 9, device_name="A100-80GB") == throughput([])
    assert throughput([0.5] * 9, precision="bf16") == throughput([])


def test_a_device_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SpecError, match="no such device"):
        corrections([]).throughput("abacus", "fp32")


def test_the_interval_narrows_with_every_run() -> None:
    widths = [width(throughput([0.62] * count).factor) for count in range(12)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 4


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5])
def test_the_factor_converges_to_the_truth(truth: float) -> None:
    found = throughput(noisy(truth, 200))
    assert found.factor.mid == pytest.approx(truth, rel=0.03)
    assert found.factor.low < truth < found.factor.high


def test_the_next_run_lies_inside_the_interval_nine_times_in_ten() -> None:
    drawn = random.Random(5)
    inside = 0
    for _ in range(300):
        machine, spread = math.exp(drawn.gauss(0, 0.4)), 0.1
        speeds = [machine * math.exp(drawn.gauss(0, spread)) for _ in range(drawn.randint(1, 12) + 1)]
        factor = throughput(speeds[1:]).factor
        inside += factor.low <= speeds[0] <= factor.high
    assert 0.85 <= inside / 300 <= 0.96


@pytest.mark.parametrize("absurd", [0.01, 0.2, 20.0])
def test_one_absurd_run_of_twenty_moves_the_factor_by_less_than_a_tenth(absurd: float) -> None:
    usual = noisy(0.62, 20)
    with_it, without = throughput([*usual[:19], absurd]), throughput(usual)
    assert with_it.factor.mid == pytest.approx(without.factor.mid, rel=0.10)


def test_a_lone_run_under_load_is_not_taken_for_the_machine() -> None:
    assert throughput([0.01]).factor.mid > 0.7
    assert throughput([0.01] * 5).factor.mid < 0.02


def test_a_run_of_few_steps_counts_less() -> None:
    long, short = throughput([0.5]), throughput([0.5], measured_steps=2)
    assert long.factor.mid < short.factor.mid < 1
    assert width(long.factor) < width(short.factor)


def test_runs_of_another_size_count_less_however_many_they_are() -> None:
    known = corrections(runs_at([0.01] * 50, parameters=1_000_000))
    near, far = (known.throughput("cpu", "fp32", parameters=size) for size in (1e6, 7e9))
    assert near.factor.mid < 0.02
    assert far.factor.mid > 0.5
    assert width(far.factor) > 0.9 * width(throughput([]).factor)
    many = known.throughput("cpu", "fp32", parameters=1e6, devices=64)
    assert width(near.factor) < width(many.factor)


@given(SPEEDS)
def test_a_factor_contains_its_middle(speeds: list[float]) -> None:
    factor = throughput(speeds).factor
    assert 0 < factor.low < factor.mid < factor.high


@given(st.floats(0.3, 3), st.floats(1.05, 2))
def test_faster_runs_never_give_a_lower_factor(speed: float, faster: float) -> None:
    assert throughput([speed * faster] * 3).factor.mid > throughput([speed] * 3).factor.mid


# -- memory and quality ------------------------------------------------------------------------------------------------


def test_memory_is_corrected_by_measured_peaks() -> None:
    found = corrections([replace(RUN, measured_peak_gib=1.3)] * 5).memory("cpu")
    assert found.factor.mid == pytest.approx(1.3, rel=0.01)
    assert width(found.factor) < width(corrections([]).memory("cpu").factor)
    assert found.reason.startswith("5 runs on cpu: memory 1.30 x the planned (")


def test_peaks_of_small_trainings_say_less_about_a_large_one() -> None:
    known = corrections([replace(RUN, measured_peak_gib=1.5)] * 5)
    assert known.memory("cpu", peak_gib=80).factor.mid < known.memory("cpu", peak_gib=1).factor.mid


@pytest.mark.parametrize("data", ["reviews.csv", "./reviews.csv", "abc"])
def test_loss_is_corrected_by_runs_on_the_same_data(data: str) -> None:
    known = corrections([RUN, replace(RUN, data_source="other.csv", data_fingerprint="def", eval_loss=9.0)])
    found = known.loss(data, "causal-lm", predicted=lambda run: 2.5, prior_sd=0.2)
    assert found.runs == 1
    assert found.factor.mid == pytest.approx(1.2, rel=0.02)


def test_error_is_corrected_by_accuracy_and_runs_of_other_tasks_say_nothing() -> None:
    run = replace(RUN, task="text-classification", eval_accuracy=0.8)
    known = corrections([run] * 4)
    found = known.error("abc", "text-classification", predicted=lambda run: 0.1, prior_sd=0.5)
    assert found.factor.mid == pytest.approx(2.0, rel=0.03)
    assert known.error("abc", "causal-lm", predicted=lambda run: 0.1, prior_sd=0.5).runs == 0


def test_a_run_that_the_laws_know_nothing_of_is_passed_over() -> None:
    assert corrections([RUN]).loss("abc", "causal-lm", predicted=lambda run: None, prior_sd=0.2).runs == 0


# -- applied ---------------------------------------------------------------------------------------------------------


@given(INTERVALS)
def test_without_runs_a_figure_stays(before: Interval) -> None:
    assert corrected("hours", before, throughput([])).after == before


@given(INTERVALS, SPEEDS)
def test_a_corrected_interval_contains_its_middle(before: Interval, speeds: list[float]) -> None:
    after = corrected("hours", before, throughput(speeds)).after
    assert 0 < after.low <= after.mid <= after.high


def test_half_the_throughput_takes_twice_the_hours() -> None:
    after = corrected("hours", HOURS, throughput([0.5] * 30)).after
    assert after.mid == pytest.approx(2 * HOURS.mid, rel=0.03)
    assert width(after) < width(HOURS) / 3
    assert math.log(after.high / after.mid) > math.log(after.mid / after.low), "as lopsided as it was"


def test_memory_is_multiplied() -> None:
    more = corrections([replace(RUN, measured_peak_gib=1.3)] * 30).memory("cpu")
    before = Interval(low=8.5, mid=10.0, high=13.0)
    assert corrected("peak_gib", before, more).after.mid == pytest.approx(13.0, rel=0.02)


def test_a_figure_that_is_known_stays() -> None:
    known = Interval(low=2.0, mid=2.0, high=2.0)
    assert corrected("hours", known, throughput([0.5] * 9)).after == known


def test_what_changed_names_runs_factor_and_figures_once() -> None:
    slow, nothing = throughput([0.62] * 3), corrections([]).memory("cpu")
    hours = corrected("hours", HOURS, slow)
    usd = corrected("usd", HOURS.scaled(10), slow)
    peak = corrected("peak_gib", HOURS, nothing)
    (sentence,) = what_changed([hours, usd, peak])
    assert sentence.startswith("3 runs on cpu in fp32: throughput 0.62 x the catalogue's (0.5")
    assert sentence.endswith("; hours 1.2 -> 1.9, usd 12 -> 19")
