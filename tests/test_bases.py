"""Base models of many kinds, saved by transformers, through preparation, plan and the module that is trained."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.architectures.families import DECODERS
from orchestrator.architectures.weight_names import KNOWN
from orchestrator.errors import ModelError
from orchestrator.planning.plan import make_plan
from orchestrator.runs.job import TrainingJob
from orchestrator.tracking.finished_model import with_base_found
from orchestrator.worker import models
from tests import training_runs
from tests.mlflow_runs import closed, new_store, opened
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.test_export import write
from tests.training_runs import classify, continued, rows

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def saved(folder: Path, kind: str, task: str, **config: Any) -> Path:
    """A base with random weights, saved as the model of a task, with the tokenizer of the tiny BERT."""
    import transformers

    shutil.copytree(training_runs.bert(), folder)
    (folder / "model.safetensors").unlink()
    vocab = len(transformers.AutoTokenizer.from_pretrained(folder))
    values = {**SIZES, "vocab_size": vocab, "max_position_embeddings": 64, "pad_token_id": 0, **config}
    torch.manual_seed(1)
    built = getattr(transformers, task).from_config(transformers.AutoConfig.for_model(kind, **values))
    built.save_pretrained(folder)
    return folder


def built(job: TrainingJob) -> tuple[torch.nn.Module, list[str]]:
    said: list[str] = []
    return models.build_model(job.spec, job.plan, job.data, say=said.append), said


def exported(job: TrainingJob, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the folder that the module becomes, which is compared with it."""
    assert write(job, model) is None
    found: dict[str, torch.Tensor] = load_file(job.model_folder / "model.safetensors")
    return found


CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.mark.parametrize(("kind", "last"), [("bert", "classifier"), ("roberta", "classifier.out_proj")])
def test_a_base_of_another_number_of_classes_gets_a_new_head_and_says_so(tmp_path: Path, kind: str, last: str) -> None:
    base = saved(tmp_path / "base", kind, CLASSIFIER, num_labels=5)
    job = classify(tmp_path / "run", model__base=str(base))
    model, said = built(job)
    (note,) = [reason for reason in job.plan.reasons if reason.startswith("head:")]
    assert said == [note]
    assert "for 5 classes (0, 1, 2, 3, 4), and the data has 2 (bad, good)" in note
    before, after = load_file(base / "model.safetensors"), model.state_dict()
    new = {name for name, weight in before.items() if weight.shape != after[name].shape}
    assert new == {f"{last}.weight", f"{last}.bias"}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - new)
    assert after[f"{last}.weight"].std() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(("names", "kept"), [(("bad", "good"), True), (("negative", "positive"), False)])
def test_a_head_of_the_same_size_is_kept_for_the_same_classes_alone(
    tmp_path: Path, names: tuple[str, str], kept: bool
) -> None:
    named = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    base = saved(tmp_path / "base", "bert", CLASSIFIER, **named)
    model, said = built(classify(tmp_path / "run", model__base=str(base)))
    before, after = load_file(base / "model.safetensors"), model.state_dict()
    assert torch.equal(before["classifier.weight"], after["classifier.weight"]) is kept
    assert torch.equal(before["bert.pooler.dense.weight"], after["bert.pooler.dense.weight"])
    assert ("is trained on" if kept else "a new head is drawn") in said[0]


def test_a_new_head_is_drawn_trained_and_exported_under_zero_3_too(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert", CLASSIFIER, num_labels=5)
    job = classify(
        tmp_path / "run", model__base=str(base), resources__workers=2, deepspeed__zero_stage=3, method="head"
    )
    training_runs.run(job)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, job.model_folder))
    assert after["classifier.weight"].shape == (2, 32)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(before[name], after[name])


POOLERS = {
    "bert": ("bert.pooler.dense", {}),
    "albert": ("albert.pooler", {"embedding_size": 16}),
    "deberta-v2": ("pooler.dense", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
}


@pytest.mark.parametrize("method", ["full", "head", "lora"])
@pytest.mark.parametrize("kind", POOLERS)
def test_a_pooler_that_a_masked_lm_comes_without_is_trained_and_exported(
    tmp_path: Path, kind: str, method: str
) -> None:
    pooler, config = POOLERS[kind]
    base = saved(tmp_path / "base", kind, "AutoModelForMaskedLM", **config)
    lora = {"lora": {"targets": ["query_proj" if kind == "deberta-v2" else "query"]}} if method == "lora" else {}
    job = classify(tmp_path / "run", model__base=str(base), method=method, **lora)
    model, said = built(job)
    assert said == [f"head: {base} comes without a pooler; a new one is drawn and trained with the head"]
    assert said[0] in job.plan.reasons
    plain = {name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): p
             for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    with torch.no_grad():
        plain[f"{pooler}.weight"].fill_(0.5)
    assert exported(job, model)[f"{pooler}.weight"].eq(0.5).all()


def test_weights_in_a_pickle_of_tensors_are_the_same_base(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "bert", "AutoModel")
    whole, _ = built(classify(tmp_path / "one", model__base=str(base)))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    pickled, _ = built(classify(tmp_path / "two", model__base=str(base)))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), pickled.parameters(), strict=True))


