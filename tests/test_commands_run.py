from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.commands import run
from orchestrator.console import ProgressLine
from orchestrator.errors import SpecError, TransientError
from orchestrator.load_stages import parse_stages
from tests import specs
from tests.bases import write_base
from tests.s3 import BUCKET
from tests.test_load_stages import STAGES

SIGNALS = [signal.SIGINT, signal.SIGTERM]


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_for_a_stop_and_says_so(number: signal.Signals) -> None:
    stop, stream = threading.Event(), io.StringIO()
    with run.signals_stop(stop, ProgressLine(stream)) as signals:
        signals.ask_for_a_stop()
        signal.raise_signal(number)
        assert stop.is_set()
        join_speakers()
    assert stream.getvalue() == "stopping: saving a checkpoint (again to end at once)\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    with run.signals_stop(threading.Event(), ProgressLine(io.StringIO())) as signals:
        signals.ask_for_a_stop()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_at_once_while_there_is_nothing_to_save(number: signal.Signals) -> None:
    stop = threading.Event()
    with run.signals_stop(stop, ProgressLine(io.StringIO())), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not stop.is_set()


@pytest.mark.timeout(30)
def test_a_signal_in_the_middle_of_a_progress_line_does_not_wait_for_itself() -> None:
    stop, stream = threading.Event(), Interrupting()
    line = ProgressLine(stream)
    with run.signals_stop(stop, line) as signals:
        signals.ask_for_a_stop()
        line.say("a line")
        join_speakers()
    assert stop.is_set()
    assert stream.getvalue() == "a line\nstopping: saving a checkpoint (again to end at once)\n"


class Interrupting(io.StringIO):
    """A stream in whose first write the user types Ctrl-C."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_the_handlers_from_before_are_back_afterwards_and_can_be_installed_again() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with run.signals_stop(stop := threading.Event(), ProgressLine(io.StringIO())) as signals:
        signals.ask_for_a_stop()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray replaces it
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def join_speakers() -> None:
    for thread in threading.enumerate():
        if thread not in (threading.main_thread(), threading.current_thread()) and not thread.daemon:
            thread.join(5)


# -- what is refused before Ray starts -----------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def rows(folder: Path, labels: str = "ab") -> str:
    lines = [f"good film {index},{labels[index % len(labels)]}" for index in range(40)]
    return write(folder, "rows.csv", "\n".join(["text,label", *lines]) + "\n")


def base_model(folder: Path) -> str:
    """A BERT's folder as far as planning and tokenizing look at it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = folder / "base"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"model_type": "bert", "vocab_size": 16, "max_position_embeddings": 64, "type_vocab_size": 2, **sizes}
    write_base(base, config)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    return str(base)


def classify(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"model__base": base_model(folder), "data__train": changes.pop("data__train", None) or rows(folder)}
    return specs.raw(specs.CLASSIFY, **given, **changes)


def pretrain(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"data__train": str(specs.write_corpus(folder / "corpus", documents=4)), **changes}
    return specs.raw(specs.PRETRAIN, **given)


Build = Callable[[Path], dict[str, Any]]

