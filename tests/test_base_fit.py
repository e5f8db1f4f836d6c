from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import FAMILY_DEFAULTS, model_shape
from orchestrator.architectures.masked_lm_heads import lacks_masked_lm_head
from orchestrator.architectures.text_part import TAKEN_APART
from orchestrator.errors import DataError, ModelError
from orchestrator.planning.base_fit import base_notes, check_tokenizer, keeps_head
from orchestrator.planning.plan import check_samples, make_plan
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.supported import supported
from orchestrator.spec import RunSpec
from orchestrator.spec_retain import RetainSpec
from orchestrator.tasks.registry import task_of
from tests.bases import Shapes, body_of, write_base, write_weights
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.test_plan import BERT, COUNTS, cpus

POOLER = {"bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,)}


def based_on(base: Path) -> dict[str, Any]:
    return {"kind": "finetune", "model": {"base": str(base)}}


def head(classes: int) -> dict[str, tuple[int, ...]]:
    return {"classifier.weight": (classes, 32), "classifier.bias": (classes,)}


def saved_classifier(folder: Path, *names: str, **config: Any) -> RunSpec:
    """A spec whose base was saved with a head for these classes."""
    named = {str(n): name for n, name in enumerate(names)}
    own = {**BERT, "architectures": ["BertForSequenceClassification"], "id2label": named, **config}
    return spec(CLASSIFY, model__base=str(write_base(folder, own, {**POOLER, **head(len(names))})))


def about_head(given: RunSpec, *classes: str) -> str:
    counts = replace(COUNTS, num_labels=len(classes), label_names=classes) if classes else None
    (found,) = [reason for reason in make_plan(given, cpus(), counts=counts).reasons if reason.startswith("head:")]
    return found


def test_another_number_of_classes_gets_a_new_head_and_the_plan_says_so(tmp_path: Path) -> None:
    said = about_head(saved_classifier(tmp_path, "a", "b", "c"), "bad", "good")
    assert "was saved with one for 3 classes (a, b, c), and the data has 2 (bad, good); a new head is drawn" in said


def test_the_same_classes_keep_their_head_and_others_of_the_same_number_do_not(tmp_path: Path) -> None:
    base = saved_classifier(tmp_path, "bad", "good")
    assert "is trained on" in about_head(base, "bad", "good")
    assert "a new head is drawn" in about_head(base, "negative", "positive")
    assert "a new head is drawn" in about_head(base, "good", "bad")
    assert "kept if the data has the same, else a new one" in about_head(base)


def test_general_rows_need_a_head_that_is_kept(tmp_path: Path) -> None:
    base = saved_classifier(tmp_path / "classifier", "bad", "good")
    asked = base.model_copy(update={"retain": RetainSpec(data="general")})
    assert "is trained on" in about_head(asked, "bad", "good")
    assert "not for the data's yes, no" in str(refused(asked, "yes", "no"))
    bare = spec(CLASSIFY, model__base=str(write_base(tmp_path / "bare", BERT, POOLER)), retain={"data": "general"})
    assert "a new head knows nothing" in str(refused(bare))
    make_plan(bare.model_copy(update={"retain": RetainSpec(l2sp=0.1)}), cpus())


def test_general_rows_have_the_classes_of_the_training_rows(tmp_path: Path) -> None:
    asked = saved_classifier(tmp_path, "bad", "good").model_copy(update={"retain": RetainSpec(data="general")})
    counts = replace(COUNTS, num_labels=2, label_names=("bad", "good"))
    with pytest.raises(DataError, match=r"bad, good, ugly in retain\.data, bad, good in data\.train"):
        make_plan(asked, cpus(), counts=replace(counts, retained=replace(counts, label_names=("bad", "good", "ugly"))))


def test_general_text_needs_the_masked_lm_head_of_the_base(tmp_path: Path) -> None:
    changes = based_on(write_base(tmp_path, BERT)) | {"task": "masked-lm"}
    assert "no masked-LM head" in str(refused(spec(PRETRAIN, **changes, retain={"data": "general"})))
    make_plan(spec(PRETRAIN, **changes, retain={"l2sp": 0.1}), cpus())


def refused(asked: RunSpec, *classes: str) -> ModelError:
    counts = replace(COUNTS, num_labels=len(classes), label_names=classes) if classes else None
    with pytest.raises(ModelError) as caught:
        make_plan(asked, cpus(), counts=counts)
    return caught.value


@pytest.mark.parametrize(
    ("config", "classes", "kept"),
    [
        ({}, ["0", "1"], True),
        ({}, ["0", "1", "2"], False),
        ({}, ["bad", "good"], False),
        ({"id2label": {"1": "LABEL_1", "0": "LABEL_0", "2": "LABEL_2"}}, ["0", "1", "2"], True),
        ({"id2label": {str(n): f"LABEL_{n}" for n in range(11)}}, [str(n) for n in range(11)], True),
        ({"num_labels": 3}, ["0", "1", "2"], True),
        ({"id2label": {"0": "B", "1": "I"}, "architectures": ["BertForTokenClassification"]}, ["B", "I"], False),
    ],
)
def test_a_head_is_kept_for_just_its_own_classes(config: dict[str, Any], classes: list[str], kept: bool) -> None:
    assert keeps_head(config, classes) is kept


def test_a_base_without_a_pooler_gets_a_new_one_and_the_plan_says_so(tmp_path: Path) -> None:
    for kind in ("bert", "albert", "deberta-v2"):
        base = write_base(tmp_path / kind, {**BERT, "model_type": kind})
        said = about_head(spec(CLASSIFY, model__base=str(base)))
        assert said == f"head: {base} comes without a pooler; a new one is drawn and trained with the head"
    with_one = spec(CLASSIFY, model__base=str(write_base(tmp_path / "whole", BERT, POOLER)))
    assert not any(reason.startswith("head:") for reason in make_plan(with_one, cpus()).reasons)


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"], True),
        (["bert.pooler.dense.weight", "classifier.weight"], True),
        (["bert.encoder.layer.0.output.dense.weight", "cls.predictions.bias"], False),
        (["lm_head.dense.weight"], False),
        (["vocab_transform.weight"], False),
    ],
)
def test_a_masked_lm_head_is_known_by_the_names_of_weights(names: list[str], lacks: bool) -> None:
    assert lacks_masked_lm_head(names) is lacks


