from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.samples.forms.masked_blocks import MaskedSamples
from orchestrator.samples.masking import NO_LABEL, Batch, Masking, Vocabulary, mask, predicted_tokens

VOCABULARY = Vocabulary(size=1000, mask_id=4, cls_id=0, sep_id=2, special_ids=(0, 1, 2, 3, 4))
SEEDS = st.integers(0, 2**40)
LENGTHS = st.integers(3, 80)
RATES = st.floats(0.01, 0.99)


HELD_OUT_KEYS = [551380577909346562, 18049863545680167486, 12907458271065985714]


def samples(count: int = 64, *, length: int = 32, seed: int = 0, rate: float = 0.15) -> MaskedSamples:
    """Blocks of ordinary tokens and now and then the end of a document."""
    tokens = np.random.default_rng(0).integers(5, VOCABULARY.size, size=count * (length - 2)).astype(np.uint16)
    tokens[::17] = VOCABULARY.sep_id
    return MaskedSamples(tokens, length=length, vocabulary=VOCABULARY, masking=Masking(rate=rate, seed=seed))


def seen(batch: Batch) -> Batch:
    """The tokens that stand at the predicted positions."""
    return np.take_along_axis(batch["input_ids"], batch["positions"], axis=1)


def restored(batch: Batch) -> np.ndarray:
    """The blocks as they were before something was hidden."""
    blocks = batch["input_ids"].copy()
    known = batch["labels"] != NO_LABEL
    np.put_along_axis(blocks, batch["positions"], np.where(known, batch["labels"], seen(batch)), axis=1)
    return blocks


def same(one: Batch, other: Batch) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@given(length=LENGTHS, rate=RATES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_every_block_predicts_the_same_number_of_its_ordinary_tokens(
    length: int, rate: float, seed: int, epoch: int
) -> None:
    blocks = np.random.default_rng(seed).integers(5, VOCABULARY.size, size=(7, length))
    keys = Masking(rate=rate, seed=seed).keys(np.arange(7), np.full(7, epoch))
    batch = mask(blocks, keys, rate=rate, vocabulary=VOCABULARY)
    count = predicted_tokens(length, rate)
    assert batch["positions"].shape == batch["labels"].shape == (7, count)
    assert count == max(1, round(rate * length))
    assert all(len(set(row)) == count for row in batch["positions"].tolist()), "no token is predicted twice"
    assert np.array_equal(np.take_along_axis(blocks, batch["positions"], axis=1), batch["labels"])
    assert np.array_equal(restored(batch), blocks), "nothing else was touched"


@given(length=LENGTHS, rate=RATES, seed=SEEDS)
def test_special_tokens_are_neither_predicted_nor_drawn_as_a_replacement(length: int, rate: float, seed: int) -> None:
    blocks = np.random.default_rng(seed).integers(0, 10, size=(9, length))  # half of them special
    keys = Masking(rate=rate, seed=seed).keys(np.arange(9), np.zeros(9))
    batch = mask(blocks, keys, rate=rate, vocabulary=VOCABULARY)
    ordinary = np.take_along_axis(blocks, batch["positions"], axis=1) >= 5
    assert np.array_equal(batch["labels"] != NO_LABEL, ordinary)
    wanted = np.minimum(predicted_tokens(length, rate), (blocks >= 5).sum(1))
    assert np.array_equal(ordinary.sum(1), wanted), "all that are wanted, or all that there are"
    assert np.isin(seen(batch)[ordinary], [VOCABULARY.mask_id, *range(5, VOCABULARY.size)]).all()
    assert np.array_equal(restored(batch), blocks)


def test_eight_in_ten_are_hidden_one_is_replaced_and_one_stays() -> None:
    blocks = np.full((2000, 100), 7)
    batch = mask(blocks, Masking().keys(np.arange(2000), np.zeros(2000)), rate=0.15, vocabulary=VOCABULARY)
    found = seen(batch)
    hidden, stays = (found == VOCABULARY.mask_id).mean(), (found == 7).mean()
    assert found.size == 2000 * 15
    assert hidden == pytest.approx(0.8, abs=0.008)  # three standard errors
    assert stays == pytest.approx(0.1, abs=0.006)
    replaced = found[(found != VOCABULARY.mask_id) & (found != 7)]
    assert len(np.unique(replaced)) > 900, "any other token may stand there"


def test_every_position_is_as_likely() -> None:
    blocks = np.full((4000, 20), 7)
    batch = mask(blocks, Masking().keys(np.arange(4000), np.zeros(4000)), rate=0.15, vocabulary=VOCABULARY)
    counts = np.bincount(batch["positions"].ravel(), minlength=20)
    assert counts == pytest.approx(4000 * 3 / 20, rel=0.12)  # five standard errors


@given(seed=SEEDS, epoch=st.integers(0, 50), data=st.data())
def test_masks_are_a_function_of_seed_sample_and_epoch_alone(seed: int, epoch: int, data: st.DataObject) -> None:
    some = samples(seed=seed)
    together = some.batch(np.arange(64), epochs=np.full(64, epoch))
    chosen = np.array(data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=8)))
    apart = some.batch(chosen, epochs=np.full(len(chosen), epoch))
    assert same({name: values[chosen] for name, values in together.items()}, apart)


