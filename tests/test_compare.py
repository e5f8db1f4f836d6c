from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from orchestrator.errors import SpecError, StorageError
from orchestrator.tracking import store
from orchestrator.tracking.compare import collect, comparison_link, loss_curves, to_json
from orchestrator.tracking.comparison_page import write_report
from orchestrator.tracking.rows import RunRow, rank
from orchestrator.tracking.run_record import Description
from orchestrator.tracking.table import render_table
from orchestrator.tracking.tracker import MetricLog, MlflowTracker
from tests.mlflow_runs import closed, get_run, log, new_store, opened


def row(run_id: str, quality: float | None = None, **others: Any) -> RunRow:
    values: dict[str, Any] = {
        "experiment_id": "1",
        "name": f"run-{run_id}",
        "status": "finished",
        "start_time_ms": 0,
        "kind": "finetune",
        "method": "lora",
        "quality_metric": "eval/accuracy",
    }
    return RunRow(run_id=run_id, quality=quality, **(values | others))


def ids(rows: list[RunRow]) -> list[str]:
    return [item.run_id for item in rows]


def text(rows: list[RunRow], *, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render_table(rows, experiment="exp", width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# Ranking


def test_accuracy_ranks_from_the_top_and_loss_from_the_bottom() -> None:
    by_accuracy = rank([row("a", 0.7), row("b", 0.9)])
    by_loss = rank([row("a", 0.7, quality_metric="eval/loss"), row("b", 0.9, quality_metric="eval/loss")])
    assert ids(by_accuracy) == ["b", "a"]
    assert ids(by_loss) == ["a", "b"]
    assert [item.rank for item in by_accuracy] == [1, 2]


def test_runs_without_a_result_come_last_and_have_no_rank() -> None:
    ranked = rank([row("a"), row("b", 0.5), row("c", quality_metric=None, kind=None)])
    assert [(item.run_id, item.rank) for item in ranked] == [("b", 1), ("a", None), ("c", None)]


def test_kinds_and_metrics_are_ranked_apart() -> None:
    ranked = rank(
        [
            row("p", 3.0, kind="pretrain", quality_metric="eval/loss"),
            row("f", 2.0, quality_metric="eval/loss"),
            row("c", 0.9),
        ]
    )
    assert [(item.group_title, item.rank) for item in ranked] == [
        ("finetune, eval/accuracy ↑", 1),
        ("finetune, eval/loss ↓", 1),
        ("pretrain, eval/loss ↓", 1),
    ]


def test_losses_on_hidden_tokens_and_on_the_next_are_ranked_apart() -> None:
    lm = {"kind": "pretrain", "quality_metric": "eval/loss"}
    rows = [row("next", 3.0, task="causal-lm", **lm), row("hidden", 2.0, task="masked-lm", **lm)]
    ranked = rank(rows)
    assert [(item.run_id, item.rank) for item in ranked] == [("next", 1), ("hidden", 1)]
    assert "pretrain masked-lm, eval/loss" in text(ranked)


def test_trials_stand_below_their_search_without_a_rank_of_their_own() -> None:
    ranked = rank([row("t1", 0.9, parent="s"), row("t2", 0.7, parent="s"), row("x", 0.8), row("s", 0.9, trials=2)])
    assert [(item.run_id, item.rank) for item in ranked] == [("s", 1), ("t1", None), ("t2", None), ("x", 2)]


def test_a_trial_whose_search_is_not_among_the_rows_is_ranked_itself() -> None:
    assert rank([row("t", 0.9, parent="elsewhere")])[0].rank == 1


# Table, JSON, link, report


def test_the_json_has_the_promised_fields_and_is_valid_json() -> None:
    answer = to_json([row("a", 0.9, metrics={"eval/accuracy": 0.9}, tokens=10.0)])
    (run,) = json.loads(json.dumps(answer, allow_nan=False))["runs"]
    promised = ["run_id", "name", "kind", "method", "metrics", "tokens", "flops", "gpu_hours", "usd", "parent"]
    assert list(run)[: len(promised)] == promised


@pytest.mark.parametrize("width", [100, 80, 60, 50])
def test_the_table_fits_its_terminal_and_keeps_names_quality_and_status(width: int) -> None:
    rows = rank(
        [
            row("a", 0.91234, steps=100_000, learning_rate=3e-5, tokens=2e9, gpu_hours=12.34, usd=123.4),
            row("b", None, name="a-name-of-a-length-that-people-do-use", status="stopped early at step 40"),
        ]
    )
    shown = text(rows, width=width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "0.9123" in shown
    assert "run-a" in shown
    assert "stopped" in shown
    assert ("2B" in shown) == (width == 100)


def test_the_table_marks_a_search_and_its_trials() -> None:
    shown = text(rank([row("t1", 0.9, parent="s"), row("s", 0.9, trials=1, name="search")]))
    assert "search (best of 1)" in shown
    assert "└ run-t1" in shown
    assert "finetune, eval/accuracy ↑" in shown


def test_names_are_not_read_as_markup() -> None:
    assert "[bold]x" in text([row("a", name="[bold]x")])


def test_an_experiment_without_runs_says_how_to_start_one() -> None:
    assert re.search(r"No runs in 'exp' yet.*orchestrator run", text([]))


def test_the_link_names_runs_and_experiments() -> None:
    link = comparison_link("http://host:5000/", [row("a"), row("b")])
    assert link.command is None
    address = urlsplit(link.url)
    assert (address.scheme, address.netloc, address.path) == ("http", "host:5000", "/")
    query = parse_qs(urlsplit(address.fragment).query)
    assert json.loads(query["runs"][0]) == ["a", "b"]
    assert json.loads(query["experiments"][0]) == ["1"]


def test_the_link_of_a_database_comes_with_the_server_to_start() -> None:
    link = comparison_link("sqlite:////data/mlflow.db", [row("a")])
    assert link.url.startswith("http://127.0.0.1:5000/#/compare-runs?")
    assert link.command is not None
    assert "--backend-store-uri 'sqlite:////data/mlflow.db'" in link.command


def test_the_report_is_one_file_that_escapes_names_and_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"\x89PNG picture")
    rows = rank([row("a", 0.9, name="<script>alert(1)</script>"), row("t", 0.8, parent="a")])
    link = comparison_link("http://host:5000", rows)
    path = tmp_path / "new" / "report.html"
    write_report(path, rows, {"Loss & tokens": tmp_path / "loss.png"}, experiment="a<b", link=link)
    html = path.read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "Loss &amp; tokens" in html
    assert re.findall(r'src="([^"]{22})', html) == ["data:image/png;base64,"]
    assert re.findall(r'href="(http[^#]*)', html) == ["http://host:5000/"]


def test_a_report_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="report"):
        write_report(tmp_path, [], {}, experiment="exp")


# From a SQLite store


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return new_store(tmp_path)


def train(
    uri: str, folder: Path, name: str, *, accuracies: list[float], parent: MlflowTracker | None = None, **tags: str
) -> MlflowTracker:
    what: dict[str, Any] = {
        "tags": {
            "orchestrator.kind": "finetune",
            "orchestrator.method": "lora",
            "orchestrator.quality_metric": "eval/accuracy",
        },
        "params": {"training": {"learning_rate": 1e-4}},
    }
    if parent is None:
        tracker = opened(uri, folder / name, name=name, **what)
    else:
        tracker = parent.open_trial(folder / name, name=name, what=Description(**what))
    log = MetricLog(folder / name)
    for step, accuracy in enumerate(accuracies, start=1):
        log.log(step, {"train/loss": 1 - accuracy, "train/tokens": 100.0 * step, "cost/usd": 0.5 * step})
        log.log(step, {"eval/accuracy": accuracy, "eval/loss": 1.1 - accuracy})
    log.close()
    tracker.end_run("finished", tags={f"orchestrator.{key}": value for key, value in tags.items()})
    if parent is None:
        tracker.ship()
    return tracker


@pytest.mark.slow
def test_runs_are_collected_with_their_last_figures(uri: str, tmp_path: Path) -> None:
    train(uri, tmp_path, "worse", accuracies=[0.5, 0.6], stop_reason="pruned")
    train(uri, tmp_path, "better", accuracies=[0.5, 0.6, 0.9])
    closed(opened(uri, tmp_path / "just-started"), status="failed", error="out of memory\nat layer 3")
    better, worse, started = collect(uri, "exp")
    assert (better.name, better.rank, better.quality, better.steps) == ("better", 1, 0.9, 3)
    assert (better.tokens, better.usd, better.learning_rate, better.status) == (300, 1.5, 1e-4, "finished")
    assert (worse.name, worse.rank, worse.status) == ("worse", 2, "stopped early at step 2")
    assert (started.rank, started.status, started.note) == (None, "failed", "out of memory")


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_a_search_has_its_best_trials_quality_and_the_cost_of_all(uri: str, tmp_path: Path, finished: bool) -> None:
    search = opened(uri, tmp_path, name="search", tags={"orchestrator.kind": "finetune"})
    train(uri, tmp_path, "t1", accuracies=[0.6], parent=search)
    best = train(uri, tmp_path, "t2", accuracies=[0.6, 0.8], parent=search)
    if finished:
        search.show_best(tmp_path / "t2", [tmp_path / "t1", tmp_path / "t2"])
        search.end_run("finished")
    search.ship()
    parent, first, second = collect(uri, "exp")
    assert (parent.name, parent.trials, parent.quality, parent.usd) == ("search", 2, 0.8, 1.5)
    assert parent.best_run_id == best.run_id
    assert [first.name, second.name] == ["t2", "t1"]
    assert first.parent == search.run_id


@pytest.mark.slow
def test_a_run_whose_last_evaluation_gave_no_number_has_no_result_whatever_it_had_before(
    uri: str, tmp_path: Path
) -> None:
    train(uri, tmp_path, "diverged", accuracies=[0.9, 0.95, math.nan])
    train(uri, tmp_path, "recovered", accuracies=[0.5, math.nan, 0.6])
    search = opened(uri, tmp_path / "search", name="search", tags={"orchestrator.quality_metric": "eval/accuracy"})
    train(uri, tmp_path, "trial", accuracies=[0.8, math.inf], parent=search)
    search.show_best(tmp_path / "trial", [tmp_path / "trial"])
    search.end_run("finished")
    search.ship()
    rows = {row.name: row for row in collect(uri, "exp")}
    assert {name: (row.quality, row.rank) for name, row in rows.items()} == {
        "recovered": (0.6, 1),
        "diverged": (None, None),
        "search": (None, None),
        "trial": (None, None),
    }
    assert rows["diverged"].note == "train/loss is nan at step 3"
    assert rows["diverged"].metrics["eval/accuracy"] == 0.95
    assert "eval/accuracy" not in rows["search"].metrics


@pytest.mark.slow
def test_a_run_has_the_quality_of_its_model_and_keeps_its_curve(uri: str, tmp_path: Path) -> None:
    """Also where the last evaluation gave no number; what went on after a budget stop is newer than the model then."""
    for name, last in (("worse", 0.5), ("diverged", math.nan)):
        folder = tmp_path / name
        tracker = opened(uri, folder, name=name, tags={"orchestrator.quality_metric": "eval/accuracy"})
        points = MetricLog(folder)
        for step, value in enumerate([0.6, 0.9, last], 1):
            points.log(step, {"train/tokens": 100.0 * step, "eval/accuracy": value, "eval/loss": 1 - value})
        points.close()
        figures = {"eval/accuracy": 0.9, "eval/loss": 0.1, "train/loss": 7.0}
        tracker.show_model(figures, step=3, model_step=2)
        closed(tracker)
    rows = collect(uri, "exp")
    assert {row.name: row.quality for row in rows} == {"worse": 0.9, "diverged": 0.9}
    assert all("train/loss" not in row.metrics for row in rows)
    curves = {curve.run.name: [round(value, 6) for _, value in curve.evaluation] for curve in loss_curves(uri, rows)}
    assert curves == {"worse": [0.4, 0.1, 0.5], "diverged": [0.4, 0.1, 0.1]}
    again = opened(uri, tmp_path / "worse", name="worse")
    log(again, tmp_path / "worse", {"eval/accuracy": 0.7}, step=4, attempt=2, resumed_from=3)
    closed(again)
    (row,) = [row for row in collect(uri, "exp") if row.name == "worse"]
    assert row.quality == 0.7
    assert "orchestrator.model_step" not in get_run(uri, row.run_id).data.tags


@pytest.mark.slow
def test_what_a_run_was_measured_on_and_by_is_read_from_its_tags(uri: str, tmp_path: Path) -> None:
    named = {"held_out_fingerprint": "abc", "tokenizer_fingerprint": "def", "quality_mode": "min"}
    train(uri, tmp_path, "run", accuracies=[0.5], **named)
    (row,) = collect(uri, "exp")
    assert {name: getattr(row, name) for name in named} == named
    assert row.goal is not None
    assert not row.goal.higher_is_better


@pytest.mark.slow
def test_loss_curves_are_against_tokens_and_leave_searches_out(uri: str, tmp_path: Path) -> None:
    search = opened(uri, tmp_path, name="search")
    train(uri, tmp_path, "trial", accuracies=[0.5, 0.75], parent=search)
    search.ship()
    (curve,) = loss_curves(uri, collect(uri, "exp"))
    assert curve.run.name == "trial"
    assert curve.train == ((100.0, 0.5), (200.0, 0.25))
    assert [tokens for tokens, _ in curve.evaluation] == [100.0, 200.0]


@pytest.mark.slow
def test_an_experiment_that_does_not_exist_is_refused_with_those_that_do(uri: str, tmp_path: Path) -> None:
    closed(opened(uri, tmp_path / "tiny"))
    with pytest.raises(SpecError, match=r"no experiment 'exq'[\s\S]*exp"):
        collect(uri, "exq")


@pytest.mark.slow
def test_an_experiment_without_runs_is_empty(uri: str) -> None:
    store.client(uri).create_experiment("empty")
    assert collect(uri, "empty") == []


@pytest.mark.slow
def test_comparing_a_store_that_does_not_exist_does_not_create_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no MLflow store"):
        collect(f"sqlite:///{tmp_path}/typo.db", "exp")
    assert list(tmp_path.iterdir()) == []


def test_a_row_is_not_changed_by_ranking() -> None:
    before = row("a", 0.9)
    ranked = rank([before])[0]
    assert before.rank is None
    assert ranked == replace(before, rank=1, group_title="finetune, eval/accuracy ↑")