def test_a_base_that_is_not_here_is_said_to_be_unseen() -> None:
    shape = model_shape(BERT, task=task_of("text-classification"))
    (said,) = base_notes(spec(CLASSIFY, model__base="no-such-owner/no-such-model"), BERT, shape)
    assert "not on this machine yet" in said


# -- refused by plan and run alike -------------------------------------------------------------------------------------


def refusal(given: RunSpec) -> ModelError:
    """What `plan` says, which is what `run` says with a cluster and without one."""
    said = []
    for ask in (
        lambda: make_plan(given, cpus()),
        lambda: plan_to_run(given, cpus(), counts=COUNTS),
        lambda: check_samples(given),
    ):
        with pytest.raises(ModelError) as error:
            ask()
        said.append(error.value)
    assert len({str(error) for error in said}) == 1
    return said[0]


def test_damaged_weights_are_refused_before_a_run_but_not_for_new_ones(tmp_path: Path) -> None:
    base = write_base(tmp_path, BERT)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    given = spec(CLASSIFY, model__base=str(base))
    assert "is damaged" in refusal(given).what
    make_plan(spec(CLASSIFY, model__base=str(base), method="scratch"), cpus())


def test_a_gguf_is_refused_before_its_config_is_missed(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refusal(spec(PRETRAIN, kind="finetune", model={"base": str(tmp_path)})).what


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, BERT, {"bert.embeddings.word_embeddings.weight": (500, 32)})
    error = refusal(spec(CLASSIFY, model__base=str(base)))
    assert "do not go together" in error.what
    assert "500 rows" in str(error.got)


def test_rounded_weights_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, {**BERT, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "gptq" in str(refusal(spec(CLASSIFY, model__base=str(base))).got)


def test_a_new_masked_lm_head_that_lora_would_leave_as_it_was_drawn_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, {**BERT, "model_type": "nystromformer"})
    lora = {"method": "lora", "lora": {"targets": ["query"]}, "task": "masked-lm", "kind": "finetune"}
    assert "leave a new one as it was drawn" in refusal(spec(PRETRAIN, **lora, model={"base": str(base)})).what


def test_a_base_without_a_layer_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    body = dict(body_of(BERT))
    del body["bert.encoder.layer.1.output.dense.weight"]
    base = write_base(tmp_path, BERT)
    write_weights(base / "model.safetensors", body)
    for given in (spec(CLASSIFY, model__base=str(base)), spec(PRETRAIN, task="masked-lm", **based_on(base))):
        error = refusal(given)
        assert "lacks weights of its own architecture" in error.what
        assert str(error.got).endswith("without bert.encoder.layer.1.output.dense.weight")


def test_a_layer_of_another_size_than_the_config_s_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, BERT, {"bert.encoder.layer.1.intermediate.dense.bias": (65,)})
    assert "intermediate.dense.bias [65], not [64]" in str(refusal(spec(CLASSIFY, model__base=str(base))).got)


def renamed(shapes: Shapes, old: str, new: str) -> Shapes:
    return {name.replace(old, new): size for name, size in shapes.items()}