def test_epochs_seeds_and_samples_have_masks_of_their_own() -> None:
    first = samples().batch(np.arange(64), epochs=np.zeros(64))
    others = [
        samples().batch(np.arange(64), epochs=np.ones(64)),
        samples(seed=1).batch(np.arange(64), epochs=np.zeros(64)),
        samples().batch(np.arange(64)),
    ]
    for other in others:
        equal = (first["positions"] == other["positions"]).all(1).sum()
        assert equal <= 2, "five of 32 positions agree by chance once in 200,000"
    assert len({tuple(row) for row in first["positions"].tolist()}) == 64


def test_held_out_masks_are_the_same_in_every_run() -> None:
    first, second = samples(seed=0).batch(np.arange(64)), samples(seed=9).batch(np.arange(64))
    assert same(first, second)


def test_held_out_masks_are_drawn_from_a_stream_of_their_own() -> None:
    """The one that every run was judged by: with another, losses of two runs could not be compared."""
    numbers = np.arange(64)
    held_out = Masking(seed=3).keys(numbers, None)
    assert held_out[:3].tolist() == HELD_OUT_KEYS
    for seed in range(20):
        for epoch in range(3):
            assert not set(Masking(seed=seed).keys(numbers, np.full(64, epoch)).tolist()) & set(held_out.tolist())


def test_blocks_lie_between_special_tokens_and_hold_the_whole_stream() -> None:
    tokens = np.arange(5, 5 + 6 * 4 + 3, dtype=np.uint16)
    some = MaskedSamples(tokens, length=6, vocabulary=VOCABULARY, masking=Masking())
    blocks = restored(some.batch(np.arange(len(some))))
    assert len(some) == 6
    assert some.token_count == 36
    assert (blocks[:, 0] == VOCABULARY.cls_id).all()
    assert (blocks[:, -1] == VOCABULARY.sep_id).all()
    assert np.array_equal(blocks[:, 1:-1].ravel(), tokens[:24])


def test_masks_stay_the_same_between_versions() -> None:
    # A run that is resumed after an update must go on under the masks it began with.
    batch = samples(4, length=16).batch(np.arange(4), epochs=np.array([0, 0, 1, 2]))
    assert batch["positions"].tolist() == [[3, 5], [3, 12], [12, 14], [2, 7]]
    assert seen(batch).tolist() == [[4, 175], [4, 4], [4, 19], [4, 4]]


def test_masking_costs_less_than_a_hundredth_of_a_short_step() -> None:
    some = samples(200, length=256)
    seconds = []
    for step in range(50):
        start = time.perf_counter()
        some.batch(np.arange(8) + step, epochs=np.zeros(8))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.001, "of a step of 100 ms"
