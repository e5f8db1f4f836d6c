from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.samples.batches import SampleOrder, batch_number, global_batch, rank_slice
from orchestrator.samples.counter_rng import mix

SIZES = st.one_of(st.integers(1, 40), st.integers(41, 3000))
SEEDS = st.integers(0, 2**40)


@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_epoch_sees_every_sample_once(size: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * size, (epoch + 1) * size)
    seen = SampleOrder(seed=seed, size=size).samples(positions)
    assert np.array_equal(np.sort(seen), np.arange(size))


@given(size=SIZES, seed=SEEDS, data=st.data())
def test_order_is_a_function_of_the_position_alone(size: int, seed: int, data: st.DataObject) -> None:
    order = SampleOrder(seed=seed, size=size)
    together = order.samples(np.arange(3 * size))
    some = data.draw(st.lists(st.integers(0, 3 * size - 1), min_size=1, max_size=8))
    assert order.samples(np.array(some)).tolist() == together[some].tolist()


def test_epochs_and_seeds_differ() -> None:
    first = SampleOrder(seed=0, size=500).samples(np.arange(1000))
    other = SampleOrder(seed=1, size=500).samples(np.arange(500))
    # Two unrelated orders of 500 agree at one place on average.
    assert (first[:500] == first[500:]).sum() < 10
    assert (first[:500] == other).sum() < 10


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5, 7, 10])
def test_every_sample_is_as_likely_at_every_place(size: int) -> None:
    draws = 1500
    orders = np.array([SampleOrder(seed=seed, size=size).samples(np.arange(size)) for seed in range(draws)])
    for place in range(size):
        counts = np.bincount(orders[:, place], minlength=size)
        chi2 = float(((counts - draws / size) ** 2 / (draws / size)).sum())
        assert chi2 < size - 1 + 6 * (2 * (size - 1)) ** 0.5, f"place {place}: {counts}"


def test_neighbours_in_the_data_are_no_neighbours_in_the_order() -> None:
    order = SampleOrder(seed=3, size=10_007).samples(np.arange(10_007))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_007))[0, 1]) < 0.05


def test_order_of_a_trillion_samples_needs_no_array() -> None:
    order = SampleOrder(seed=0, size=10**12)
    found = order.samples(np.arange(10**12 - 4, 10**12 + 4))
    assert len(set(found.tolist())) == 8
    assert 0 <= found.min() <= found.max() < 10**12


def test_hash_is_splitmix64() -> None:
    # First outputs of Vigna's reference implementation at seed 0.
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(value) for value in mix(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_order_stays_the_same_between_versions() -> None:
    # A run that is resumed after an update must go on in the order it began with.
    first, second = [6, 3, 1, 8, 5, 7, 9, 4, 2, 0], [9, 3, 6, 4, 8, 0, 5, 7, 1, 2]
    assert SampleOrder(seed=7, size=10).samples(np.arange(20)).tolist() == first + second


@given(world=st.integers(1, 6), micro=st.integers(1, 5), accumulation=st.integers(1, 4), step=st.integers(0, 50))
def test_ranks_share_out_the_global_batch(world: int, micro: int, accumulation: int, step: int) -> None:
    batch = global_batch(SampleOrder(seed=0, size=37), step, world * micro * accumulation)
    shares = [
        rank_slice(batch, rank=rank, world_size=world, micro_batch=micro, accumulation=accumulation)
        for rank in range(world)
    ]
    assert all(len(part) == micro for share in shares for part in share)
    together = [part for pass_ in range(accumulation) for part in (share[pass_] for share in shares)]
    assert np.array_equal(np.concatenate(together), batch)


SKIPS = st.lists(st.integers(0, 60), max_size=12)


def test_without_skips_every_step_has_the_batch_of_its_number() -> None:
    assert [batch_number(step) for step in range(5)] == [0, 1, 2, 3, 4]


def test_a_skipped_batch_moves_later_steps_on_by_one() -> None:
    assert [batch_number(step, (2, 3, 6)) for step in range(6)] == [0, 1, 4, 5, 7, 8]


@given(skipped=SKIPS)
def test_steps_see_every_batch_but_the_skipped_ones_once_and_in_order(skipped: list[int]) -> None:
    seen = [batch_number(step, skipped) for step in range(80)]
    assert seen == [number for number in range(80 + len(skipped)) if number not in skipped][:80]


@given(skipped=SKIPS, step=st.integers(0, 60), more=st.integers(0, 3))
def test_skipping_the_batch_of_a_step_changes_nothing_before_it(skipped: list[int], step: int, more: int) -> None:
    left_out = [*skipped, *(batch_number(step + ahead, skipped) for ahead in range(more + 1))]
    assert [batch_number(s, left_out) for s in range(step)] == [batch_number(s, skipped) for s in range(step)]
    assert batch_number(step, left_out) == batch_number(step + more + 1, skipped)


def test_steps_follow_each_other_without_gap() -> None:
    order = SampleOrder(seed=0, size=10)
    steps = np.concatenate([global_batch(order, step, 4) for step in range(5)])
    assert np.array_equal(np.sort(steps[:10]), np.arange(10))
    assert np.array_equal(np.sort(steps[10:]), np.arange(10))
