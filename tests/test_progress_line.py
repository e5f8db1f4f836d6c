from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.progress_line import describe, describe_search, parse, parse_search, standing, telling

FIGURES = st.floats(min_value=1e-6, max_value=1e6)
SHARES = st.one_of(st.none(), st.integers(0, 10_000).map(lambda n: n / 10_000))
UNITS = ("usd", "gpu-hours", "flops", "hours")


@st.composite
def progresses(draw: st.DrawFn) -> dict[str, Any]:
    steps, unit = draw(st.integers(1, 10**9)), draw(st.sampled_from(UNITS))
    metrics = {name: draw(FIGURES) for name in draw(st.sets(st.sampled_from(("train/loss", "eval/loss"))))}
    if draw(st.booleans()):
        shares = {"eval/accuracy": draw(SHARES), "eval/macro_f1": draw(SHARES)}
        metrics |= {name: value for name, value in shares.items() if value is not None} | {"cost/usd": 1.0}
    return {
        "step": draw(st.integers(0, steps)),
        "steps": steps,
        "tokens_per_second": draw(st.floats(min_value=0, max_value=1e13)),
        "eta_s": draw(st.floats(min_value=0, max_value=1e7)),
        "metrics": metrics,
        "phase": draw(st.sampled_from(("starting", "training", "evaluating", "saving", "exporting"))),
        "spent": draw(st.one_of(st.just(0.0), st.floats(min_value=1e-9, max_value=1e30))),
        "unit": unit,
        "budget": draw(st.one_of(st.none(), st.floats(min_value=1e-9, max_value=1e30).map(lambda n: f"{n:g}{unit}"))),
    }


@given(progresses())
def test_what_is_read_from_a_line_makes_the_same_line_again(progress: dict[str, Any]) -> None:
    line = describe(progress)
    found = parse(line)
    assert found is not None
    assert describe(found) == line
    assert (found["step"], found["steps"], found["phase"]) == (progress["step"], progress["steps"], progress["phase"])


@given(progresses())
def test_what_is_read_is_what_was_meant_to_the_digits_shown(progress: dict[str, Any]) -> None:
    found = parse(describe(progress))
    assert found is not None
    if progress["spent"]:
        assert math.isclose(found["spent"], progress["spent"], rel_tol=6e-3)
        assert found["unit"] == progress["unit"]
        assert found["budget"] == progress["budget"]
    if progress["phase"] == "training" and progress["eta_s"]:
        assert abs(found["eta_s"] - progress["eta_s"]) <= (0.5 if progress["eta_s"] < 3599.5 else 60)
    if "train/loss" in progress["metrics"]:
        assert abs(found["metrics"]["train/loss"] - progress["metrics"]["train/loss"]) <= 1e-4
        assert math.isclose(found["tokens_per_second"], progress["tokens_per_second"], rel_tol=6e-3)


def test_a_line_says_step_loss_speed_and_what_is_left() -> None:
    progress = {"step": 40, "steps": 200, "tokens_per_second": 12345.0, "eta_s": 65.0, "phase": "training"}
    progress |= {"metrics": {"train/loss": 3.21}, "spent": 0.12, "unit": "usd", "budget": "5usd"}
    assert describe(progress) == "step 40/200  loss 3.2100  12.3k tokens/s  ETA 1m05s  spent 0.12usd of 5usd"


@pytest.mark.parametrize(
    "line", ["", "preparing data", "trial 3 step 10: eval/loss 2.5", "steps: 60, as set", "step 3"]
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert parse(line) is None


@given(st.text())
def test_no_text_upsets_the_reader(text: str) -> None:
    parse(text)
    parse(f"step 1/2  loss {text}")
    standing(text.splitlines())


def test_a_run_stands_where_its_newest_line_says() -> None:
    lines = ["preparing data", "starting workers", "step 1/9  spent 0.1usd", "step 4/9  spent 0.2usd of 1usd"]
    stands = standing(lines)
    assert stands.progress is not None
    assert stands.progress["step"] == 4
    assert stands.doing == ""
    assert standing(lines[:2]).doing == "starting workers"
    assert standing([*lines, "stopping: saving a checkpoint"]).doing == "stopping: saving a checkpoint"


def test_a_run_that_waits_says_so_until_it_goes_on() -> None:
    waiting = ["preparing data", "waiting for room: 8 GPUs, 4 are free; place 2 in the queue"]
    assert (standing(waiting).waits, standing(waiting).place) == (True, 2)
    assert standing(["waiting for room: 8 GPUs"]).place is None
    assert not standing([*waiting, "starting workers"]).waits
    assert not standing([*waiting, "step 1/9"]).waits


def test_of_a_search_the_trial_is_told_that_reported_last() -> None:
    assert standing(["trial 0 step 5: eval/loss 3", "trial 2 step 10: eval/loss 2.5"]).trial == "2 step 10"


def test_a_search_says_how_many_trials_have_ended_and_what_is_left_of_time_and_money() -> None:
    line = describe_search(3, 12, eta_s=1862.0, spent=0.12, unit="usd", budget="5usd")
    assert line == "trials 3/12  ETA 31m02s  spent 0.12usd of 5usd"
    told = {"ended": 3, "trials": 12, "eta_s": 1862.0, "spent": 0.12, "unit": "usd", "budget": "5usd"}
    assert parse_search(line) == told
    assert parse(line) is None
    assert parse_search("step 3/12  spent 0.1usd") is None
    assert describe_search(12, 12, eta_s=0.0, spent=0.0, unit="usd", budget=None) == "trials 12/12"
    stands = standing(["trial 0 finished at step 5 (3 of 12)", line, "trial 2 step 10: eval/loss 2.5"])
    assert (stands.search, stands.trial, stands.doing) == (told, "2 step 10", "")


def test_macro_f1_is_shown_where_it_says_other_than_the_accuracy() -> None:
    assert telling({"eval/accuracy": 0.9, "eval/macro_f1": 0.89, "train/loss": 1.0}) == {"eval/accuracy": 0.9}
    both = {"eval/accuracy": 0.99, "eval/macro_f1": 0.5}
    assert telling(both) == both
    for alone in ({"eval/loss": 1.0}, {"eval/accuracy": 0.0}, {"eval/macro_f1": 1.0}):
        assert telling(alone) == alone