DATA_MISTAKES: dict[str, tuple[Build, tuple[str, ...]]] = {
    "a wrong path": (
        lambda folder: pretrain(folder, data__train=str(folder / "corpsu")),
        ("does not exist", "got: 'corpsu' is not in", "allowed:", "did you mean"),
    ),
    "an empty file": (
        lambda folder: pretrain(folder, data__train=write(folder, "empty.txt", "")),
        ("empty.txt holds no text", "got: only empty or blank files", "do: check data.train"),
    ),
    "an empty table": (
        lambda folder: classify(folder, data__train=write(folder, "empty.csv", "")),
        ("empty.csv is empty", "got: 0 bytes", "do:"),
    ),
    "no such text column": (
        lambda folder: classify(folder, data__text_column="review"),
        ("has no column 'review'", "data.text_column=review", "allowed: text, label", "do:"),
    ),
    "no such label column": (
        lambda folder: classify(folder, data__label_column="lable"),
        ("has no column 'lable'", "data.label_column=lable", "allowed: text, label", "mean data.label_column=label?"),
    ),
    "one class only": (
        lambda folder: classify(folder, data__train=rows(folder, labels="a")),
        ("holds one class only", "got: 1 distinct value in", "allowed: 2 to", "do:"),
    ),
    "a class of one row": (
        lambda folder: classify(folder, data__train=rows(folder, labels="a" * 39 + "b")),
        ("a class with one row", "got: label b", "do:"),
    ),
    "no such base model": (
        lambda folder: classify(folder) | {"model": {"base": str(folder / "nowhere")}},
        ("nowhere", "do:"),
    ),
    "samples longer than the model's context": (
        lambda folder: classify(folder, data__sequence_length=65),
        ("longer than the model's context", "got: data.sequence_length: 65", "at most 64", "length=64"),
    ),
    "a trial with samples longer than the context": (
        lambda folder: classify(
            folder,
            search={"space": {"data.sequence_length": {"grid": [16, 65]}}, "scheduler": "none"},
        ),
        ("longer than the model's context", "got: data.sequence_length: 65"),
    ),
    "storage that is a file": (
        lambda folder: pretrain(folder, checkpoint__storage=write(folder, "file", "")),
        ("checkpoint.storage is a file", "got:", "do:"),
    ),
}


@pytest.fixture(params=["own Ray", "a cluster"])
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any start of Ray fails the test; caches are the test's own."""
    from orchestrator.scheduling import launch

    def refuse() -> None:
        pytest.fail("Ray was about to start")

    monkeypatch.setattr(launch, "ray_session", refuse)
    if request.param == "a cluster":  # whose shape is not known before connecting
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_a_mistake_in_data_or_model_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    build, expected = DATA_MISTAKES[mistake]
    spec = write(tmp_path, "spec.yaml", yaml.safe_dump(build(tmp_path)))
    with pytest.raises(SystemExit) as ended:
        run.run_command(spec)
    error = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert [part for part in expected if part not in error] == [], error
    assert "Traceback" not in error
    assert not list((tmp_path / "home").glob("runs/*")), "nothing was begun"


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_an_unusable_mlflow_store_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(tmp_path, "spec.yaml", yaml.safe_dump(pretrain(tmp_path, tracking__uri="http://:5000")))
    with pytest.raises(SystemExit) as ended:
        run.run_command(spec)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert "the address of the MLflow store names no host" in error
    assert "allowed:" in error


# -- what a failed run answers -------------------------------------------------------------------------------------


def failing_launch(folder: Path, error: BaseException) -> Callable[..., Any]:
    """A run that opened its folder, saved twice, was saving again, and failed."""

    def launch(spec: Any, listener: Any, *, fresh: bool) -> None:
        listener.opened(folder, "abc123")
        for name in ("step-00000010", "step-00000020", "step-00000030.a1.writing"):
            (folder / "checkpoints" / name).mkdir(parents=True)
            (folder / "checkpoints" / name / "manifest.json").write_text('{"attempt": 1}')
        raise error

    return launch


@pytest.mark.slow  # it imports Ray
def test_a_failed_run_answers_with_the_parts_of_its_error_and_what_is_left_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.scheduling import launch

    error = TransientError("a worker died", got="SIGKILL", do="the same command goes on")
    monkeypatch.setattr(launch, "launch", failing_launch(tmp_path / "run", error))
    with pytest.raises(SystemExit) as ended:
        run.run_command(write(tmp_path, "spec.yaml", yaml.safe_dump(specs.PRETRAIN)), as_json=True)
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(shown.out) == {
        "status": "failed",
        "error": str(error),
        "failure": {"what": "a worker died", "got": "SIGKILL", "allowed": None, "do": "the same command goes on"},
        "mlflow_run_id": "abc123",
        "run_folder": str(tmp_path / "run"),
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "step-00000020"),
        "model_path": None,
        "metrics": {},
        "restarts": 0,
        "evaluation": None,
        "stages": None,
    }
    assert shown.err == f"error: {error}\n"


