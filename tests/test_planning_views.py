from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from orchestrator.planning.estimate import Estimate, Workload, estimate
from orchestrator.planning.hardware import find_device
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, NodeShape, RunPlan
from orchestrator.planning.views import estimate_answer, estimate_table, plan_answer, plan_table
from tests.specs import PRETRAIN, spec


def planned(**changes: Any) -> RunPlan:
    cluster = ClusterShape(nodes=(NodeShape(cpus=4, gpus=0, memory_gib=16.0),), device_name="cpu")
    return make_plan(spec(PRETRAIN, **changes), cluster)


def shown(plan: RunPlan) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(plan_table(plan))
    return stream.getvalue()


def line(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(label))


def test_the_figures_of_a_plan_are_shown_with_the_batch_as_a_product() -> None:
    plan = planned(resources__workers=2)
    text = shown(plan)
    assert f"8 = 2 workers x {plan.micro_batch} micro-batch x {plan.accumulation}" in line(text, "batch")
    assert "2, each with 1 core" in line(text, "workers")
    assert "a worker" in line(text, "peak memory")
    assert "(" in line(text, "wall time")
    assert "6, 1 of them warm-up" in line(text, "steps")


def test_every_reason_and_the_whole_deepspeed_configuration_are_shown() -> None:
    plan = planned()
    text = " ".join(shown(plan).split())
    assert all(" ".join(reason.split()) in text for reason in plan.reasons)
    assert '"train_batch_size": 8' in text


def test_what_only_the_data_can_tell_is_said_to_be_open() -> None:
    text = shown(planned(training__steps=None, training__epochs=2))
    for label in ("steps", "wall time", "device hours", "cost"):
        assert "known once the data is read" in line(text, label)


def test_what_each_size_of_an_elastic_run_takes_is_a_row() -> None:
    text = shown(planned(resources__workers=[2, 8]))
    rows = [row.split()[:3] for row in text.partition("room")[2].splitlines()[1:4]]
    assert rows == [["2", "yes", "4"], ["4", "yes", "2"], ["8", "not", "now"]]
    assert "room" not in shown(planned()).partition("why")[0]


def test_a_plan_that_does_not_fit_says_no() -> None:
    assert line(shown(replace(planned(), fits=False)), "fits").split() == ["fits", "no"]


def test_several_cores_offload_and_checkpointing_are_named() -> None:
    plan = replace(planned(resources__cpus_per_worker=2), offload="optimizer", activation_checkpointing=True)
    text = shown(plan)
    assert "each with 2 cores" in line(text, "workers")
    assert "offload optimizer" in line(text, "ZeRO stage")
    assert "activation checkpointing" in line(text, "precision")


def test_the_answer_holds_every_field_of_the_plan() -> None:
    plan = planned()
    assert plan_answer(plan) == plan.to_dict()


def priced(**changes: Any) -> Estimate:
    workload = Workload(parameters=7_000_000_000, tokens=1e9, device=find_device("A100-80GB"), method="lora")
    return estimate(replace(workload, **changes))


def shown_estimate(found: Estimate) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(estimate_table(found))
    return stream.getvalue()


def test_an_estimate_shows_where_the_memory_goes_and_every_reason() -> None:
    found = priced()
    text = shown_estimate(found)
    assert f"weights {found.memory.weights_gib:.3g}" in line(text, "of it")
    assert "usd" in line(text, "cost")
    assert all(" ".join(reason.split()) in " ".join(text.split()) for reason in found.reasons)


def test_an_estimate_without_a_price_says_so_and_answers_null() -> None:
    found = priced(device=replace(find_device("A100-80GB"), usd_per_hour=None))
    assert "no price is known" in line(shown_estimate(found), "cost")
    assert estimate_answer(found)["usd"] is None


def test_the_answer_of_an_estimate_keeps_the_promised_fields() -> None:
    answer = estimate_answer(priced(zero_stage=3, offload="all"))
    for name in ("gpu_hours", "wall_hours", "usd", "peak_gib"):
        assert set(answer[name]) == {"low", "mid", "high"}
    assert answer["fits"] is True
    assert (answer["zero_stage"], answer["offload"]) == (3, "all")
    assert answer["host_gib"] > 0
    assert {"weights", "gradients", "optimizer", "activations", "logits", "gathered", "buffers"} <= set(
        answer["memory"]
    )
    json.dumps(answer)