@pytest.mark.parametrize("added", ["[PAD]", "<extra>"])
def test_a_tokenizer_beyond_the_embedding_is_refused_before_anything_is_encoded(tmp_path: Path, added: str) -> None:
    import transformers

    base = saved(tmp_path / "base", "bert", "AutoModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens(
        {"pad_token": "<a pad token>"} if added == "[PAD]" else {"additional_special_tokens": [added]}
    )
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelError, match="more entries than the base model's embedding"):
        classify(tmp_path / "run", model__base=str(base), data__train=str(rows()))


GROUPED: dict[str, Any] = {"num_key_value_heads": 1}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 16}
TINY: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "smollm3", "phi3"), GROUPED),
    "qwen2": {**GROUPED, "vocab_size": 80},  # whose tokenizer has an end of text of its own
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), WIDE),
    "gpt2": {"n_inner": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    **{kind: {} for kind in ("bert", "roberta", "camembert", "xlm-roberta")},
    "distilbert": {"hidden_dim": 64},
    **{kind: {"embedding_size": 16} for kind in ("albert", "electra")},
    "deberta-v2": POOLERS["deberta-v2"][1],
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3},
}


@pytest.mark.parametrize("kind", TINY)
def test_every_known_architecture_is_trained_as_planned_by_every_method(tmp_path: Path, kind: str) -> None:
    task, name = ("causal-lm", "CausalLM") if kind in DECODERS else ("masked-lm", "MaskedLM")
    base = saved(tmp_path / "base", kind, f"AutoModelFor{name}", bos_token_id=2, eos_token_id=3, **TINY[kind])
    for method in ("full", "lora", "head"):
        jobs = [classify(tmp_path / f"rows-{method}", model__base=str(base), method=method)]
        if method != "head":
            jobs.append(
                continued(tmp_path / method, base, method=method, task=task, data__train=str(training_runs.rows()))
            )
        for job in jobs:
            model, _ = built(job)
            counted = [p.numel() for p in model.parameters() if p.requires_grad]
            assert sum(counted) == job.plan.trainable_parameters, (job.spec.task, method)
            if method == "full":
                assert sum(p.numel() for p in model.parameters()) == job.plan.parameters


def test_tiny_models_are_of_every_known_architecture() -> None:
    assert set(TINY) == KNOWN


# -- the remedies of refusals ------------------------------------------------------------------------------------------


def remedied(error: ModelError, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the error says, in a folder: the command between `python -c "` and the quote that ends it."""
    (code,) = re.findall(r'python -c "([^"]*)"', str(error.do))
    monkeypatch.chdir(folder)
    exec(code, {})


def test_the_text_part_of_a_model_of_text_and_pictures_is_saved_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**SIZES, **WIDE, "model_type": "gemma3_text", "max_position_embeddings": 64, "vocab_size": 74}
    seen = {**SIZES, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    nested = {"text_config": text, "vision_config": seen, "mm_tokens_per_image": 4, "eos_token_id": 3}
    base = saved(tmp_path / "base", "gemma3", "AutoModelForImageTextToText", **nested)
    given = {"kind": "finetune", "model": {"base": str(base)}, "data__train": str(training_runs.rows())}
    with pytest.raises(ModelError, match="more than text") as refused:
        make_plan(spec(PRETRAIN, **given), training_runs.CLUSTER)
    remedied(refused.value, tmp_path, monkeypatch)
    model, _ = built(classify(tmp_path / "run", model__base=str(tmp_path / "text")))
    before, after = load_file(base / "model.safetensors"), model.state_dict()
    name = "layers.1.mlp.up_proj.weight"
    (stored,) = [weight for key, weight in before.items() if key.endswith(name) and "language_model" in key]
    assert torch.equal(stored, after[f"model.{name}"])


def test_an_embedding_is_enlarged_for_a_pad_token_beyond_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    base = saved(tmp_path / "base", "bert", "AutoModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<a pad token>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelError, match="beyond it: pad 74") as refused:
        classify(tmp_path / "run", model__base=str(base))
    remedied(refused.value, tmp_path, monkeypatch)
    model, _ = built(classify(tmp_path / "run", model__base=str(tmp_path / "larger")))
    assert model.get_input_embeddings().weight.shape == (75, 32)


def test_a_run_as_base_gets_a_new_head_for_other_classes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "bert", CLASSIFIER, num_labels=5)
    uri = new_store(tmp_path)
    finished = closed(opened(uri, tmp_path / "run"), tags={"orchestrator.model_path": str(model)})
    named = {"model__base": f"runs:/{finished}", "data__train": str(training_runs.rows()), "tracking__uri": uri}
    found = with_base_found(spec(CLASSIFY, **named))
    job = classify(tmp_path / "next", model__base=str(found.model.base))
    weights, said = built(job)
    assert weights.state_dict()["classifier.weight"].shape == (2, 32)
    assert said == [reason for reason in job.plan.reasons if "a new head is drawn" in reason]
