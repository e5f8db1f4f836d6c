import contextlib
import socket

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from orchestrator.errors import ClusterError
from orchestrator.scheduling.session import (
    expected_shape,
    live_shape,
    placement_groups_given_back,
    ray_session,
    worker_runtime_environment,
)

pytestmark = pytest.mark.slow


def test_a_running_ray_is_used_and_left_running(ray_cluster: None) -> None:
    with ray_session() as shape:
        assert shape.cpus == 4
        assert shape.gpus == 0
        assert shape.device_name == "cpu"
    assert ray.is_initialized()


def test_the_live_shape_counts_what_ray_may_give_out(ray_cluster: None) -> None:
    (node,) = live_shape().nodes
    assert node.cpus == 4
    assert 0 < node.memory_gib < 10_000


def test_groups_that_a_run_leaves_are_given_back_and_those_from_before_are_not(ray_cluster: None) -> None:
    mine = placement_group([{"CPU": 1}])
    ray.get(mine.ready())
    with contextlib.suppress(KeyError), placement_groups_given_back():
        left = placement_group([{"CPU": 1}])
        ray.get(left.ready())
        raise KeyError
    states = {name: group["state"] for name, group in placement_group_table().items()}
    assert states[left.id.hex()] == "REMOVED"
    assert states[mine.id.hex()] == "CREATED"
    remove_placement_group(mine)


def test_a_running_ray_is_not_guessed_about(ray_cluster: None) -> None:
    assert expected_shape() is None


def test_workers_inherit_the_environment_here_and_are_given_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_runtime_environment() == {}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert worker_runtime_environment()["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"


def test_an_address_that_is_none_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if ray.is_initialized():
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"nowhere:{closed.getsockname()[1]}:1")
        with pytest.raises(ClusterError, match="does not answer") as caught, ray_session():
            pass
    assert "`orchestrator submit SPEC`" in (caught.value.do or "")
