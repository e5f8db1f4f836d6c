from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.runs.job import LoopState, Progress, TrainingJob, WorkerContext
from orchestrator.worker.budget import Account
from orchestrator.worker.reporting import Reporter
from tests.training_runs import pretrain


class Listener:
    """Whoever hears what a rank tells."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.reports: list[tuple[int, Mapping[str, float]]] = []

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.reports.append((step, metrics))

    def context(self, rank: int) -> WorkerContext:
        return WorkerContext(rank=rank, world_size=2, progress=self.progress.append, report=self.report)


def reporter_of(job: TrainingJob, listener: Listener, *, rank: int = 0) -> tuple[Reporter, Account, WorkerContext]:
    account, context = Account(job.plan, evaluated_samples=4), listener.context(rank)
    return Reporter(job, context, account), account, context


def logged(job: TrainingJob) -> list[tuple[int, str, float]]:
    """Points that count, of all files in their order."""
    files = sorted(job.run_folder.glob("outbox/a*.jsonl"))
    points: list[dict[str, Any]] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(point["step"], point["key"], point["value"]) for point in points]


def step(account: Account, *, seconds: float = 2.0) -> None:
    account.add_step(seconds=seconds, tokens=8, padded_tokens=8)


def test_rank_0_tells_where_it_is_with_the_newest_metrics_and_every_rank_has_a_heartbeat(tmp_path: Path) -> None:
    job, heard = pretrain(tmp_path), Listener()
    for rank in (1, 0):
        reporter, account, context = reporter_of(job, heard, rank=rank)
        step(account)
        reporter.emit({"train/loss": 3.0, "train/tokens_per_second": 4.0})
        reporter.emit({"train/loss": 2.5})
        reporter.begin("evaluating")
        beat = context.heartbeat.beat()
        assert (beat.phase, beat.step) == ("evaluating", 1)
        reporter.report()
        assert len(heard.progress) == len(heard.reports) == 1 - rank
    (news,) = heard.progress
    assert (news.step, news.steps, news.phase, news.eta_s, news.tokens_per_second) == (1, 6, "evaluating", 10.0, 4.0)
    assert news.metrics == {"train/loss": 2.5, "train/tokens_per_second": 4.0}
    assert heard.reports == [(1, news.metrics)]
    reporter.emit({"train/loss": 2.0})
    assert news.metrics["train/loss"] == 2.5, "what was told does not change afterwards"


def test_a_note_is_kept_once_in_the_order_of_the_first_time(tmp_path: Path) -> None:
    reporter, *_ = reporter_of(pretrain(tmp_path), Listener())
    for note in ("b", "a", "b"):
        reporter.note(note)
    assert reporter.notes == ("b", "a")


@pytest.mark.parametrize("holds", [True, False])
def test_rank_0_logs_metrics_as_long_as_its_attempt_may_write(tmp_path: Path, holds: bool) -> None:
    job = pretrain(tmp_path)
    for rank in (0, 1):
        reporter, account, _ = reporter_of(job, Listener(), rank=rank)
        reporter.emit({"before": 0.0})
        reporter.open_log(resumed_from=0, holds=lambda: holds)
        step(account)
        reporter.emit({"train/loss": 3.0})
        reporter.log({"checkpoint/interval_steps": 7.0})
        assert reporter.metrics == {"before": 0.0, "train/loss": 3.0}, "of how it was run nothing is kept"
        reporter.close()
    assert logged(job) == ([(1, "train/loss", 3.0), (1, "checkpoint/interval_steps", 7.0)] if holds else [])


def test_a_rewound_training_has_the_metrics_of_its_checkpoint_and_logs_in_their_place(tmp_path: Path) -> None:
    job = replace(pretrain(tmp_path), attempt=3)
    reporter, account, _ = reporter_of(job, Listener())
    state = LoopState(step=1, metrics={"train/loss": 3.0})
    reporter.take_up(state)
    reporter.open_log(resumed_from=1, holds=lambda: True)
    account.resume(state)
    step(account)
    reporter.emit({"train/loss": 9.0, "eval/loss": 9.0})
    account.rewind(state)
    reporter.take_up(state)
    assert reporter.metrics == {"train/loss": 3.0}
    step(account)
    reporter.emit({"train/loss": 2.0})
    reporter.close()
    names = sorted(file.name for file in tmp_path.glob("outbox/a*.jsonl"))
    assert names == ["a0003.00-from-00000001.jsonl", "a0003.01-from-00000001.jsonl"]
    assert logged(job)[-1] == (2, "train/loss", 2.0)
    assert state.metrics == {"train/loss": 3.0}, "a checkpoint's own are left alone"
