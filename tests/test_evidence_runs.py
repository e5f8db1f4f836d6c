from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.evidence.score_runs import (
    FITTED_FAMILIES,
    PublishedRun,
    RunsScore,
    fit,
    predict,
    read_benchmarks,
    read_runs,
    score,
    spread,
    table,
)

RUNS = read_runs()


@pytest.fixture(scope="module")
def result() -> RunsScore:
    return score()


def test_gpu_hours_are_within_the_target_in_sample_and_left_out(result: RunsScore) -> None:
    assert len(result.rows) == 32
    assert result.median_error <= 0.18
    assert result.left_out_error <= 0.18
    assert result.coverage >= 0.85
    assert result.left_out_coverage >= 0.85


def test_trainings_never_fitted_are_within_the_target(result: RunsScore) -> None:
    assert result.unseen_error <= 0.18
    assert result.unseen_coverage >= 0.85


def test_the_rule_of_40_percent_is_worse(result: RunsScore) -> None:
    assert result.median_error < result.left_out_error < 0.75 * result.baseline_error


def test_intervals_are_no_wider_than_they_need_to_be(result: RunsScore) -> None:
    widths = [row.gpu_hours.high / row.gpu_hours.low for row in result.rows]
    assert max(widths) < 4


@pytest.mark.parametrize("family", FITTED_FAMILIES)
def test_the_catalogue_holds_what_is_fitted(family: str) -> None:
    fitted = fit(family, RUNS)
    shipped = next(run for run in RUNS if run.family == family).device.utilization
    assert shipped.fraction == pytest.approx(fitted.fraction, rel=0.01)
    assert shipped.size_exponent == pytest.approx(fitted.size_exponent, abs=0.002)
    assert shipped.length_exponent == pytest.approx(fitted.length_exponent, abs=0.002)
    assert shipped.runs == fitted.runs
    assert spread(family, RUNS) <= shipped.spread <= 1.3 * spread(family, RUNS)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_names_do_not_enter_and_sizes_only_smoothly(run: PublishedRun) -> None:
    hours = predict(run).gpu_hours.mid
    assert predict(replace(run, name="another")).gpu_hours.mid == hours
    for factor in (0.9, 0.97, 1.03, 1.1):
        larger = predict(replace(run, parameters=round(factor * run.parameters))).gpu_hours.mid
        longer = predict(replace(run, tokens=factor * run.tokens)).gpu_hours.mid
        # ZeRO-3 that waits for the network takes time with the square of the size, as the gathered bytes per token do.
        assert abs(math.log(larger / hours)) < 2.2 * abs(math.log(factor)) + 0.05
        assert 0.85 < math.log(longer / hours) / math.log(factor) <= 1.01


def test_benchmarks_lie_about_the_catalogues_fractions() -> None:
    errors = [abs(predicted / published - 1) for _, published, predicted in read_benchmarks()]
    assert len(errors) == 7
    assert sorted(errors)[len(errors) // 2] < 0.2


def test_the_table_shows_every_training_and_the_score(result: RunsScore) -> None:
    lines = list(table(result))
    assert all(any(line.startswith(run.name[:33]) for line in lines) for run in RUNS if run.use != "added")
    assert any(line.startswith("catalogue: median error") for line in lines)
