"""What makes a run another run: its settings, and every file that it reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.samples.prepare import PreparedData, encode_here, prepare
from orchestrator.scheduling.identity import identity_of
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.tracking.finished_model import with_base_found
from tests import specs
from tests.mlflow_runs import closed, new_store, opened
from tests.test_commands_run import base_model
from tests.test_contents import replace_keeping_time, replace_last_byte_keeping_time

LARGE = 3 << 20
"""Bytes of weights whose hash is remembered."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))


def place(folder: Path) -> Path:
    """Rows and a base model, as far as they are looked at before a training."""
    folder.mkdir()
    weights = Path(base_model(folder)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x" * LARGE)
    for name in ("rows", "held"):
        lines = [json.dumps({"text": f"good film {name} {n}", "label": "ab"[n % 2]}) for n in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def classify(folder: Path, **changes: Any) -> RunSpec:
    given = {"model__base": str(folder / "base"), "data__train": str(folder / "rows.jsonl")}
    return specs.spec(specs.CLASSIFY, **{**given, "data__validation": str(folder / "held.jsonl"), **changes})


def encoded(spec: RunSpec) -> PreparedData:
    return prepare(spec, cache=locations.home() / "cache" / "data", encode=encode_here)


def identity(spec: RunSpec) -> str:
    points = [] if spec.search is None else [trial.spec for trial in trials(spec)]
    return identity_of(spec, encoded(spec), [(point, encoded(point)) for point in points])


def append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write(" ")


def other_weights(folder: Path) -> None:
    replace_last_byte_keeping_time(folder / "base" / "model.safetensors")


def other_tokenizer(folder: Path) -> None:
    file = folder / "base" / "tokenizer.json"
    file.write_text(file.read_text().replace("good", "fine"))


def other_tokenizer_config(folder: Path) -> None:
    (folder / "base" / "tokenizer_config.json").write_text('{"do_lower_case": false}')


def other_rows(folder: Path) -> None:
    file = folder / "rows.jsonl"
    replace_keeping_time(file, file.read_bytes().replace(b"good", b"fine"))


def other_validation(folder: Path) -> None:
    file = folder / "held.jsonl"
    replace_keeping_time(file, file.read_bytes().replace(b"good", b"fine"))


def other_configuration(folder: Path) -> None:
    append(folder / "base" / "config.json")


def an_adapter(folder: Path) -> None:
    (folder / "base" / "adapter_model.safetensors").write_bytes(b"an adapter")


EVERY_INPUT = [
    other_weights,
    other_tokenizer,
    other_tokenizer_config,
    other_rows,
    other_validation,
    other_configuration,
    an_adapter,
]


@pytest.mark.parametrize("change", EVERY_INPUT, ids=lambda change: change.__name__)
def test_a_run_on_another_input_under_the_same_name_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr("orchestrator.data.contents._SETTLED_NS", -1)
    folder = place(tmp_path / "here")
    first = identity(classify(folder))
    assert identity(classify(folder)) == first
    change(folder)
    assert identity(classify(folder)) != first


def test_general_data_is_part_of_a_run_by_its_content(tmp_path: Path) -> None:
    folder = place(tmp_path / "here")

    def with_general(text: str) -> str:
        file = tmp_path / f"{text}.jsonl"
        file.write_text((folder / "rows.jsonl").read_text().replace("good", text))
        return identity(classify(folder, retain={"data": str(file), "replay": 0.25}))

    first = with_general("fine")
    assert first != identity(classify(folder))
    assert with_general("other") != first
    (tmp_path / "fine.jsonl").rename(tmp_path / "elsewhere.jsonl")
    moved = classify(folder, retain={"data": str(tmp_path / "elsewhere.jsonl"), "replay": 0.25})
    assert identity(moved) == first


def test_a_run_on_copies_elsewhere_is_the_same_run(tmp_path: Path) -> None:
    here = place(tmp_path / "here")
    there = Path(shutil.copytree(here, tmp_path / "there"))
    os.utime(there / "base" / "model.safetensors", ns=(0, 0))
    assert identity(classify(there)) == identity(classify(here))
    tokenizer = shutil.copytree(here / "base", tmp_path / "tokenizer")
    assert identity(classify(here, model__tokenizer=str(tokenizer))) == identity(classify(here))


def test_what_lies_beside_a_model_and_is_not_read_does_not_matter(tmp_path: Path) -> None:
    folder = place(tmp_path / "here")
    first = identity(classify(folder))
    (folder / "base" / "README.md").write_text("a model")
    (folder / "base" / "training_args.bin").write_bytes(b"x")
    (folder / "base" / "checkpoint-10").mkdir()
    assert identity(classify(folder)) == first


def test_weights_that_training_from_scratch_does_not_read_do_not_matter(tmp_path: Path) -> None:
    folder = place(tmp_path / "here")
    scratch = classify(folder, method="scratch")
    first = identity(scratch)
    other_weights(folder)
    assert identity(scratch) == first
    other_configuration(folder)
    assert identity(scratch) != first


@pytest.mark.parametrize(
    "change",
    [
        {"training__learning_rate": 2e-3},
        {"training__seed": 1},
        {"method": "head"},
        {"data__split_seed": 1, "data__validation": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_with_other_settings_is_another_run(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = place(tmp_path / "here")
    assert identity(classify(folder, **change)) != identity(classify(folder))


def test_a_configuration_in_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus", documents=10)
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 512}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def of(config: Path | str) -> str:
        return identity(specs.spec(specs.PRETRAIN, data__train=str(corpus), model__config=str(config)))

    first = of(tmp_path / "one")
    assert of(tmp_path / "two") == of(tmp_path / "two" / "config.json") == first != of("gpt2")
    append(tmp_path / "two" / "config.json")
    assert of(tmp_path / "two") != first


def test_a_search_is_another_one_when_an_input_of_one_of_its_trials_changes(tmp_path: Path) -> None:
    here, there = place(tmp_path / "here"), place(tmp_path / "there")
    search: dict[str, Any] = {"scheduler": "none"}

    def over(*bases: Path) -> RunSpec:
        space = {"model.base": {"grid": [str(base / "base") for base in bases]}}
        return classify(here, search={**search, "space": space})

    first = identity(over(here, there))
    copy = Path(shutil.copytree(there, tmp_path / "copy"))
    assert identity(over(here, copy)) == first != identity(over(here))
    other_weights(there)
    assert identity(over(here, there)) != first


@pytest.mark.slow
def test_a_finished_run_as_base_is_known_by_the_model_it_has_left(tmp_path: Path) -> None:
    here, there = place(tmp_path / "here"), place(tmp_path / "there")
    uri = new_store(tmp_path)

    def based_on(folder: Path, name: str) -> RunSpec:
        tags = {"orchestrator.model_path": str(folder / "base")}
        run_id = closed(opened(uri, tmp_path / name), tags=tags)
        return with_base_found(classify(here, model__base=f"runs:/{run_id}", tracking__uri=uri))

    one, same = based_on(here, "one"), based_on(there, "same")
    first = identity(one)
    assert identity(same) == first
    other_weights(there)
    assert identity(same) != first == identity(one)
