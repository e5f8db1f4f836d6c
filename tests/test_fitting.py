from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.fitting import choose_layout, fits, layout_options, remedy
from orchestrator.planning.hardware import find_device
from orchestrator.planning.memory import Layout, MemoryEstimate
from orchestrator.planning.placement import Site
from orchestrator.spec import RunSpec
from tests.estimates import NO_MEMORY
from tests.specs import PRETRAIN, spec

SITE = Site(
    device=find_device("A100-80GB"),
    workers=8,
    nodes=1,
    gpus_per_worker=1,
    capacity_gib=70.0,
    host_gib=100.0,
    usd_per_device_hour=None,
    reason="",
)
STATES_GIB = {(0, "none"): 160.0, (1, "none"): 50.0, (2, "none"): 40.0, (3, "none"): 20.0}


def memory(layout: Layout) -> MemoryEstimate:
    """States by stage, 1 GiB for what is offloaded, and 5 GiB of activations for each sample, or 1 recomputed."""
    states = STATES_GIB.get((layout.zero_stage, layout.offload), 1.0)
    each = 1.0 if layout.activation_checkpointing else 5.0
    host = 50.0 if layout.offload != "none" else 0.0
    return replace(NO_MEMORY, weights_gib=states, activations_gib=each * layout.micro_batch, host_gib=host)


def hours(layout: Layout) -> float:
    """ZeRO-3 costs a tenth more, offload doubles, recomputing takes a third more."""
    factor = (1.1 if layout.zero_stage == 3 else 1.0) * (1.0 if layout.offload == "none" else 2.0)
    return factor * (4 / 3 if layout.activation_checkpointing else 1.0)


def chosen(capacity_gib: float, *, checkpointing: Any = "auto", **changes: Any) -> tuple[Layout, str]:
    asked: RunSpec = spec(PRETRAIN, training__global_batch=64, resources__workers=8, **changes)
    training = asked.training.model_copy(update={"activation_checkpointing": checkpointing})
    asked = asked.model_copy(update={"training": training})
    site = replace(SITE, capacity_gib=capacity_gib)
    layout, reasons = choose_layout(asked, site, "bf16", estimate=memory, pace=hours)
    return layout, "\n".join(reasons)


def test_the_simplest_of_equally_fast_layouts_is_taken_with_its_largest_micro_batch() -> None:
    layout, why = chosen(120.0)
    assert (layout.zero_stage, layout.offload, layout.micro_batch) == (1, "none", 8)
    assert "zero_stage: 0, offload: none needs 165" in why
    assert "next would be zero_stage: 2, offload: none, as fast" in why


def test_a_slower_layout_is_taken_only_when_the_faster_do_not_fit() -> None:
    assert chosen(33.0)[0].zero_stage == 3
    assert not chosen(33.0)[0].activation_checkpointing


def test_recomputing_is_taken_when_only_that_fits_and_told_so() -> None:
    # 1.30 x (20 + 5) and more does not fit; recomputed 1.30 x 21 does.
    layout, why = chosen(30.0)
    assert layout.activation_checkpointing
    assert layout.zero_stage == 3
    assert "activation_checkpointing: true; without it the same layout needs" in why


def test_of_equally_fast_layouts_the_one_that_keeps_its_activations_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "hours", lambda layout: 1.0)
    assert not chosen(120.0)[0].activation_checkpointing


def test_recomputing_is_cheaper_than_offload() -> None:
    # Under ZeRO-2 both fit: 40 + 1 recomputed, or 1 + 40 with everything kept and the states on the host.
    layout, why = chosen(55.0, deepspeed={"zero_stage": 2})
    assert (layout.offload, layout.activation_checkpointing) == ("none", True)
    assert "next would be zero_stage: 2, offload: optimizer" in why


@pytest.mark.parametrize("asked", [True, False])
def test_recomputing_that_is_set_is_kept(asked: bool) -> None:
    layout, why = chosen(120.0, checkpointing=asked)
    assert layout.activation_checkpointing is asked
    assert f"activation_checkpointing: {str(asked).lower()}, as set" in why


def test_offload_that_the_host_has_no_room_for_is_not_taken() -> None:
    poor = replace(SITE, capacity_gib=10.0, host_gib=10.0)
    layout, reasons = choose_layout(
        spec(PRETRAIN, training__global_batch=64, resources__workers=8), poor, "bf16", estimate=memory, pace=hours
    )
    assert not fits(memory(layout), poor)
    assert "host memory" in " ".join(reasons)


def test_the_remedy_is_the_first_setting_that_fits() -> None:
    asked = spec(PRETRAIN, training__global_batch=64, resources__workers=8)
    tight = Layout(
        workers=8,
        device="cuda",
        zero_stage=2,
        offload="none",
        precision="bf16",
        micro_batch=8,
        sequence_length=32,
        activation_checkpointing=False,
    )
    assert "training.micro_batch=1" in remedy(asked, SITE, tight, memory)
    assert "training.activation_checkpointing=true" in remedy(asked, SITE, replace(tight, micro_batch=1), _needs_both)


def _needs_both(layout: Layout) -> MemoryEstimate:
    return replace(memory(layout), weights_gib=45.0 if layout.activation_checkpointing else 90.0)


def stages(**changes: Any) -> set[tuple[int, str]]:
    asked = spec(PRETRAIN, training__global_batch=8, **changes)
    return {(one.zero_stage, one.offload) for one in layout_options(asked, replace(SITE, workers=1), "bf16")}


def test_one_worker_has_nothing_to_shard_but_what_is_set_is_done() -> None:
    """ZeRO would only add its buffers and, in fp32, a second copy of the weights; its stages matter for offload."""
    assert stages() == {(0, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")}
    assert stages(deepspeed={"zero_stage": 2}) == {(2, "none"), (2, "optimizer")}
    assert stages(deepspeed={"zero_stage": 1}) == {(1, "none"), (1, "optimizer")}
