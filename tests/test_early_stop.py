from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.ranking import Goal
from orchestrator.spec_survival import StopSpec
from orchestrator.worker.early_stop import Progress
from tests import specs, training_runs
from tests.training_runs import classify

LOSS, ACCURACY = Goal.of("eval/loss"), Goal.of("eval/accuracy")


def waits(goal: Goal, values: list[float], min_delta: float = 0.0) -> list[int]:
    progress, found = Progress(), []
    for value in values:
        progress = progress.after(value, goal, min_delta=min_delta)
        found.append(progress.waited)
    return found


def test_evaluations_without_a_better_one_are_counted_in_the_metrics_own_direction() -> None:
    assert waits(LOSS, [3.0, 2.0, 2.5, 2.0, 1.9, 1.95]) == [0, 0, 1, 2, 0, 1]
    assert waits(ACCURACY, [0.5, 0.6, 0.6, 0.55, 0.7]) == [0, 0, 1, 2, 0]


def test_a_little_better_is_not_better_and_does_not_move_the_mark() -> None:
    assert waits(ACCURACY, [0.50, 0.52, 0.54, 0.56, 0.58], min_delta=0.05) == [0, 1, 2, 0, 1]


def test_what_is_no_number_is_never_better() -> None:
    assert waits(LOSS, [math.nan, 2.0, math.nan, math.inf]) == [1, 0, 1, 2]


def test_a_run_ends_once_patience_is_used_up_and_says_why() -> None:
    stop, progress = StopSpec(patience=2), Progress(best=0.8, waited=1)
    assert progress.reason(stop, ACCURACY) is None
    assert progress.after(0.8, ACCURACY, min_delta=0).reason(None, ACCURACY) is None
    reason = progress.after(0.8, ACCURACY, min_delta=0).reason(stop, ACCURACY)
    assert reason == "stopped early: eval/accuracy was not better than 0.8 in 2 evaluations (training.stop)"


def test_patience_without_evaluations_on_the_way_is_refused_and_without_it_runs_keep_their_fingerprint() -> None:
    with pytest.raises(SpecError, match=r"set training\.eval_every_steps"):
        specs.spec(specs.PRETRAIN, training__stop={"patience": 1}, training__eval_every_steps=None)
    plain, patient = (
        specs.spec(specs.PRETRAIN, training__eval_every_steps=2, training__stop=stop)
        for stop in (None, {"patience": 1})
    )
    assert plain.fingerprint() != patient.fingerprint()


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_with_its_model_also_when_it_was_interrupted(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "training__steps": 40,
        "training__eval_every_steps": 2,
        "training__learning_rate": 1e-12,  # so that no evaluation differs
        "training__stop": {"patience": 3, "min_delta": 1e-3},
        "resources__workers": 2,
    }
    whole, resumed = (classify(tmp_path / name, **changes) for name in ("whole", "resumed"))
    outcome = training_runs.run(whole)
    assert (outcome.status, outcome.step, outcome.steps) == ("finished", 8, 40)
    assert any(note.startswith("stopped early: eval/accuracy") for note in outcome.notes)
    assert (whole.model_folder / "model.safetensors").is_file()
    assert training_runs.run(resumed, stop_at=5).status == "interrupted"
    assert training_runs.run(resumed).step == 8
    assert training_runs.run(resumed).step == 8, "it is over"
