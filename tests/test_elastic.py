from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.planning.elastic import CommonLayout, choose_common_layout, settle
from orchestrator.planning.hardware import find_device
from orchestrator.planning.memory import Layout, MemoryEstimate
from orchestrator.planning.placement import Site
from orchestrator.planning.run_plan import Kept
from tests.estimates import NO_MEMORY
from tests.specs import PRETRAIN, spec

LONG = {"data__sequence_length": 8192}
"""With so many tokens a pass is busy, whatever the micro-batch."""
KEPT = Kept(
    zero_stage=2,
    offload="none",
    micro_batch=4,
    precision="bf16",
    activation_checkpointing=False,
    gpus_per_worker=1,
)


def site(workers: int, capacity_gib: float) -> Site:
    return Site(
        device=find_device("A100-80GB"),
        workers=workers,
        nodes=1,
        gpus_per_worker=1,
        capacity_gib=capacity_gib,
        host_gib=100.0,
        usd_per_device_hour=None,
        reason="",
    )


def memory(layout: Layout) -> MemoryEstimate:
    """64 GiB of states that the stages shard more and more of, and 1 GiB of activations for each sample."""
    sharded = {0: 0.0, 1: 0.5, 2: 0.75, 3: 1.0}[layout.zero_stage]
    states = 64.0 * (1 - sharded + sharded / layout.workers)
    if layout.offload != "none":
        states, host = 1.0, 50.0
        return replace(NO_MEMORY, weights_gib=states, activations_gib=1.0 * layout.micro_batch, host_gib=host)
    return replace(NO_MEMORY, weights_gib=states, activations_gib=1.0 * layout.micro_batch)


def hours(site: Site, layout: Layout) -> float:
    """As fast as there are workers; ZeRO-3 costs a tenth more, offload doubles, recomputing takes a third more."""
    factor = (1.1 if layout.zero_stage == 3 else 1.0) * (1.0 if layout.offload == "none" else 2.0)
    return factor * (4 / 3 if layout.activation_checkpointing else 1.0) / layout.workers


def chosen(
    workers: tuple[int, int],
    capacity_gib: float | Callable[[int], float] = 200.0,
    *,
    global_batch: int = 64,
    pace: Any = hours,
    **changes: Any,
) -> CommonLayout:
    asked = spec(PRETRAIN, training__global_batch=global_batch, resources__workers=list(workers), **changes)
    sizes = [n for n in range(workers[0], workers[1] + 1) if asked.training.splits_over(n)]
    capacity = capacity_gib if callable(capacity_gib) else lambda workers: capacity_gib
    sites = {size: site(size, capacity(size)) for size in sizes}
    return choose_common_layout(asked, sites, "bf16", estimate=memory, pace=pace)


def test_all_sizes_share_a_layout_and_differ_in_workers_alone() -> None:
    common = chosen((1, 4))
    assert common.sizes == (1, 2, 4)
    assert common.layout == common.at(4)
    assert {replace(common.at(size), workers=1) for size in common.sizes} == {common.at(1)}


def test_the_stage_is_one_that_fits_at_the_smallest_size() -> None:
    # Upper ends at 2 workers: stage 1 needs 1.3 x 49, stage 2 1.3 x 41, and with 8 workers both fit easily.
    common = chosen((2, 8), 56.0, **LONG)
    assert (common.layout.zero_stage, common.layout.offload, common.sizes) == (2, "none", (2, 4, 8))


def test_what_a_narrower_range_would_gain_is_told() -> None:
    common = chosen((1, 8), 60.0, **LONG)
    assert (common.layout.offload, common.sizes[0]) == ("optimizer", 1)
    assert any(
        "with no fewer than 2 workers, zero_stage: 2, offload: none would fit, and 8 workers would train 2 x as fast"
        in reason
        for reason in common.reasons
    )


def test_a_size_at_which_nothing_fits_is_left_out_with_what_it_lacks() -> None:
    common = chosen((1, 4), 60.0, deepspeed={"offload": "none"}, **LONG)
    assert common.sizes == (2, 4)
    assert any("1 is left out, since zero_stage: 2, offload: none needs" in reason for reason in common.reasons)