@pytest.mark.parametrize(
    "other", [("bert.", ""), ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
)
def test_weights_by_their_other_names_are_taken(tmp_path: Path, other: tuple[str, str]) -> None:
    base = write_base(tmp_path, BERT)
    write_weights(base / "model.safetensors", renamed(body_of(BERT), *other))
    assert make_plan(spec(CLASSIFY, model__base=str(base)), cpus()).parameters


def test_a_tied_table_may_go_by_its_second_name_and_an_untied_output_layer_must_be_there(tmp_path: Path) -> None:
    gpt2 = {**FAMILY_DEFAULTS["gpt2"], "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    base = write_base(tmp_path, gpt2)
    body = renamed(body_of(gpt2), "transformer.wte.weight", "lm_head.weight")
    write_weights(base / "model.safetensors", body)
    assert make_plan(spec(PRETRAIN, **based_on(base)), cpus()).parameters
    untied = write_base(tmp_path, {**gpt2, "tie_word_embeddings": False})
    write_weights(untied / "model.safetensors", body_of(gpt2))
    assert str(refusal(spec(PRETRAIN, **based_on(untied))).got).endswith("without lm_head.weight")


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "text-classification"])
def test_a_model_that_reads_one_text_and_writes_another_is_refused_for_every_task(tmp_path: Path, task: str) -> None:
    t5 = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 32, "num_layers": 2, "num_heads": 2}
    base = write_base(tmp_path, {**t5, "d_ff": 64, "vocab_size": 100, "hidden_size": 32})
    kind = CLASSIFY if task == "text-classification" else PRETRAIN
    given = spec(kind, kind="finetune", task=task, model={"base": str(base)})
    assert "writes another" in refusal(given).what


def test_an_architecture_that_transformers_has_no_model_of_the_task_for_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, {**BERT, "model_type": "olmo9"})
    assert (
        "transformers has no model for task: text-classification" in refusal(spec(CLASSIFY, model__base=str(base))).what
    )


@pytest.mark.slow
def test_the_architectures_of_a_task_are_those_of_transformers() -> None:
    from transformers.models.auto import modeling_auto as auto

    assert supported(task_of("causal-lm")) == set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert supported(task_of("masked-lm")) == set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert supported(task_of("text-classification")) == set(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_models_whose_text_part_is_loaded_alone_are_those_of_transformers() -> None:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = set()
    for kind in supported(task_of("causal-lm")) & set(CONFIG_MAPPING.keys()):
        part = CONFIG_MAPPING[kind].sub_configs.get("text_config")
        name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        if part is not None and getattr(transformers, name).config_class == part:
            found.add(kind)
    assert found == set(TAKEN_APART)


TEXT = {**BERT, "model_type": "llama", "num_key_value_heads": 2}


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_a_model_of_text_and_pictures_is_refused_with_what_saves_its_text_part(tmp_path: Path, kind: str) -> None:
    nested = {
        "model_type": kind,
        "text_config": TEXT if kind != "qwen2_vl" else {**TEXT, "model_type": "qwen2_vl_text"},
    }
    base = write_base(tmp_path, {**nested, "vocab_size": 1000, "hidden_size": 32})
    error = refusal(spec(PRETRAIN, kind="finetune", model={"base": str(base)}))
    assert "more than text" in error.what
    assert ("save_pretrained('text')" in str(error.do)) is (kind != "qwen2_vl")


def test_one_whose_text_part_transformers_loads_alone_is_planned_by_that(tmp_path: Path) -> None:
    nested = {"model_type": "llama4", "vocab_size": 1000, "hidden_size": 32, "text_config": TEXT}
    base = write_base(tmp_path / "nested", nested, renamed(body_of(TEXT), "model.", "language_model.model."))
    alone = write_base(tmp_path / "alone", TEXT)
    one, other = (
        make_plan(spec(PRETRAIN, kind="finetune", model={"base": str(place)}), cpus()) for place in (base, alone)
    )
    assert one.parameters == other.parameters


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_ids_beyond_the_embedding_are_refused_with_what_enlarges_it() -> None:
    given = spec(CLASSIFY, model__base="base")
    check_tokenizer(given, BERT, vocab_size=1000, special={"pad": 0})
    with pytest.raises(ModelError, match=r"1001 entries for an embedding of 1000 rows; beyond it: pad 1000") as error:
        check_tokenizer(given, BERT, vocab_size=1001, special={"pad": 1000, "eos": 2, "mask": None})
    assert "resize_token_embeddings(1001)" in str(error.value.do)
    assert "pad_token in its tokenizer_config.json" in str(error.value.do)
    with pytest.raises(ModelError) as error:
        check_tokenizer(given, BERT, vocab_size=1003, special={"pad": 1000})
    assert "pad_token in its tokenizer_config.json" not in str(error.value.do)
    foreign = spec(PRETRAIN, kind="finetune", model={"base": "base", "tokenizer": "other"})
    with pytest.raises(ModelError) as error:
        check_tokenizer(foreign, BERT, vocab_size=1001, special={})
    assert "model.tokenizer=auto" in str(error.value.do)
    check_tokenizer(spec(PRETRAIN), BERT, vocab_size=2000, special={})
