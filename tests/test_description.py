from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.tracking.description import described, flatten, run_tags, source_tags
from tests import specs
from tests.training_runs import CLUSTER

SPEC = specs.spec(specs.PRETRAIN)
COUNTS = DatasetCounts(train_samples=900, train_tokens=28_800, validation_samples=100, vocab_size=512)


def test_flatten_dots_names_writes_lists_as_json_and_leaves_none_out() -> None:
    nested = {"a": {"b": {"c": 1e-4}, "d": None}, "e": ["x", 2], "f": "text", "g": True}
    assert flatten(nested) == {"a.b.c": "0.0001", "e": '["x", 2]', "f": "text", "g": "true"}


def test_tags_say_what_the_run_is() -> None:
    tags = run_tags(SPEC, data_fingerprint="abc")
    assert tags["orchestrator.kind"] == "pretrain"
    assert tags["orchestrator.quality_metric"] == "eval/bits_per_byte"
    assert tags["orchestrator.quality_mode"] == "min"
    assert tags["orchestrator.spec_fingerprint"] == SPEC.fingerprint()
    assert tags["orchestrator.data_fingerprint"] == "abc"
    assert "orchestrator.role" not in tags


def test_a_run_is_described_by_its_spec_and_its_plan(tmp_path: Path) -> None:
    plan = make_plan(SPEC, CLUSTER, counts=COUNTS)
    found = described(
        SPEC, plan, data_fingerprint="abc", held_out=specs.HELD_OUT, tokenizer_fingerprint="def", run_folder=tmp_path
    )
    assert found.params["training.learning_rate"] == "0.001"
    assert found.params["plan.workers"] == str(plan.workers)
    assert not [key for key in found.params if key.startswith(("plan.deepspeed", "plan.reasons"))]
    assert found.artifacts.keys() == {"spec.yaml", "plan.json"}
    assert "learning_rate: 0.001" in found.artifacts["spec.yaml"]
    assert found.tags["orchestrator.run_folder"] == str(tmp_path)
    assert found.tags["orchestrator.held_out_fingerprint"] == specs.HELD_OUT.fingerprint
    assert found.tags["orchestrator.tokenizer_fingerprint"] == "def"
    measured = {key: value for key, value in found.params.items() if key.startswith("held_out.")}
    assert measured["held_out.share"] == "0.2"
    assert (measured["held_out.examples"], measured["held_out.bytes"], measured["held_out.repeated"]) == (
        "8",
        "2048",
        "1",
    )


def test_the_revision_is_tagged_inside_a_checkout_only(tmp_path: Path) -> None:
    commit = "mlflow.source.git.commit"
    assert commit not in source_tags(tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert len(source_tags(tmp_path)[commit]) == 40
    assert source_tags(tmp_path)["orchestrator.git_dirty"] == "false"
    (tmp_path / "new").touch()
    assert source_tags(tmp_path)["orchestrator.git_dirty"] == "true"


@pytest.mark.parametrize("user", [None, "ada"])
def test_a_machine_without_a_name_for_its_user_tags_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    def getuser() -> str:
        if user is None:
            raise KeyError("getpwuid(): uid not found: 4711")
        return user

    monkeypatch.setattr("getpass.getuser", getuser)
    assert source_tags(tmp_path).get("mlflow.user") == user