def test_the_micro_batch_divides_the_share_of_every_size() -> None:
    common = chosen((1, 4), global_batch=64)
    assert common.layout.micro_batch == 16
    assert any("accumulation: 4 with 1 worker, 2 with 2 workers and 1 with 4 workers" in why for why in common.reasons)


def test_a_size_between_that_would_make_passes_tiny_is_left_out() -> None:
    short = chosen((1, 4), global_batch=12, data__sequence_length=16)
    assert (short.layout.micro_batch, short.sizes) == (3, (1, 2, 4))
    assert any("3 is left out, since it would need a smaller micro-batch than 3" in reason for reason in short.reasons)
    long = chosen((1, 4), global_batch=12, **LONG)
    assert (long.layout.micro_batch, long.sizes) == (1, (1, 2, 3, 4))


def test_the_micro_batch_of_the_spec_decides_which_sizes_there_are() -> None:
    common = chosen((1, 4), global_batch=12, training__micro_batch=3)
    assert (common.layout.micro_batch, common.sizes) == (3, (1, 2, 4))
    assert any("1 other does not split the batch of 12 into micro-batches of 3" in reason for reason in common.reasons)


def test_a_larger_micro_batch_is_worth_a_stage_that_costs_little() -> None:
    # With short samples ZeRO-3, a tenth slower, has memory for passes that are several times as long as under ZeRO-2.
    assert chosen((2, 8), 56.0).layout.zero_stage == 3


def test_the_smallest_micro_batch_that_every_size_has_memory_for_is_taken() -> None:
    # On a CPU the workers of a full node share its memory, so there the largest size has the least.
    common = chosen((1, 4), lambda workers: {1: 200.0, 2: 120.0, 4: 88.0}[workers], deepspeed={"zero_stage": 0})
    assert common.layout.micro_batch == 2
    assert common.sizes == (1, 2, 4)


def test_where_nothing_surely_fits_the_least_memory_is_taken_for_every_size() -> None:
    common = chosen((2, 4), 1.0)
    assert common.sizes == (2, 4)
    assert "none surely fits" in common.reasons[0]


def test_what_a_run_began_with_is_set_where_the_spec_leaves_it_open() -> None:
    settled = settle(spec(PRETRAIN, resources__workers=[1, 2]), KEPT)
    assert (settled.deepspeed.zero_stage, settled.deepspeed.offload) == (2, "none")
    assert (settled.training.micro_batch, settled.training.precision) == (4, "bf16")
    assert settled.resources.gpus_per_worker == 1
    assert settled.training.activation_checkpointing is False


def test_what_the_spec_sets_stays() -> None:
    assert settle(spec(PRETRAIN, resources__gpus_per_worker=0), KEPT).resources.gpus_per_worker == 0
    assert settle(spec(PRETRAIN, deepspeed={"offload": "optimizer"}), KEPT).deepspeed.offload == "optimizer"


def test_another_zero_stage_is_taken_and_what_the_run_offloaded_under_the_old_one_forgotten() -> None:
    offloading = replace(KEPT, zero_stage=3, offload="all")
    settled = settle(spec(PRETRAIN, deepspeed={"zero_stage": 2}), offloading)
    assert (settled.deepspeed.zero_stage, settled.deepspeed.offload) == (2, "auto")
    assert settled.training.micro_batch == 4


def test_a_range_of_a_million_workers_is_judged_by_its_divisors() -> None:
    batch = 720_720
    given = spec(PRETRAIN, training__global_batch=batch, resources={"workers": [2, 10**6]})
    sizes = given.training.workers_between(2, 10**6)
    assert sizes[0] == 2
    assert sizes[-1] == batch
    assert len(sizes) == 239
    kept = Kept(
        zero_stage=2, offload="none", precision="fp32", micro_batch=7, activation_checkpointing=False, gpus_per_worker=0
    )
    assert settle(given, kept).training.micro_batch == 7
