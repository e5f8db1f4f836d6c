from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SpecError
from orchestrator.load_stages import load_any
from orchestrator.submission.job import JobRequest, job_request, submission_id
from tests import specs
from tests.test_measured_rows import EVALUATE


def requested(folder: Path, *overrides: str, base: dict[str, Any] = specs.PRETRAIN, **changes: Any) -> JobRequest:
    file = folder / "specs" / "tiny.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(specs.raw(base, **changes)))
    spec = load_any(file, overrides)
    return job_request(spec, file, overrides, folder=folder, owner="ada", fresh=False)


def test_a_spec_becomes_the_job_of_its_kind_with_its_overrides_as_typed(tmp_path: Path) -> None:
    made = requested(tmp_path, "training.steps=3", "name=a-b")
    assert made.entrypoint == "python -m jobs.pretrain --config specs/tiny.yaml training.steps=3 name=a-b"
    assert made.metadata == {"name": "a-b", "owner": "ada", "kind": "pretrain"}
    assert requested(tmp_path, base=specs.CLASSIFY).kind == "finetune"
    search = {"space": {"training.seed": {"grid": [0, 1]}}, "scheduler": "none"}
    assert requested(tmp_path, search=search, budget="2 usd").entrypoint.startswith("python -m jobs.tune ")


def test_a_measurement_is_a_job_that_takes_its_adapter_and_data_along(tmp_path: Path) -> None:
    for name in ("base/config.json", "adapter/adapter_config.json", "rows.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    made = requested(tmp_path, base=EVALUATE, model={"base": "base", "adapter": "adapter"})
    assert made.entrypoint == "python -m jobs.evaluate --config specs/tiny.yaml"
    travels = {"specs/tiny.yaml", "base/config.json", "adapter/adapter_config.json", "rows.csv"}
    assert {name for name, _ in made.needed} == travels


def test_an_override_cannot_become_a_command_of_the_shell(tmp_path: Path) -> None:
    made = requested(tmp_path, "data.text_column=a; rm -rf $HOME")
    assert made.entrypoint.endswith(" 'data.text_column=a; rm -rf $HOME'")


def test_files_that_the_spec_names_travel_and_it_is_said_what_does_not(tmp_path: Path) -> None:
    specs.write_corpus(tmp_path / "corpus", documents=2)
    made = requested(tmp_path, "data.validation=/srv/held-out")
    assert {name.partition("/")[0] for name, _ in made.needed} == {"specs", "corpus"}
    assert made.stays == ("/srv/held-out does not travel: the job reads it on the cluster",)


def test_a_spec_outside_of_the_folder_and_its_deepspeed_file_come_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "tiny.yaml"
    (tmp_path / "ds.json").write_text("{}")
    file.write_text(yaml.safe_dump(specs.raw(specs.PRETRAIN) | {"deepspeed": "ds.json"}))
    made = job_request(load_any(file), file, (), folder=tmp_path / "in", owner=None, fresh=True)
    assert made.entrypoint == "python -m jobs.pretrain --config submitted/tiny.yaml --fresh"
    assert [name for name, _ in made.needed] == ["submitted/tiny.yaml", "submitted/ds.json"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.storage=runs", "checkpoint.storage is a relative folder"),
        ("tracking.uri=sqlite:///runs.db", "tracking.uri is a relative file"),
        ("tracking.uri=http://me:secret@host", "a password in a key=value"),
    ],
)
def test_what_would_be_lost_or_seen_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        requested(tmp_path, override)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("override", ["checkpoint.storage=/shared", "tracking.uri=sqlite:////shared/m.db"])
def test_what_outlives_the_job_is_taken(tmp_path: Path, override: str) -> None:
    assert requested(tmp_path, override).name == "tiny"


def test_jobs_are_numbered_by_name_and_no_number_is_used_twice() -> None:
    assert submission_id("demo", []) == "demo-1"
    assert submission_id("demo", ["demo-1", "demo-10", "demo-x", "other-20", "my-demo-30"]) == "demo-11"
