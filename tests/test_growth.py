"""What an autoscaler could make of a cluster, from the types of its cluster file."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import CapacityError, SpecError
from orchestrator.planning.growth import (
    Limits,
    LiveNode,
    grown,
    limits_of,
    live_node,
    named_machines,
    node_shape,
    pinned,
    shape_of,
)
from orchestrator.planning.hardware import find_device
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from tests import specs

GIB = 2**30
L4 = {"CPU": 48, "GPU": 4, "memory": 192 * GIB, "accelerator_type:L4": 1}
A100 = {"CPU": 96, "GPU": 8, "memory": 1152 * GIB, "accelerator_type:A100": 1}
CORES = {"CPU": 8, "memory": 32 * GIB}
HEAD = LiveNode(shape=NodeShape(cpus=0, gpus=0, memory_gib=16), accelerator=None, type_name="head")


def file_of(max_workers: int = 4, **types: tuple[dict[str, Any], int]) -> dict[str, Any]:
    """A cluster file with (resources, max_workers) of each type beside the head's."""
    return {
        "max_workers": max_workers,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            **{name: {"resources": resources, "max_workers": most} for name, (resources, most) in types.items()},
        },
    }


def test_the_head_and_types_that_are_switched_off_are_not_added() -> None:
    limits = limits_of(file_of(l4=(L4, 4), off=(A100, 0)))
    assert [one.name for one in limits.types] == ["l4"]
    (shape,) = grown([HEAD], limits)
    assert (shape.gpus, shape.device_name, len(shape.nodes)) == (16, "L4", 5)


def test_the_limit_of_the_whole_cluster_holds_and_a_type_without_one_has_the_whole_clusters() -> None:
    assert grown([HEAD], limits_of(file_of(2, l4=(L4, 10))))[0].gpus == 8
    assert len(grown([HEAD], limits_of(file_of(3, l4=(L4, 2), cores=(CORES, 2))))[0].nodes) == 1 + 3
    whole = file_of(3, l4=(L4, 1))
    del whole["available_node_types"]["l4"]["max_workers"]
    assert grown([HEAD], limits_of(whole))[0].gpus == 12


def test_each_kind_of_gpu_is_a_cluster_of_its_own_the_cheapest_first() -> None:
    unpriced = {**A100, "accelerator_type:MI300X": 1}
    del unpriced["accelerator_type:A100"]
    shapes = grown([HEAD], limits_of(file_of(m=(unpriced, 1), l=(L4, 2), a=(A100, 2))))
    found = [(shape.device_name, shape.gpus) for shape in shapes]
    assert found == [("L4", 8), ("A100", 16), ("MI300X", 8)], "what has no price in the catalogue comes last"


def test_a_request_names_the_planned_kind_of_gpu_where_another_could_come() -> None:
    both = limits_of(file_of(l=(L4, 2), a=(A100, 2), c=(CORES, 1)))
    assert pinned(both, "L4") == {"accelerator_type:L4": 0.001}
    assert pinned(both, find_device("A100").name) == {"accelerator_type:A100": 0.001}, "by what the file calls it"
    assert pinned(both, "H100-80GB") == {}
    assert pinned(limits_of(file_of(l=(L4, 2), c=(CORES, 1))), "L4") == {}
    assert pinned(None, "L4") == {}


def test_nodes_that_are_up_are_not_added_a_second_time_and_those_joined_by_hand_stay() -> None:
    up = LiveNode(shape=node_shape(L4), accelerator="L4", type_name="l4")
    joined = LiveNode(shape=node_shape(L4), accelerator="L4", type_name=None)
    (shape,) = grown([HEAD, up, joined], limits_of(file_of(l4=(L4, 2))))
    assert shape.gpus == 12, "2 of the type and the one that no autoscaler started"


def test_a_cluster_without_types_becomes_nothing_else() -> None:
    assert grown([HEAD], limits_of(file_of())) == ()
    assert grown([HEAD], Limits(types=(), at_most=9)) == ()


