from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.provenance import Provenance, carried, provenance_of
from orchestrator.tracking.description import source_tags

NAMES = st.one_of(st.none(), st.text(min_size=1, max_size=40).filter(lambda text: "\0" not in text))


@given(NAMES, NAMES, st.sampled_from([None, True, False]))
def test_what_is_carried_arrives(user: str | None, commit: str | None, dirty: bool | None) -> None:
    source = Provenance(user=user, commit=commit, is_dirty=dirty)
    arrived = carried(source.to_environment())
    assert arrived == (source if source != Provenance() else None)


def test_a_checkout_tells_its_revision_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert provenance_of(tmp_path).commit is None
    assert provenance_of(tmp_path).is_dirty is None
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = provenance_of(tmp_path)
    assert clean.commit is not None
    assert (len(clean.commit), clean.is_dirty) == (40, False)
    (tmp_path / "new").touch()
    assert provenance_of(tmp_path).is_dirty is True


def test_mlflow_is_told_of_the_submitting_side_where_it_said_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Provenance(user="ada", commit="a" * 40, is_dirty=True)
    for name, value in source.to_environment().items():
        monkeypatch.setenv(name, value)
    tags = source_tags(tmp_path)
    assert (tags["mlflow.user"], tags["mlflow.source.git.commit"]) == ("ada", "a" * 40)
    assert tags["orchestrator.git_dirty"] == "true"


def test_of_a_job_without_a_known_revision_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_SUBMITTED_BY", "ada")
    assert source_tags(tmp_path).keys() == {"mlflow.source.name", "mlflow.user"}
