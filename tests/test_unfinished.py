"""The note on an unfinished run of the same name."""

from __future__ import annotations

from pathlib import Path

from orchestrator.load_spec import apply_override, parse_spec
from orchestrator.runs.attempts import Attempts
from orchestrator.scheduling.run_folder import RESULT
from orchestrator.scheduling.unfinished import keep_identity, note_on_unfinished
from orchestrator.spec import RunSpec
from tests.specs import PRETRAIN, raw, spec


def begun(runs: Path, name: str, run: RunSpec) -> Path:
    folder = runs / name
    folder.mkdir(parents=True)
    keep_identity(run, folder)
    return folder


def test_an_edited_spec_names_the_unfinished_run_and_the_overrides_that_go_on_with_it(tmp_path: Path) -> None:
    begun(tmp_path, "tiny-0123abcd", spec(PRETRAIN))
    edited = spec(PRETRAIN, training__learning_rate=0.5, training__eval_every_steps=2)
    note = note_on_unfinished(edited, tmp_path / "tiny-99999999")
    assert note is not None
    assert "tiny-0123abcd, has another training.eval_every_steps, training.learning_rate" in note
    back = note.partition("add ")[2].split()
    assert back == ["training.eval_every_steps=null", "training.learning_rate=0.001"]
    values = raw(PRETRAIN, training__learning_rate=0.5, training__eval_every_steps=2)
    for override in back:
        apply_override(values, override)
    assert parse_spec(values).fingerprint() == spec(PRETRAIN).fingerprint()


def test_other_data_under_the_same_spec_is_named_as_such(tmp_path: Path) -> None:
    begun(tmp_path, "tiny-0123abcd", spec(PRETRAIN))
    note = note_on_unfinished(spec(PRETRAIN), tmp_path / "tiny-99999999")
    assert note is not None
    assert "other data or another base model" in note


def test_nothing_is_said_of_finished_runs_other_names_and_a_run_that_goes_on(tmp_path: Path) -> None:
    edited, own = spec(PRETRAIN, training__seed=1), tmp_path / "tiny-99999999"
    (begun(tmp_path, "tiny-0123abcd", spec(PRETRAIN)) / RESULT).write_text("{}")
    begun(tmp_path, "tiny-too-0123abcd", spec(PRETRAIN))
    begun(tmp_path, "tiny-0123abcd.unsent-0123abcd", spec(PRETRAIN))
    assert note_on_unfinished(edited, own) is None
    begun(tmp_path, "tiny-4567abcd", spec(PRETRAIN))
    assert note_on_unfinished(edited, own) is not None
    Attempts(own).open(workers=1, cause="first start")
    assert note_on_unfinished(edited, own) is None
