from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.commands.submit import job_environment, plan_on
from orchestrator.errors import SpecError
from orchestrator.load_stages import load_any
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.provenance import Provenance
from orchestrator.submission.job import DEFAULT_ENVIRONMENT
from tests import specs


def shape(cpus: int) -> ClusterShape:
    return ClusterShape(nodes=(NodeShape(cpus=cpus, gpus=0, memory_gib=16),), device_name="cpu")


def pretraining(folder: Path, **changes: Any) -> Any:
    return specs.spec(specs.PRETRAIN, data__train=str(specs.write_corpus(folder / "corpus")), **changes)


def test_the_plan_is_that_of_the_clusters_nodes(tmp_path: Path) -> None:
    planned = plan_on(pretraining(tmp_path, resources__workers=4), (shape(4),)).to_dict()
    assert (planned["plan"]["workers"], planned["not_planned"]) == (4, None)
    assert "4 CPU cores" in " ".join(planned["plan"]["reasons"])


def test_a_cluster_without_room_now_is_no_reason_to_refuse(tmp_path: Path) -> None:
    planned = plan_on(pretraining(tmp_path, resources__workers=2), (shape(0),)).to_dict()
    assert planned["plan"] is None
    assert "no room for it now" in str(planned["not_planned"])


@pytest.mark.parametrize("base", ["/nowhere/base", "package://no_such_package/model"])
def test_a_base_that_lies_on_the_cluster_alone_is_said_to(base: str) -> None:
    planned = plan_on(specs.spec(specs.CLASSIFY, model__base=base), (shape(2),))
    assert f"the base {base} is not on this machine" in str(planned.why_not)


def test_a_mistake_is_none_of_these(tmp_path: Path) -> None:
    search = {"metric": "eval/accuracy", "space": {"training.seed": {"grid": [0, 1]}}, "scheduler": "none"}
    with pytest.raises(SpecError):
        plan_on(pretraining(tmp_path, search=search | {"metric": "eval/nothing"}), (shape(2),))


@pytest.mark.slow
def test_stages_are_planned_as_a_whole() -> None:
    file = Path(__file__).parents[1] / "configs" / "stages" / "reviews.yaml"
    planned = plan_on(load_any(file), (shape(2),)).to_dict()
    assert len(planned["plan"]["stages"]) > 1


def test_variables_of_the_folder_go_before_ours_and_where_the_job_comes_from_before_both(tmp_path: Path) -> None:
    source = Provenance(user="ada", commit="abc")
    assert job_environment(tmp_path, source)["env_vars"] == {
        **DEFAULT_ENVIRONMENT,
        "ORCHESTRATOR_SUBMITTED_BY": "ada",
        "ORCHESTRATOR_GIT_COMMIT": "abc",
    }
    (tmp_path / "jobs").mkdir()
    own = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": 120, "MY": "x"}, "pip": ["a"]}
    (tmp_path / "jobs" / "runtime-env.yaml").write_text(yaml.safe_dump(own))
    found = job_environment(tmp_path, source)
    assert found["pip"] == ["a"]
    assert (found["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"], found["env_vars"]["MY"]) == ("120", "x")
