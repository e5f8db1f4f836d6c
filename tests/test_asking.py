"""What `method: few_shot` is planned to take, and what of a spec counts for it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DataError, ModelError, SpecError
from orchestrator.load_spec import parse_spec
from orchestrator.planning.asking import words_of
from orchestrator.planning.plan import make_plan
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import DatasetCounts, RunPlan
from orchestrator.planning.views import plan_table
from orchestrator.search_space import trials
from orchestrator.spec_methods import FewShotSpec
from tests.bases import write_base
from tests.specs import CLASSIFY, raw, spec
from tests.test_plan import BERT, cpus

GPT2 = {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}
COUNTS = DatasetCounts(
    train_samples=1000,
    train_tokens=20_000,
    validation_samples=200,
    vocab_size=1000,
    num_labels=2,
    label_names=("negative", "positive"),
    columns=((16, 400), (32, 600)),
    longest=32,
)


@pytest.fixture
def base(tmp_path: Path) -> str:
    write_base(tmp_path, GPT2)
    return str(tmp_path)


def asked(base: str, **changes: Any) -> Any:
    return spec(CLASSIFY, method="few_shot", model__base=base, data__sequence_length=32, **changes)


def planned(base: str, counts: DatasetCounts | None = COUNTS, **changes: Any) -> RunPlan:
    return make_plan(asked(base, **changes), cpus(), counts=counts)


def test_nothing_is_trained_and_all_work_is_done_once(base: str) -> None:
    plan = planned(base)
    assert (plan.steps, plan.trainable_parameters, plan.flops_per_step, plan.deepspeed) == (0, 0, 0.0, {})
    assert plan.flops_once > 0
    assert plan.wall_hours is not None
    assert any("asked for the class of 200 held-out rows, with 8 training rows" in reason for reason in plan.reasons)


def test_examples_are_read_once_by_each_worker_and_rows_once_in_all(base: str) -> None:
    none, few = (planned(base, few_shot={"examples": examples}).flops_once for examples in (0, 8))
    more_rows = planned(base, dataclasses.replace(COUNTS, validation_samples=400), few_shot={"examples": 0}).flops_once
    two = planned(base, few_shot={"examples": 8}, resources__workers=2).flops_once
    assert more_rows == pytest.approx(2 * none)
    assert two - few == pytest.approx(few - none), "the second worker reads the examples too"
    a_token = none / 200 / planned(base, few_shot={"examples": 0}).tokens_per_step * 8
    assert 8 * 20 < (few - none) / a_token < 8 * 30, "of some 20 tokens each, and what the template adds"


def test_memory_grows_with_the_prompt_by_keys_and_values_of_all_layers_and_the_work_of_one(base: str) -> None:
    """Keys and values are 4 layers x 2 x 64 elements of 4 bytes for each token of 8 rows at a time; the work of a layer
    is at most what Korthikanti et al. (2022) count of one, 34 bytes for each element of its width in 16 bits."""
    plans = [planned(base, few_shot={"examples": examples}, training__micro_batch=8) for examples in (0, 8)]
    assert all(plan.states_gib == plan.parameters * 4 / 2**30 for plan in plans)
    grown = (plans[1].peak_gib.mid - plans[0].peak_gib.mid) * 2**30 / 8
    tokens = 8 * 28  # examples of 20 tokens, and some 8 of the template and the class
    kept, worked = tokens * 4 * 2 * 64 * 4, tokens * 2 * 34 * 64
    assert 0.9 * kept < grown < 1.1 * (kept + worked)


def test_until_the_data_is_read_the_length_is_open(base: str) -> None:
    plan = planned(base, None)
    assert plan.steps is plan.wall_hours is plan.usd is None


def test_examples_that_cannot_fit_are_refused_with_how_many_would(base: str) -> None:
    with pytest.raises(ModelError, match="do not fit into the model's context") as caught:
        planned(base, few_shot={"examples": 200})
    most = int(str(caught.value).rpartition("few_shot.examples=")[2].partition(" ")[0])
    assert planned(base, few_shot={"examples": most}).fits


def test_more_examples_than_training_rows_are_refused_before_anything_starts(base: str) -> None:
    few = dataclasses.replace(COUNTS, train_samples=6)
    with pytest.raises(DataError, match="more examples than there are training rows") as caught:
        planned(base, few)
    assert "few_shot.examples=6" in str(caught.value)


@pytest.mark.parametrize("words", [{"negative": "no"}, {"negative": "no", "positive": "yes", "other": "well"}])
def test_words_that_are_not_those_of_the_classes_are_refused_before_anything_starts(
    base: str, words: dict[str, str]
) -> None:
    with pytest.raises(DataError, match="does not name the classes"):
        planned(base, few_shot={"words": words})


def test_classes_that_are_numbers_bring_the_hint_that_words_tell_more(base: str) -> None:
    numbers = dataclasses.replace(COUNTS, label_names=("0", "1"))
    hints = [any(reason.startswith("words:") for reason in planned(base, one).reasons) for one in (COUNTS, numbers)]
    assert hints == [False, True]
    named = planned(base, numbers, few_shot={"words": {0: "negative", 1: "positive"}})
    assert not any(reason.startswith("words:") for reason in named.reasons)


def test_words_stand_for_all_classes_or_none() -> None:
    settings = FewShotSpec(words={"0": " negative ", "1": "positive"})
    assert words_of(settings, ["0", "1"]) == ("negative", "positive")
    assert words_of(FewShotSpec(), ["0", "1"]) == ("0", "1")
    with pytest.raises(DataError, match="does not name the classes") as caught:
        words_of(settings, ["0", "1", "2"])
    assert "add 2" in str(caught.value)
    with pytest.raises(DataError, match="does not name the classes") as caught:
        words_of(settings, ["0"])
    assert "remove 1" in str(caught.value)


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    write_base(tmp_path, BERT)
    with pytest.raises(ModelError, match="bert sees the whole text at once"):
        planned(str(tmp_path))


def test_a_budget_below_what_asking_takes_is_foretold(base: str) -> None:
    assert any("the run will stop before its end" in reason for reason in planned(base, budget="1e3flops").reasons)


@pytest.mark.parametrize("unit", ["usd", "gpu-hours", "hours", "flops"])
def test_a_budget_that_surely_ends_before_all_rows_is_refused_before_anything_starts(base: str, unit: str) -> None:
    plan = planned(base, resources__usd_per_device_hour=2.0)
    assert plan.usd is not None
    assert plan.gpu_hours is not None
    assert plan.wall_hours is not None
    low = {"usd": plan.usd.low, "gpu-hours": plan.gpu_hours.low, "hours": plan.wall_hours.low, "flops": plan.flops_once}
    for share in (0.9, 1.1):
        spec = asked(base, budget=f"{share * low[unit]:.9f}{unit}", resources__usd_per_device_hour=2.0)
        with pytest.raises(SpecError, match="a part of them gives no figures") if share < 1 else nullcontext():
            plan_to_run(spec, cpus(), counts=COUNTS)


def test_the_plan_of_a_person_speaks_of_no_steps_and_no_deepspeed(base: str) -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as text:
        console.print(plan_table(planned(base)))
    assert "none: nothing is trained" in text.get()
    assert "DeepSpeed" not in text.get()


def test_one_file_serves_training_and_asking(base: str) -> None:
    """Of the training counts what has a meaning without one; nothing else changes the run."""
    changes = {"training__epochs": 3, "training__steps": None, "training__eval_every_steps": 5, "training__seed": 7}
    one, other = asked(base, **changes, checkpoint__keep="best"), asked(base, training={"seed": 7})
    assert (one.training.steps, one.training.learning_rate, one.training.eval_every_steps) == (0, 0.0, None)
    assert one.training.seed == 7
    assert one.fingerprint() == other.fingerprint() != asked(base, training={"seed": 8}).fingerprint()
    assert one.fingerprint() != asked(base, training={"seed": 7}, few_shot={"examples": 2}).fingerprint()


def test_a_spec_needs_no_training_to_ask(base: str) -> None:
    values = raw(CLASSIFY, method="few_shot", model__base=base, resources__workers=3)
    del values["training"]
    found = parse_spec(values)
    assert found.training.splits_over(3)
    assert parse_spec(found.model_dump(mode="json")) == found


def test_a_slip_of_the_keyboard_in_what_is_left_out_is_refused(base: str) -> None:
    with pytest.raises(SpecError, match=r"unknown key training\.sede"):
        asked(base, training={"sede": 3})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "causal-lm", "data__label_column": None}, "set task=text-classification"),
        ({"export": "merged"}, "no model to export"),
        ({"retain": {"l2sp": 1.0}}, "remove retain"),
        ({"layerwise": {"decay": 0.5}}, "remove layerwise"),
        ({"deepspeed__zero_stage": 2}, "set deepspeed=auto"),
        ({"search": {"space": {"few_shot.examples": {"grid": [1, 2]}}}}, "remove search"),
        ({"few_shot": {"examples": -1}}, "from 0 on"),
    ],
)
def test_what_has_no_meaning_without_a_training_is_refused(base: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        asked(base, **changes)
    assert says in str(caught.value)


@pytest.mark.parametrize("block", ["training", "resources", "checkpoint", "few_shot"])
def test_a_block_that_is_none_is_refused_by_name(base: str, block: str) -> None:
    with pytest.raises(SpecError, match=f"{block} is a block of fields"):
        asked(base, **{block: "all"})


def test_a_search_over_methods_does_not_ask(base: str) -> None:
    search = {"space": {"method": {"grid": ["full", "few_shot"]}}, "scheduler": "none"}
    with pytest.raises(SpecError, match="trains nothing, so there is nothing to search"):
        trials(spec(CLASSIFY, model__base=base, search=search))
