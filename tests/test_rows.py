from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.tracking.compare import to_json
from orchestrator.tracking.comparison_page import write_report
from orchestrator.tracking.plots import _panel
from orchestrator.tracking.rows import RunRow, group_titles, rank, told_apart, with_trials
from orchestrator.tracking.table import render_table

CAUSAL = {"kind": "pretrain", "task": "causal-lm", "quality_metric": "eval/bits_per_byte", "quality_mode": "min"}
MASKED = {"kind": "pretrain", "task": "masked-lm", "quality_metric": "eval/loss"}


def row(run_id: str, quality: float | None = None, **others: Any) -> RunRow:
    values: dict[str, Any] = {"kind": "finetune", "quality_metric": "eval/accuracy", "status": "finished"}
    values |= {"experiment_id": "1", "name": f"run-{run_id}", "start_time_ms": 0}
    return RunRow(run_id=run_id, quality=quality, **(values | others))


def places(rows: list[RunRow]) -> list[tuple[str, int | None]]:
    return [(item.run_id, item.rank) for item in rank(rows)]


def shown(rows: list[RunRow], *, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render_table(rank(rows), experiment="exp", width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# Who is ranked against whom

TWO_TEXTS = [
    row("a1", 2.0, held_out_fingerprint="a" * 16, **CAUSAL),
    row("b", 1.0, held_out_fingerprint="b" * 16, **CAUSAL),
    row("a2", 1.9, held_out_fingerprint="a" * 16, **CAUSAL),
    row("before", 0.5, **CAUSAL),
]


def test_runs_measured_on_other_held_out_data_are_a_group_of_their_own() -> None:
    assert places(TWO_TEXTS) == [("a2", 1), ("a1", 2), ("before", 1), ("b", 1)]


def test_runs_of_before_that_recorded_no_held_out_data_compare_among_themselves() -> None:
    assert places([row("x", 0.7), row("y", 0.9)]) == [("y", 1), ("x", 2)]


def test_language_models_with_other_tokenizers_are_ranked_by_bits_per_byte_but_not_by_loss() -> None:
    two = [row(name, 2.0, tokenizer_fingerprint=name * 16, **CAUSAL) for name in "st"]
    assert places(two) == [("s", 1), ("t", 2)]
    by_loss = [
        row(name, 2.0, tokenizer_fingerprint=name * 16, **{**CAUSAL, "quality_metric": "eval/loss"}) for name in "st"
    ]
    assert places(by_loss) == [("s", 1), ("t", 1)]


def test_masked_language_models_are_ranked_within_tokenizer_and_masking_rate() -> None:
    like = {"tokenizer_fingerprint": "s" * 16, "masking_rate": 0.15, **MASKED}
    other = [
        row("t", 1.0, **{**like, "tokenizer_fingerprint": "t" * 16}),
        row("m", 1.0, **{**like, "masking_rate": 0.4}),
    ]
    assert places([row("s1", 2.0, **like), row("s2", 1.5, **like), *other]) == [
        ("s2", 1),
        ("s1", 2),
        ("m", 1),
        ("t", 1),
    ]


def test_a_metric_that_a_search_wants_large_is_a_group_apart_from_the_same_wanted_small() -> None:
    large = [
        row("a", 1.0, quality_metric="x", quality_mode="max"),
        row("b", 2.0, quality_metric="x", quality_mode="max"),
    ]
    assert places([*large, row("c", 1.5, quality_metric="x")]) == [("b", 1), ("a", 2), ("c", 1)]


def test_accuracy_of_any_tokenizer_is_one_group() -> None:
    two = [row(name, 0.9, task="text-classification", tokenizer_fingerprint=name * 16) for name in "st"]
    assert places(two) == [("s", 1), ("t", 2)]


# What is no number, and what was stopped


def test_a_result_that_is_no_number_comes_last_and_has_no_rank() -> None:
    for metric in ("eval/accuracy", "eval/loss"):
        rows = [row(str(value), value, quality_metric=metric) for value in (math.nan, 1e9, -math.inf, math.inf)]
        assert places(rows) == [("1000000000.0", 1), ("nan", None), ("-inf", None), ("inf", None)]


def test_a_trial_that_was_stopped_early_stands_below_those_that_came_to_their_end_whatever_it_had() -> None:
    trials = [
        row("late", 0.9, parent="s", status="stopped early at step 20", steps=20),
        row("early", 0.95, parent="s", status="stopped early at step 10", steps=10),
        row("best", 0.8, parent="s"),
        row("dead", 0.99, parent="s", status="failed"),
        row("spent", 0.7, parent="s", status="stopped by budget at step 30"),
    ]
    search = row("s", None, status="running")
    ranked = rank(with_trials([search, *trials]))
    assert [item.run_id for item in ranked] == ["s", "best", "spent", "late", "early", "dead"]
    assert (ranked[0].quality, ranked[0].best_run_id) == (0.8, "best")


def test_a_search_is_ranked_by_what_its_trials_were_measured_on() -> None:
    trial = row("t", 1.2, parent="s", held_out_fingerprint="a" * 16, tokenizer_fingerprint="t" * 16, **CAUSAL)
    ranked = rank(with_trials([row("s", 1.2, **CAUSAL), trial, row("x", 1.5, held_out_fingerprint="a" * 16, **CAUSAL)]))
    assert [(item.run_id, item.rank) for item in ranked] == [("s", 1), ("t", None), ("x", 2)]


def test_stages_stand_in_their_order_below_the_whole_which_counts_by_the_last() -> None:
    cost = {"gpu_hours": 0.25, "parent": "w"}
    stages = [
        row("s2", 0.7, start_time_ms=2, method="lora", held_out_fingerprint="b" * 16, **cost),
        row("s1", 2.9, start_time_ms=1, **cost, **MASKED),
    ]
    running = row("w", None, role="stages", trials=3, status="running", **MASKED)
    ranked = rank(with_trials([running, *stages]))
    assert [item.run_id for item in ranked] == ["w", "s1", "s2"]
    whole = ranked[0]
    assert (whole.quality, whole.method, whole.kind, whole.best_run_id) == (0.7, "lora", "finetune", "s2")
    assert (whole.held_out_fingerprint, whole.gpu_hours) == ("b" * 16, 0.5)
    assert "run-w (3 stages)" in shown(with_trials([running, *stages]))
    assert "2.9 loss" in shown(with_trials([running, *stages])), "which is no accuracy"
    with_earlier = row("w", 0.7, role="stages", gpu_hours=0.9)
    assert rank(with_trials([with_earlier, stages[0]]))[0].gpu_hours == 0.9, "a stage may lie below an earlier whole"


# Titles


def test_a_title_says_why_a_group_is_apart_and_nothing_where_there_is_one() -> None:
    alone = group_titles(item.group for item in TWO_TEXTS[:1])
    assert list(alone.values()) == [["pretrain, eval/bits_per_byte ↓"]]
    lines = group_titles(item.group for item in TWO_TEXTS).values()
    assert sorted(title[1] for title in lines) == [
        "held-out data not recorded",
        "on held-out data aaaaaaaa",
        "on held-out data bbbbbbbb",
    ]


def test_masked_language_models_are_told_apart_by_their_tokens() -> None:
    groups = [
        row("x", 1.0, tokenizer_fingerprint=name * 16, masking_rate=0.15, held_out_fingerprint="a", **MASKED).group
        for name in "st"
    ]
    assert [title[1:] for title in group_titles(groups).values()] == [
        ["in tokens of tokenizer ssssss, 15% hidden"],
        ["in tokens of tokenizer tttttt, 15% hidden"],
    ]


def test_losses_of_other_tokenizers_or_data_are_panels_of_their_own() -> None:
    like = {"held_out_fingerprint": "a" * 16, "tokenizer_fingerprint": "s" * 16, **CAUSAL}
    panels = [_panel(row("x", **{**like, **other})) for other in ({}, {"tokenizer_fingerprint": "t" * 16}, {})]
    assert panels[0] == panels[2] != panels[1]
    assert told_apart({panel: panel for panel in panels})[panels[1]] == [
        "pretrain, causal-lm",
        "in tokens of tokenizer tttttt",
    ]


@pytest.mark.parametrize("width", [100, 60, 50])
def test_the_table_shows_each_group_with_its_data_in_any_width(width: int) -> None:
    text = shown(TWO_TEXTS, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("eval/bits_per_byte ↓") == 3
    for line in ("held-out data aaaaaaaa", "held-out data bbbbbbbb", "held-out data not"):
        assert line in text


def test_page_and_json_name_the_group_of_each_run(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", rank(TWO_TEXTS), {}, experiment="exp")
    page = (tmp_path / "page.html").read_text()
    assert "pretrain, eval/bits_per_byte ↓; on held-out data bbbbbbbb" in page
    runs = {item["run_id"]: item for item in json.loads(json.dumps(to_json(rank(TWO_TEXTS))))["runs"]}
    assert runs["a1"]["group_title"] == runs["a2"]["group_title"] != runs["b"]["group_title"]
    assert runs["b"]["held_out_fingerprint"] == "b" * 16
