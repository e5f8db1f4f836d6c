"""Stages on a real Ray cluster: masked tokens of raw text, then classes of rows; stopped in between, and resumed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.errors import DataError, Interrupted
from orchestrator.load_stages import parse_stages
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.run_folder import stages_folder_of
from orchestrator.scheduling.run_lifecycle import Listener, RunResult
from orchestrator.scheduling.run_stages import newest_begun, run_stages
from orchestrator.spec_stages import StagedSpec
from orchestrator.tracking.compare import collect
from tests import specs
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = {"domain": 12, "classify": 400}
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A chain from new weights, on data of its own."""
    folder = tmp_path_factory.mktemp("stages")
    rows = "".join(f"the model reads line {n} {'well' if n % 2 else 'badly'},{n % 2}\n" for n in range(64))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    corpus = specs.write_corpus(folder / "corpus")
    training = {"global_batch": 8, "learning_rate": 1e-3}
    rows_of = {"train": str(folder / "rows.csv"), "label_column": "label", "validation_fraction": 0.25}
    return {
        "name": "chain",
        "model": {"config": "bert", "vocab_size": 300, "overrides": SMALL},
        "data": {"sequence_length": 32},
        "training": training,
        "resources": {"workers": 1},
        "tracking": {"experiment": "stages"},
        "stages": [
            {
                "name": "domain",
                "kind": "pretrain",
                "task": "masked-lm",
                "data": {"train": str(corpus)},
                "training": {"steps": STEPS["domain"]},
            },
            {
                "name": "classify",
                "kind": "finetune",
                "task": "text-classification",
                "data": rows_of,
                "training": {"steps": STEPS["classify"]},
                "checkpoint": {"every_steps": 50},
            },
        ],
    }


def staged(raw: dict[str, Any], **last: Any) -> StagedSpec:
    """With fields of the last stage's `training` replaced."""
    *first, classify = raw["stages"]
    return parse_stages({**raw, "stages": [*first, {**classify, "training": {**classify["training"], **last}}]})


def stopped_in_the_last_stage(chain: StagedSpec) -> Path:
    """Stops a run when its last stage has taken some steps; gives the folder of the whole."""
    stop, said, folders = threading.Event(), list[str](), list[Path]()

    def progress(seen: Mapping[str, Any]) -> None:
        if any("classify" in line for line in said) and seen.get("step", 0) >= 1:
            stop.set()

    hears = Listener(watcher=Watcher(on_progress=progress, on_retry=said.append, stop=stop), say=said.append)
    hears = replace(hears, opened=lambda folder, _: folders.append(folder))
    with pytest.raises(Interrupted, match="stage classify: stopped at step"):
        run_stages(chain, hears)
    assert set(folders) == {stages_folder_of(chain)}, "a stage's own folder is not that of the command"
    return folders[0]


def of(run_id: object) -> Any:
    return runs.mlflow_run(str(run_id), uri=locations.default_tracking_uri())


@pytest.fixture(scope="module")
def resumed(raw: dict[str, Any], ray_cluster: None) -> tuple[RunResult, list[str]]:
    """What a run answers, and says, that was stopped in its last stage and called again."""
    chain = staged(raw)
    folder = stopped_in_the_last_stage(chain)
    newest = newest_begun(chain, folder)
    assert newest is not None
    assert newest[0].name == "chain.classify"
    said: list[str] = []
    return run_stages(chain, runs.listener(said=said)), said


def test_a_stopped_run_goes_on_in_the_stage_it_was_in(resumed: tuple[RunResult, list[str]]) -> None:
    result, said = resumed
    assert "stage 1 of 2: domain is over already; --fresh starts over" in said
    assert result.stages is not None
    domain, classify = result.stages
    assert (domain["name"], classify["name"], result.status) == ("domain", "classify", "finished")
    for stage in (domain, classify):
        steps = list(runs.curve(stage["mlflow_run_id"], "train/loss", uri=locations.default_tracking_uri()))
        assert steps == list(range(1, STEPS[stage["name"]] + 1)), "each step once"
    assert classify["metrics"]["eval/accuracy"] == result.metrics["eval/accuracy"]
    assert result.model_path == classify["model_path"]


def test_each_stage_is_a_run_below_the_whole_and_names_the_run_it_begins_with(
    resumed: tuple[RunResult, list[str]],
) -> None:
    result, _ = resumed
    assert result.stages is not None
    domain, classify = (of(stage["mlflow_run_id"]) for stage in result.stages)
    whole = of(result.mlflow_run_id)
    assert {run.data.tags["mlflow.parentRunId"] for run in (domain, classify)} == {result.mlflow_run_id}
    assert classify.data.tags["orchestrator.base_run_id"] == domain.info.run_id
    assert classify.data.params["model.base"] == result.stages[0]["model_path"]
    assert [run.info.status for run in (whole, domain, classify)] == ["FINISHED"] * 3
    assert whole.data.metrics["eval/accuracy"] == result.metrics["eval/accuracy"]
    cost = domain.data.metrics["cost/gpu_hours"] + classify.data.metrics["cost/gpu_hours"]
    assert whole.data.metrics["cost/gpu_hours"] == pytest.approx(cost)
    assert result.metrics["cost/gpu_hours"] == pytest.approx(cost)
    rows = [row for row in collect(locations.default_tracking_uri(), "stages") if row.parent is None]
    assert (rows[0].trials, rows[0].role, rows[0].kind) == (2, "stages", "finetune")


def test_a_change_in_the_last_stage_leaves_the_first_as_it_is(
    raw: dict[str, Any], resumed: tuple[RunResult, list[str]]
) -> None:
    said: list[str] = []
    changed = staged(raw, steps=4)
    result = run_stages(changed, runs.listener(said=said))
    assert result.stages is not None
    assert resumed[0].stages is not None
    assert result.stages[0] == resumed[0].stages[0]
    assert result.run_folder != resumed[0].run_folder
    domain = of(result.stages[0]["mlflow_run_id"]).data.metrics
    whole, last = of(result.mlflow_run_id).data.metrics, of(result.stages[1]["mlflow_run_id"]).data.metrics
    assert whole["cost/flops"] == domain["cost/flops"] + last["cost/flops"], "that of an earlier run counts too"
    again: list[str] = []
    assert run_stages(changed, runs.listener(said=again)) == result
    assert again[-1] == "all 2 stages are finished"


def test_data_of_a_later_stage_is_refused_before_the_first_begins(raw: dict[str, Any]) -> None:
    wrong = parse_stages({**raw, "name": "wrong", "stages": [dict(stage) for stage in raw["stages"]]})
    last = wrong.stages[-1]
    data = last.spec.data.model_copy(update={"label_column": "mood"})
    wrong = replace(wrong, stages=(wrong.stages[0], replace(last, spec=last.spec.model_copy(update={"data": data}))))
    with pytest.raises(DataError, match=r"stage classify: .*has no column 'mood'"):
        run_stages(wrong, runs.listener())
    assert not stages_folder_of(wrong).exists()
