from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import __version__, cli
from tests import specs
from tests.mlflow_runs import closed, new_store, opened

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "advise",
    "estimate",
    "run",
    "evaluate",
    "plan",
    "compare",
    "flush",
    "verify-resume",
    "doctor",
    "schema",
    "submit",
    "jobs",
    "logs",
    "stop",
    "cluster",
)
INTERVALS = {"gpu_hours", "wall_hours", "usd", "peak_gib"}
PLAN_FIELDS = INTERVALS | {
    *("fits", "workers", "zero_stage", "offload", "micro_batch", "accumulation", "global_batch", "deepspeed"),
}


class Command:
    """Calls the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self._monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self._capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def orchestrator(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


def write(folder: Path, base: Mapping[str, Any] = specs.PRETRAIN, **changes: Any) -> str:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(specs.raw(dict(base), **changes)))
    return str(path)


# -- help and usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(orchestrator: Command, command: str) -> None:
    code, out, err = orchestrator(command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: orchestrator {command}" in " ".join(out.split())


def test_no_other_commands_exist_and_each_has_a_line_of_help(orchestrator: Command) -> None:
    code, out, _ = orchestrator("--help")
    assert code == 0
    listed = re.findall(r"^  ([\w-]+) +\w", out.partition("Commands:")[2], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_the_version_is_told(orchestrator: Command) -> None:
    assert orchestrator("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("rum", "spec.yaml"), "rum"),
        (("run", "spec.yaml", "--jsonn"), "--jsonn"),
        (("plan",), "SPEC"),
        (("plan", "spec.yaml", "--gpus", "many"), "--gpus"),
    ],
    ids=["an unknown command", "an unknown option", "no spec", "a word for a number"],
)
def test_a_wrong_use_is_named_on_standard_error_and_exits_2(
    orchestrator: Command, arguments: tuple[str, ...], named: str
) -> None:
    code, out, err = orchestrator(*arguments)
    assert (code, out) == (2, "")
    assert named in err


@pytest.mark.parametrize("given", [("plan", "--{}", "x.yaml"), ("{}",), ("--{}",), ("plan", "x.yaml", "--gpus", "{}")])
def test_a_wrong_use_is_told_without_secrets_on_a_screen(orchestrator: Command, given: tuple[str, ...]) -> None:
    value = f"s3://me:hunter2@bucket/{'a' * 20_000}"
    code, _, err = orchestrator(*(argument.format(value) for argument in given))
    assert code == 2
    assert "hunter2" not in err
    assert len(err) < 3_000


# -- mistakes in a spec --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training__stepz": 3}, ("unknown key training.stepz", "allowed:", "did you mean training.steps?")),
        ({"training__global_batch": 7, "resources__workers": 2}, ("cannot be split over 2 workers", "6 or 8")),
        ({"training__tokens": 1000}, ("set exactly one of", "training.tokens=null clears")),
        ({"model__config": "gpt9"}, ("model.config", "got:", "gpt9", "do:")),
        ({"training__precision": "fp12"}, ("training.precision", "got:", "allowed:")),
        ({"data__test": []}, ("data.test", "[]", "a text or a list of at least 1")),
        ({"data__train": []}, ("data.train", "[]", "a text or a list of at least 1")),
        ({"retain": {"data": []}}, ("retain.data", "[]", "a text or a list of at least 1")),
    ],
    ids=[
        *("an unknown key", "a batch that cannot be split", "two lengths", "no such architecture", "no such value"),
        *("no test data", "no training data", "no general data"),
    ],
)
def test_a_mistake_in_a_spec_is_explained_and_exits_2(
    orchestrator: Command, tmp_path: Path, command: str, changes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    changes = {"data__train": str(specs.write_corpus(tmp_path / "corpus", documents=3)), **changes}
    code, out, err = orchestrator(command, write(tmp_path, **changes))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert [part for part in expected if part not in err] == [], err


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ("the spec file cannot be read", "got:", "do:", "other.yaml")),
        ("name: [tiny", ("is not valid YAML", "line 1")),
        ("", ("holds no spec", "an empty file", "configs/")),
        (b"\xff\xfe\x00", ("the spec file cannot be read", "got:")),
    ],
    ids=["a wrong path", "broken YAML", "an empty file", "a binary file"],
)
def test_a_file_that_is_no_spec_is_explained_and_exits_2(
    orchestrator: Command, tmp_path: Path, command: str, content: str | bytes | None, expected: tuple[str, ...]
) -> None:
    (tmp_path / "other.yaml").touch()
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = orchestrator(command, str(path))
    assert (code, out) == (2, "")
    assert [part for part in expected if part not in err] == [], err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_refusal_in_json_is_one_object_too(orchestrator: Command, tmp_path: Path, command: str) -> None:
    code, out, err = orchestrator(command, str(tmp_path / "nowhere.yaml"), "--json")
    answer = json.loads(out)
    assert code == 2
    assert answer["status"] == "failed"
    assert err == f"error: {answer['error']}\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", ("an override is key=value", "training.steps")),
        ("=3", ("an override is key=value", "=3")),
        ("training.steps=[3", ("not valid YAML", "[3")),
        ("name.first=x", ("name.first cannot be set", "name is not a block")),
    ],
)
def test_an_override_that_cannot_be_applied_is_explained(
    orchestrator: Command, tmp_path: Path, override: str, expected: tuple[str, ...]
) -> None:
    code, out, err = orchestrator("plan", write(tmp_path), override)
    assert (code, out) == (2, "")
    assert [part for part in expected if part not in err] == [], err


# -- plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_answers_with_the_promised_fields(orchestrator: Command, tmp_path: Path) -> None:
    code, out, err = orchestrator("plan", write(tmp_path), "--json", "training.global_batch=4")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer.keys() >= PLAN_FIELDS
    assert all(answer[name].keys() == {"low", "mid", "high"} for name in INTERVALS)
    assert answer["global_batch"] == 4
    assert answer["deepspeed"]["train_batch_size"] == 4


def test_a_plan_for_gpus_needs_none(orchestrator: Command, tmp_path: Path) -> None:
    arguments = ("--gpu", "H100", "--gpus", "8", "--nodes", "2", "resources.workers=8")
    code, out, _ = orchestrator("plan", write(tmp_path), *arguments, "--json")
    assert code == 0
    assert (json.loads(out)["workers"], json.loads(out)["device"]) == (8, "cuda")


def test_an_unknown_gpu_is_named_with_the_known_ones(orchestrator: Command, tmp_path: Path) -> None:
    code, _, err = orchestrator("plan", write(tmp_path), "--gpu", "H1000")
    assert code == 2
    assert "H1000" in err
    assert "H100" in err.partition("allowed:")[2]


def test_more_workers_than_cores_are_refused(orchestrator: Command, tmp_path: Path) -> None:
    code, _, err = orchestrator("plan", write(tmp_path), "resources.workers=512", "training.global_batch=512")
    assert code == 1
    assert "512" in err
    assert "do:" in err


def test_planning_takes_under_a_second_and_loads_no_heavy_library(tmp_path: Path) -> None:
    heavy = ("torch", "ray", "mlflow", "transformers", "deepspeed", "datasets", "matplotlib")
    code = (
        "import atexit, sys; from orchestrator.cli import main; "
        f"atexit.register(lambda: print([n for n in {heavy!r} if n in sys.modules], file=sys.stderr)); main()"
    )
    command = [sys.executable, "-c", code, "plan", write(tmp_path), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["fits"] is True
    # Processor seconds: those of the clock depend on what else runs here.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


# -- the other commands --------------------------------------------------------------------------------------------


def test_the_schema_is_the_shipped_one(orchestrator: Command) -> None:
    code, out, err = orchestrator("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((ROOT / "configs" / "spec.schema.json").read_text())


def test_the_schema_goes_to_a_file(orchestrator: Command, tmp_path: Path) -> None:
    code, out, _ = orchestrator("schema", "--write", str(tmp_path / "schema.json"))
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "schema.json").read_text())["title"] == "orchestrator run spec"
    code, _, err = orchestrator("schema", "--write", str(tmp_path / "nowhere" / "schema.json"))
    assert code == 2
    assert "No such file or directory" in err


@pytest.mark.slow
def test_comparing_what_is_not_there_is_explained(orchestrator: Command, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'none.db'}"
    code, out, err = orchestrator("compare", "--tracking-uri", store, "--json")
    assert code == 1
    assert "there is no MLflow store" in err
    assert json.loads(out)["status"] == "failed"


@pytest.mark.slow
def test_an_unknown_experiment_is_named_with_the_known_ones(orchestrator: Command, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    closed(opened(store, tmp_path / "run", experiment="films"))
    code, _, err = orchestrator("compare", "--tracking-uri", store, "--experiment", "film")
    assert code == 2
    assert "allowed: films do: set --experiment films" in " ".join(err.split()), "and not MLflow's own, empty one"


@pytest.mark.slow
def test_doctor_answers_with_findings_and_their_remedies(orchestrator: Command) -> None:
    code, out, _ = orchestrator("doctor", "--json")
    answer = json.loads(out)
    assert code == (0 if answer["ok"] else 1)
    assert {"python", "packages", "port 6379", "mlflow"} <= {finding["check"] for finding in answer["findings"]}
    assert all(finding["remedy"] for finding in answer["findings"] if finding["status"] != "ok")


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "orchestrator", "--version"]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{__version__}\n", "")
