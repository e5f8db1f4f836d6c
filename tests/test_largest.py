"""The clusters that a shipped file can grow into, to plan for while none of its nodes is up."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.cluster_files.largest import largest_clusters
from orchestrator.cluster_files.shipped import SHIPPED, shipped_text
from orchestrator.commands.plan import preview_on_first
from orchestrator.errors import CapacityError, SpecError
from tests.specs import PRETRAIN, spec


def written(tmp_path: Path, provider: str, *changes: tuple[str, str]) -> Path:
    text = shipped_text(provider)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "cluster.yaml").write_text(text)
    return tmp_path / "cluster.yaml"


@pytest.mark.parametrize("provider", [name for name in SHIPPED if name != "on-premises"])
def test_every_shipped_file_says_what_it_can_grow_into(provider: str, tmp_path: Path) -> None:
    (shape,) = largest_clusters(written(tmp_path, provider))
    device = {"azure": "A100-80GB"}.get(provider, "L4")
    assert (shape.device_name, shape.gpus % 4) == (device, 0)
    assert all(node.gpus == 4 and node.cpus >= 24 and node.memory_gib >= 90 for node in shape.nodes)


def test_the_limits_of_the_file_are_those_of_the_cluster_and_the_head_does_not_train(tmp_path: Path) -> None:
    (shape,) = largest_clusters(written(tmp_path, "aws", ("    max_workers: 4\n", "    max_workers: 2\n")))
    assert [(node.gpus, node.cpus, node.memory_gib) for node in shape.nodes] == [(4, 48, 192)] * 2


def test_what_the_file_says_of_a_machine_goes_before_the_list(tmp_path: Path) -> None:
    own = ("    resources: {}\n    min", "    resources: {CPU: 2}\n    min")
    (shape,) = largest_clusters(written(tmp_path, "aws", own))
    assert {(node.cpus, node.gpus) for node in shape.nodes} == {(2, 4)}


def test_a_file_that_leaves_the_machines_open_is_refused_with_the_other_way(tmp_path: Path) -> None:
    for path in (
        written(tmp_path, "on-premises"),
        written(tmp_path, "aws", ("g6.12xlarge", "x9.large")),
        written(tmp_path, "skypilot", ("L4:4", "Ouija:4")),
    ):
        with pytest.raises(SpecError, match="does not say what its machines have") as refused:
            largest_clusters(path)
        assert "--gpu NAME --gpus N" in str(refused.value)
    with pytest.raises(SpecError, match="no such cluster file"):
        largest_clusters(tmp_path / "nowhere.yaml")


def test_a_plan_is_made_for_the_first_cluster_with_room(tmp_path: Path) -> None:
    asked = spec(
        PRETRAIN, data__train="nowhere", resources__workers=6, resources__gpus_per_worker=1, training__global_batch=12
    )
    types = yaml.safe_load(shipped_text("aws"))
    few = {**types, "max_workers": 1}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(few))
    small, large = largest_clusters(tmp_path / "few.yaml"), largest_clusters(written(tmp_path, "aws"))
    with pytest.raises(CapacityError):
        preview_on_first(asked, small)
    assert preview_on_first(asked, (*small, *large)).to_dict()["workers"] == 6
    with pytest.raises(CapacityError, match="no node but its head"):
        preview_on_first(asked, ())