@pytest.mark.slow  # a server, and Ray
def test_a_failed_run_knows_its_newest_checkpoint_in_a_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    from orchestrator.scheduling import launch

    for key in ("step-00000010.a1/manifest.json", "step-00000020.a1/manifest.json", "step-00000030.a1/state/model.pt"):
        s3.put_object(Bucket=BUCKET, Key=f"runs/run/checkpoints/{key}", Body=b'{"attempt": 1}')
    monkeypatch.setattr(launch, "launch", failing_launch(tmp_path / "run", TransientError("a worker died")))
    spec = specs.raw(specs.PRETRAIN, checkpoint__storage=f"s3://{BUCKET}/runs")
    with pytest.raises(SystemExit):
        run.run_command(write(tmp_path, "spec.yaml", yaml.safe_dump(spec)), as_json=True)
    assert json.loads(capsys.readouterr().out)["checkpoint"] == f"s3://{BUCKET}/runs/run/checkpoints/step-00000020.a1"


def test_a_mistake_in_the_spec_answers_with_its_parts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, "spec.yaml", yaml.safe_dump(specs.PRETRAIN))
    with pytest.raises(SystemExit) as ended:
        run.run_command(spec, ["training.stepz=4"], as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert ended.value.code == 2
    assert answer["status"] == "failed"
    assert "unknown key training.stepz" in answer["failure"]["what"]
    assert "did you mean training.steps?" in answer["failure"]["do"]
    assert (answer["run_folder"], answer["mlflow_run_id"], answer["checkpoint"]) == (None, None, None)


# -- jobs ----------------------------------------------------------------------------------------------------------


JOBS = {
    "pretrain": (("pretrain",), False),
    "finetune": (("finetune",), False),
    "tune": (("finetune",), True),
    "evaluate": (("evaluate",), False),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_shows_its_help_with_an_example(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds, search = JOBS[job]
    with pytest.raises(SystemExit) as ended:
        run.main_of_job(["--help"], kinds=kinds, search=search, prog=f"jobs.{job}")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: ray job submit --working-dir . -- python -m jobs.{job} --config" in text


def test_a_job_sends_a_spec_of_another_kind_to_the_job_it_is_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(tmp_path, "spec.yaml", yaml.safe_dump(specs.PRETRAIN))
    with pytest.raises(SystemExit) as ended:
        run.main_of_job(["--config", spec], kinds=("finetune",), search=False, prog="jobs.finetune")
    assert ended.value.code == 2
    assert "use python -m jobs.pretrain" in capsys.readouterr().err


def test_stages_are_for_the_job_of_any_of_them_and_for_no_search() -> None:
    staged = parse_stages(STAGES)
    for job in ("pretrain", "finetune"):
        run.check_kind(staged, kinds=(job,), search=False, prog=f"jobs.{job}")
    with pytest.raises(SpecError, match=r"(?s)got: +stages.*use python -m jobs.pretrain"):
        run.check_kind(staged, kinds=("pretrain", "finetune"), search=True, prog="jobs.tune")


def test_a_job_takes_overrides_before_and_after_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path, "spec.yaml", yaml.safe_dump(specs.PRETRAIN))
    arguments = ["training.steps=3", "--config", spec, "training.stepz=4", "--json"]
    with pytest.raises(SystemExit) as ended:
        run.main_of_job(arguments, kinds=("pretrain",), search=False, prog="jobs.pretrain")
    assert ended.value.code == 2
    assert "unknown key training.stepz" in capsys.readouterr().err


def test_an_unknown_option_of_a_job_is_a_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main_of_job(["--confg", os.devnull], kinds=("pretrain",), search=False, prog="jobs.pretrain")
    assert ended.value.code == 2
    assert "--config" in capsys.readouterr().err
