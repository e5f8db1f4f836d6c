from dataclasses import replace

import numpy as np
import pytest

from orchestrator.planning.plan import make_plan
from orchestrator.samples.batches import Samples
from orchestrator.samples.forms.masked_blocks import MaskedSamples
from orchestrator.samples.forms.packed_blocks import PackedSamples
from orchestrator.samples.masking import Masking, Vocabulary
from orchestrator.worker.step_data import Share, StepData
from tests import specs, training_runs

SAMPLES = PackedSamples(np.arange(1, 4 * 64 + 2), length=4)
BATCH = 12
HIDING = MaskedSamples(
    np.arange(5, 5 + 20 * 14, dtype=np.uint16),  # 20 blocks, so that a step in two sees some for the first time
    length=16,
    vocabulary=Vocabulary(size=300, mask_id=4, cls_id=0, sep_id=2, special_ids=(0, 1, 2, 3, 4)),
    masking=Masking(),
)
PLAN = make_plan(specs.spec(specs.PRETRAIN), training_runs.CLUSTER)


def shares(
    *, workers: int, micro_batch: int, step: int = 3, skipped: tuple[int, ...] = (), samples: Samples = SAMPLES
) -> list[Share]:
    accumulation = BATCH // workers // micro_batch
    plan = replace(PLAN, workers=workers, micro_batch=micro_batch, accumulation=accumulation, global_batch=BATCH)
    return [StepData(samples, plan=plan, seed=0, rank=rank).share(step, skipped=skipped) for rank in range(workers)]


def masks(found: list[Share]) -> set[tuple[int, tuple[int, ...]]]:
    """(seed, first tokens of its samples) of every micro-batch of a step."""
    return {
        (seed, tuple(batch["input_ids"][:, 0].tolist()))
        for share in found
        for seed, batch in zip(share.seeds, share.micro_batches, strict=True)
    }


@pytest.mark.parametrize("workers", [2, 3, 6])
def test_any_number_of_workers_draws_the_same_masks_for_the_same_samples(workers: int) -> None:
    assert masks(shares(workers=workers, micro_batch=2)) == masks(shares(workers=1, micro_batch=2))


def hidden(found: list[Share]) -> set[tuple[bytes, bytes]]:
    """(what is seen, what is to be predicted) of every sample of a step."""
    return {
        (ids.numpy().tobytes(), positions.numpy().tobytes() + labels.numpy().tobytes())
        for share in found
        for batch in share.micro_batches
        for ids, positions, labels in zip(batch["input_ids"], batch["positions"], batch["labels"], strict=True)
    }


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 1), (1, 4), (2, 3), (3, 2), (6, 1), (12, 1)])
def test_any_number_of_workers_and_any_micro_batch_hides_the_same_tokens(workers: int, micro_batch: int) -> None:
    for step in range(4):
        expected = hidden(shares(workers=1, micro_batch=12, step=step, samples=HIDING))
        assert len(expected) == BATCH
        assert hidden(shares(workers=workers, micro_batch=micro_batch, step=step, samples=HIDING)) == expected


def test_a_sample_is_masked_anew_every_time_that_it_is_seen() -> None:
    steps = [hidden(shares(workers=1, micro_batch=12, step=step, samples=HIDING)) for step in range(50)]
    assert len(set().union(*steps)) > 0.9 * 50 * BATCH, "two positions of 14 are 91 pairs, which come again by chance"


def test_every_micro_batch_and_every_step_has_its_own_seed() -> None:
    seeds = [
        seed for step in range(50) for share in shares(workers=2, micro_batch=2, step=step) for seed in share.seeds
    ]
    assert len(set(seeds)) == 50 * BATCH // 2


def test_all_samples_of_the_global_batch_are_shared_out_once() -> None:
    found = shares(workers=3, micro_batch=2)
    given = sorted(int(t) for share in found for batch in share.micro_batches for t in batch["input_ids"][:, 0])
    assert given == sorted(1 + 4 * found[0].samples)
    assert found[0].tokens == BATCH * 4


def test_a_skipped_batch_is_left_out_and_the_next_takes_its_place() -> None:
    plain = [shares(workers=1, micro_batch=12, step=step)[0].samples.tolist() for step in range(6)]
    skipping = [shares(workers=1, micro_batch=12, step=step, skipped=(2,))[0].samples.tolist() for step in range(5)]
    assert skipping == plain[:2] + plain[3:]