def test_a_type_that_does_not_say_its_memory_has_what_instances_have_per_core() -> None:
    assert node_shape({"CPU": 4}).memory_gib == 16
    assert node_shape({"CPU": 4, "memory": 8 * GIB}).memory_gib == 8


def test_a_cluster_has_the_shape_that_its_nodes_tell() -> None:
    shape = shape_of([live_node({"CPU": 8.0, "GPU": 2.0, "memory": 1.0 * GIB, "accelerator_type:H100": 1.0}), HEAD])
    assert (shape.gpus, shape.cpus, shape.device_name, shape.nodes[0].memory_gib) == (2, 8, "H100", 1.0)
    assert shape_of([live_node({"CPU": 2.0})]).device_name == "cpu"


def scaling(*nodes: LiveNode, **types: tuple[dict[str, Any], int]) -> ClusterShape:
    live = nodes or (HEAD,)
    shape = shape_of(live)
    return ClusterShape(
        nodes=shape.nodes, device_name=shape.device_name, may_become=grown(live, limits_of(file_of(**types)))
    )


def test_a_training_is_planned_for_nodes_that_may_still_come() -> None:
    spec = specs.spec(specs.PRETRAIN, resources__workers=8, training__global_batch=32)
    plan = plan_to_run(spec, scaling(l4=(L4, 2)))
    assert (plan.workers, plan.gpus_per_worker, plan.device_name) == (8, 1, "L4")
    with pytest.raises(CapacityError) as refused:
        plan_to_run(spec, scaling(l4=(L4, 1)))
    assert refused.value.what == "8 workers do not fit on the cluster, which has room for 4"
    assert "autoscaler may add no more nodes" in str(refused.value.allowed)


def test_a_worker_waits_for_a_gpu_that_can_be_had_and_takes_cores_where_it_was_told_to() -> None:
    cores = LiveNode(shape=node_shape(CORES), accelerator=None, type_name=None)
    spec = specs.spec(specs.PRETRAIN, resources__workers=2)
    assert plan_to_run(spec, scaling(cores, l4=(L4, 1))).gpus_per_worker == 1
    on_cores = specs.spec(specs.PRETRAIN, resources__workers=2, resources__gpus_per_worker=0)
    assert plan_to_run(on_cores, scaling(cores, l4=(L4, 1))).gpus_per_worker == 0


def test_a_gpu_that_no_type_has_is_refused() -> None:
    spec = specs.spec(specs.PRETRAIN, resources__gpus_per_worker=1)
    with pytest.raises(CapacityError, match="asks for a GPU per worker"):
        plan_to_run(spec, scaling(cores=(CORES, 4)))


def test_the_longest_name_of_a_kind_of_gpu_says_most() -> None:
    assert live_node({"GPU": 8, "accelerator_type:A100": 1, "accelerator_type:A100-40GB": 1}).accelerator == "A100-40GB"


def test_gpus_of_a_kind_that_nothing_says_are_refused_with_the_way_to_say_it() -> None:
    nameless = {"CPU": 8, "GPU": 1, "memory": 32 * GIB}
    with pytest.raises(SpecError, match="nothing says of which kind") as refused:
        plan_to_run(specs.spec(specs.PRETRAIN), scaling(gpus=(nameless, 1)))
    assert "accelerator_type" in str(refused.value.do)


def test_a_file_that_names_its_machines_says_how_many_and_that_of_a_cloud_does_not() -> None:
    on_premises = {"provider": {"type": "local", "head_ip": "a", "worker_ips": ["b", "c"]}}
    assert named_machines(on_premises) == 3
    assert named_machines({"provider": {"type": "local", "head_ip": "a"}}) == 1
    assert named_machines(file_of(l4=(L4, 4)) | {"provider": {"type": "aws"}}) == named_machines({}) == 0
