"""The quick half of the chaos suite, on a real cluster of four nodes, and the arithmetic behind its table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import table
from tests.chaos.curves import LOSSES, Point, Tracked, difference, longest_pause_s, out_of_order
from tests.chaos.processes import ROOT
from tests.chaos.runner import Row, size_problems
from tests.chaos.scenarios import LAYOUTS, SCENARIOS, STEPS, random_scenario
from tests.chaos.scene import RunFiles

QUICK = [scenario.name for scenario in SCENARIOS if scenario.quick]


@pytest.fixture(scope="module")
def played() -> subprocess.CompletedProcess[str]:
    """The suite in a process of its own, which takes its namespaces, cluster and faults with it when it ends."""
    command = [sys.executable, "-m", "tests.chaos.run", "--quick", "--json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)


@pytest.mark.slow
@pytest.mark.timeout(1260)
@pytest.mark.parametrize("name", QUICK)
def test_after_the_fault_the_run_is_the_run_it_would_have_been(
    played: subprocess.CompletedProcess[str], name: str
) -> None:
    assert played.stdout, played.stderr
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in json.loads(played.stdout)["rows"]}
    assert rows[name]["problems"] == []
    assert rows[name]["apart"] == 0.0
    assert rows[name]["metrics_lost"] == 0
    assert 0 <= rows[name]["steps_again"] < STEPS


# -- the arithmetic --------------------------------------------------------------------------------------------------


def run(*losses: tuple[int, float], metric: str = "train/loss") -> Tracked:
    points = tuple(Point(step=step, value=value, at_s=float(step)) for step, value in losses)
    return Tracked(run_ids=("1",), status="FINISHED", tags={}, metrics={metric: points})


def test_equal_curves_differ_by_nothing() -> None:
    found = difference(run((1, 2.0), (2, 1.0)), run((1, 2.0), (2, 1.0)))
    assert (found.largest, found.missing, found.twice) == (0.0, 0, 0)


def test_the_smallest_difference_is_found_and_named() -> None:
    found = difference(run((1, 2.0), (2, math.nextafter(1.0, 2.0))), run((1, 2.0), (2, 1.0)))
    assert 0 < found.largest < 1e-15
    assert found.where == "train/loss at step 2"


def test_a_curve_that_is_not_a_number_differs_without_limit() -> None:
    assert difference(run((1, math.nan)), run((1, 2.0))).largest == math.inf


def test_a_run_without_metrics_differs_without_limit_and_lacks_every_point() -> None:
    nothing = Tracked(run_ids=(), status="", tags={}, metrics={})
    found = difference(nothing, run((1, 2.0), (2, 1.0)))
    assert (found.largest, found.missing) == (math.inf, 2)


def test_missing_and_repeated_steps_are_counted() -> None:
    found = difference(run((1, 2.0), (1, 2.0)), run((1, 2.0), (2, 1.0)))
    assert (found.missing, found.twice) == (1, 1)


def test_only_losses_are_compared_where_the_world_size_has_changed() -> None:
    ours, reference = run((1, 1.1), metric="train/grad_norm"), run((1, 1.0), metric="train/grad_norm")
    assert difference(ours, reference).largest > 0.09
    assert difference(ours, reference, compared=LOSSES).largest == 0.0


def test_a_runs_folder_is_not_that_of_a_longer_name(tmp_path: Path) -> None:
    (tmp_path / "leader-node-0123abcd").mkdir()
    assert RunFiles(runs=tmp_path, name="leader").folder is None
    (tmp_path / "leader-0123abcd").mkdir()
    assert RunFiles(runs=tmp_path, name="leader").folder == tmp_path / "leader-0123abcd"


def test_steps_are_read_from_every_attempt_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "leader-0123abcd" / "outbox"
    folder.mkdir(parents=True)
    line = '{"key": "train/loss", "value": 1.0, "step": %d, "timestamp_ms": 0}\n'
    (folder / "a1.jsonl").write_text(line % 1 + line % 2 + line[:30])
    (folder / "a2.jsonl").write_text(line % 2 + line % 3)
    files = RunFiles(runs=tmp_path, name="leader")
    assert files.steps() == [1, 2, 2, 3]
    assert files.step == 3


def test_each_trial_takes_its_own_steps_and_its_evaluations_are_none(tmp_path: Path) -> None:
    line = '{"key": "train/loss", "value": 1.0, "step": %d, "timestamp_ms": 0}\n'
    for trial in ("00", "01"):
        folder = tmp_path / "search-0123abcd" / "trials" / trial
        (folder / "outbox").mkdir(parents=True)
        (folder / "outbox" / "a1.jsonl").write_text(line % 1 + line % 2)
        (folder / "reports.jsonl").write_text('{"step": 2, "metrics": {"train/loss": 1.0}}\n')
    files = RunFiles(runs=tmp_path, name="search")
    assert files.taken() == [("trials/00", 1), ("trials/00", 2), ("trials/01", 1), ("trials/01", 2)]


def points(*times: float) -> tuple[Point, ...]:
    return tuple(Point(step=step, value=0.0, at_s=at_s) for step, at_s in enumerate(times))


@pytest.mark.parametrize(
    ("times", "fault", "pause"),
    [
        ((0, 1, 2, 3, 23, 24), 3.5, 19.5),
        ((0, 1, 2, 3, 4, 24, 25), 3.5, 20.0),  # a step was under way and came after the fault
        ((0, 1, 2, 3, 4, 5), 2.5, 1.0),  # nothing stood still
        ((0, 9, 10, 11, 31), 10.5, 20.0),  # an earlier pause is another fault's
        ((0, 1, 2), 2.5, 0.0),  # nothing came after it
    ],
)
def test_a_pause_lasts_from_the_fault_to_the_first_new_step(
    times: tuple[float, ...], fault: float, pause: float
) -> None:
    assert longest_pause_s(points(*times), after_s=fault, within_s=10.0) == pause


def test_a_random_schedule_is_the_same_for_the_same_seed() -> None:
    drawn = [random_scenario(seed).fault for seed in range(20)]
    assert drawn == [random_scenario(seed).fault for seed in range(20)]
    assert len(set(drawn)) == len(drawn)


def test_names_of_scenarios_are_unique_and_their_layouts_known() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    assert {scenario.layout for scenario in SCENARIOS} <= LAYOUTS.keys()


def test_a_run_that_should_have_grown_and_did_not_is_a_problem() -> None:
    grows = next(scenario for scenario in SCENARIOS if scenario.sizes == (2, 1, 2))
    tags = {f"orchestrator.attempt.{number}": f"{size} workers: why" for number, size in ((1, 2), (2, 1), (10, 2))}
    assert size_problems(grows, tags) == []
    assert "(2, 1) workers" in size_problems(grows, dict(list(tags.items())[:2]))[0]


def test_a_row_of_the_table_says_what_went_wrong() -> None:
    row = Row(
        name="x",
        fault="kill -9",
        outcome="finished (1 restart)",
        pause_s=18.44,
        steps_again=7,
        apart=0.0,
        metrics_lost=3,
        problems=("3 points are missing",),
    )
    line = table.markdown([row]).splitlines()[2]
    assert line == "| kill -9 | finished (1 restart); **3 points are missing** | 18.4 | 7 | identical | 3 |"


def test_a_step_that_was_measured_before_an_earlier_one_is_out_of_order() -> None:
    in_order = run((1, 2.0), (2, 1.0))
    late = Tracked(run_ids=("1",), status="", tags={}, metrics={"train/loss": in_order.metrics["train/loss"][::-1]})
    assert out_of_order(in_order) == []
    assert out_of_order(late) == ["train/loss"]
