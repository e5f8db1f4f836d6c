from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.planning.checkpoint_interval import FIRST_INTERVAL_STEPS
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.job import LoopState, TrainingJob, WorkerContext
from orchestrator.worker.recovery import COST_METRIC, INTERVAL_METRIC, RecoveryManager
from tests.training_runs import pretrain

pytestmark = pytest.mark.slow  # torch

STEP_S = 0.1


class State:
    """A state to save whose copy takes a while."""

    micro_batch = 1

    def __init__(self, *, blocked_s: float) -> None:
        self._blocked_s = blocked_s

    def snapshot(self) -> dict[str, Any]:
        time.sleep(self._blocked_s)
        return {"state/model.pt": {}}


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    """One whose attempts die every few seconds, so that checkpoints are wanted every few steps."""
    job = pretrain(tmp_path, checkpoint__every_steps="auto")
    attempts = Attempts(tmp_path)
    return replace(job, attempt=[attempts.open(workers=1, cause="a death") for _ in range(300)][-1])


@contextmanager
def recovery(job: TrainingJob, *, blocked_s: float) -> Iterator[RecoveryManager]:
    state: Any = State(blocked_s=blocked_s)
    keeping = RecoveryManager(state, job, WorkerContext(), agree=lambda value: value, any_rank=bool)
    try:
        yield keeping
    finally:
        keeping.close()


def saved(keeping: RecoveryManager, *, late_s: float = 0.0, until: int = 120) -> list[tuple[int, dict[str, float]]]:
    """(step, figures) of every checkpoint of a training whose first step after each takes so much longer."""
    found: list[tuple[int, dict[str, float]]] = []
    for step in range(1, until + 1):
        keeping.add_step(STEP_S + (late_s if found and found[-1][0] == step - 1 else 0.0))
        if keeping.is_due(step):
            found.append((step, dict(keeping.save(LoopState(step=step), step_s=STEP_S))))
            keeping.newest()  # written
    return found


def test_each_checkpoint_is_as_far_from_the_last_as_was_decided_by_what_they_cost(job: TrainingJob) -> None:
    with recovery(job, blocked_s=0.05) as keeping:
        found = saved(keeping)
    assert [step for step, _ in found[:2]] == [FIRST_INTERVAL_STEPS, 2 * FIRST_INTERVAL_STEPS]
    assert COST_METRIC not in found[0][1], "none was complete"
    for (step, figures), (following, _) in itertools.pairwise(found):
        assert following - step == figures[INTERVAL_METRIC]
    assert found[-1][1][COST_METRIC] == pytest.approx(0.1, abs=0.07)


@pytest.mark.parametrize("dear", [{"blocked_s": 0.5}, {"blocked_s": 0.0, "late_s": 0.5}])
def test_dearer_checkpoints_are_made_less_often_whether_training_waits_or_is_slowed(
    job: TrainingJob, tmp_path: Path, dear: dict[str, float]
) -> None:
    late_s = dear.get("late_s", 0.0)
    with recovery(job, blocked_s=0.0) as keeping:
        cheap = saved(keeping)
    with recovery(replace(job, run_folder=tmp_path / "dear"), blocked_s=dear["blocked_s"]) as keeping:
        rare = saved(keeping, late_s=late_s)
    assert rare[-1][1][COST_METRIC] == pytest.approx(0.5, abs=0.2)
    assert len(rare) < len(cheap)
    assert rare[-1][1][INTERVAL_METRIC] > 1.5 * cheap[-1][1][INTERVAL_METRIC]


def test_where_every_checkpoint_is_damaged_the_run_goes_on_once_one_is_whole_again(tmp_path: Path) -> None:
    job, attempts = pretrain(tmp_path, checkpoint__every_steps=1), Attempts(tmp_path)

    def attempt() -> TrainingJob:
        return replace(job, attempt=attempts.open(workers=1, cause="started again"))

    with recovery(attempt(), blocked_s=0.0) as keeping:
        keeping.save(LoopState(step=1), step_s=STEP_S)
        keeping.newest()
    (file,) = Path(str(job.checkpoints)).rglob("model.pt")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    for _ in range(2):  # the first refusal must not make the second one forget what there was
        with (
            recovery(attempt(), blocked_s=0.0) as keeping,
            pytest.raises(StorageError, match="no checkpoint of this run"),
        ):
            keeping.restore()
    file.write_bytes(whole)
    with recovery(attempt(), blocked_s=0.0) as keeping:
        keeping._engine.load = lambda checkpoint: None  # type: ignore[method-assign]
        assert keeping.restore().step == 1


@pytest.mark.parametrize("torn", ["", "[{", '[{"step": 3}]'])
def test_a_damaged_list_of_rewinds_is_named_for_what_it_is(job: TrainingJob, torn: str) -> None:
    (job.run_folder / "rewinds.json").write_text(torn)
    with (
        recovery(job, blocked_s=0.0) as keeping,
        pytest.raises(StorageError, match="which samples this run has left out is damaged"),
    ):
        keeping.restore()
