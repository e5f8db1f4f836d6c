"""A model that has learnt text learns to answer, on a real Ray cluster; measured and searched like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.architectures.families import model_config
from orchestrator.commands.evaluate import Options, evaluation, model_folder
from orchestrator.load_spec import parse_spec
from orchestrator.load_stages import parse_stages
from orchestrator.planning.base_fit import model_in
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import RunResult
from orchestrator.scheduling.run_stages import run_stages
from orchestrator.spec import ModelSpec
from orchestrator.tracking.finished_model import found_base, spec_behind
from tests import specs
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alpaca's layout: instruction, input, output."""
    file = tmp_path_factory.mktemp("chat") / "answers.jsonl"
    rows = [
        {"instruction": "Read a line.", "input": f"line {n}", "output": f"line {n}" * (1 + n % 3)} for n in range(90)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def trained(ray_cluster: None, answers: Path) -> RunResult:
    """The second of two stages, on two workers under ZeRO-2."""
    corpus = specs.write_corpus(answers.parent / "corpus")
    chain: dict[str, Any] = {
        "name": "to-chat",
        "model": specs.PRETRAIN["model"],
        "training": {"global_batch": 8, "learning_rate": 3e-3},
        "resources": {"workers": 2},
        "deepspeed": {"zero_stage": 2},
        "tracking": {"experiment": "chat"},
        "data": {"sequence_length": 64},
        "stages": [
            {"name": "text", "kind": "pretrain", "data": {"train": str(corpus)}, "training": {"steps": 4}},
            {
                "name": "answers",
                "kind": "finetune",
                "task": "chat",
                "data": {"train": str(answers), "validation_fraction": 0.2},
                "training": {"steps": 30, "eval_every_steps": 10},
            },
        ],
    }
    return run_stages(parse_stages(chain), runs.listener())


def test_the_model_that_is_left_is_a_plain_folder_with_its_template(trained: RunResult) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert trained.model_path is not None
    tokenizer = AutoTokenizer.from_pretrained(trained.model_path)
    asked = [{"role": "user", "content": "Read a line.\n\nline 3"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|assistant|>\n")
    AutoModelForCausalLM.from_pretrained(trained.model_path)


def test_it_is_logged_with_its_task_and_with_losses_of_answers_alone(trained: RunResult) -> None:
    assert trained.stages is not None
    own, uri = trained.stages[-1]["mlflow_run_id"], locations.default_tracking_uri()
    run, losses = runs.mlflow_run(own, uri=uri), runs.curve(own, "eval/loss", uri=uri)
    assert losses[max(losses)] < losses[10]
    assert {"eval/loss", "eval/perplexity"} <= run.data.metrics.keys()
    assert "eval/bits_per_byte" not in run.data.metrics, "templates differ"


def test_measured_again_it_has_the_same_figures(trained: RunResult, answers: Path) -> None:
    folder = model_folder(found_base(f"runs:/{trained.mlflow_run_id}"))
    block, chosen = model_in(folder), Options(model=folder, data=str(answers), split="held-out", workers=1)
    raw = evaluation(chosen, model=block, config=model_config(ModelSpec(**block)), trained=spec_behind(Path(folder)))
    assert raw["task"] == "chat"
    result = launch(parse_spec(raw), runs.listener(), fresh=True)
    assert result.metrics["eval/loss"] == pytest.approx(trained.metrics["eval/loss"], rel=1e-5)


def test_a_search_compares_ways_of_learning_to_answer(trained: RunResult, answers: Path) -> None:
    spec = parse_spec(
        {
            "name": "ways-to-chat",
            "kind": "finetune",
            "task": "chat",
            "model": {"base": f"runs:/{trained.mlflow_run_id}"},
            "data": {"train": str(answers), "sequence_length": 64, "validation_fraction": 0.2},
            "training": {"steps": 4, "global_batch": 4, "learning_rate": 1e-3},
            "resources": {"workers": 1},
            "tracking": {"experiment": "chat"},
            "search": {"space": {"method": {"grid": ["full", "lora"]}}, "scheduler": "none"},
        }
    )
    result = launch(spec, runs.listener())
    assert result.status == "finished"
    assert result.best is not None
    assert result.best["trial"] in ("00-full", "01-lora")
