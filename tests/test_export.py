from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from orchestrator.errors import ModelError
from orchestrator.runs.job import TrainingJob, WorkerContext
from orchestrator.samples.open_split import open_split
from orchestrator.worker import loop, models
from orchestrator.worker.export import DIFFERENT, Sample, check_batch, export
from orchestrator.worker.models import auto_class
from orchestrator.worker.objectives import logits_of
from tests import training_runs
from tests.training_runs import LLAMA, classify, continued, fill_gaps, pretrain

pytestmark = pytest.mark.slow


def sample(job: TrainingJob, model: torch.nn.Module) -> Sample:
    batch = check_batch(open_split(job.data.path, "validation"), job.plan)
    return Sample(batch=batch, logits=logits_of(model, batch))


def write(job: TrainingJob, model: torch.nn.Module, state: dict[str, torch.Tensor] | None = None) -> ModelError | None:
    """Exports a model's weights, or others, as what the model computes."""
    weights = dict(model.state_dict()) if state is None else state
    return export(weights, job.spec, job.plan, job.data, job.model_folder, trained=sample(job, model))


def config_of(job: TrainingJob) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job.model_folder / "config.json").read_text())
    return config


# -- exported equals trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "precision"),
    [(pretrain, "fp32"), (pretrain, "bf16"), (pretrain, "fp16"), (classify, "fp32"), (fill_gaps, "fp32")],
)
def test_a_folder_that_computes_something_else_is_an_error_and_kept_apart(
    tmp_path: Path, make: Any, precision: str
) -> None:
    job = make(tmp_path)
    job = training_runs.with_precision(job, precision)
    model = models.build_model(job.spec, job.plan, job.data).to(models.DTYPES[precision])
    assert write(job, model) is None
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = next(name for name in state if name.endswith(("c_attn.weight", "value.weight")))
    state[first] *= 1.5 if precision == "fp32" else -3
    (job.model_folder / "kept").touch()
    wrong = write(job, model, state)
    assert wrong is not None
    assert "logits up to" in str(wrong.got)
    assert str(tmp_path / DIFFERENT) in str(wrong.got)
    assert (tmp_path / DIFFERENT / "model.safetensors").is_file()
    assert (job.model_folder / "kept").is_file(), "what was exported before is left alone"


def test_an_export_that_differs_ends_the_training_in_an_error_that_keeps_checkpoint_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(state: dict[str, torch.Tensor], *arguments: Any, **named: Any) -> Any:
        name = "transformer.h.1.mlp.c_fc.weight"
        return export({**state, name: torch.zeros_like(state[name])}, *arguments, **named)

    monkeypatch.setattr(loop, "export", losing)  # no fault that does this is known
    job = pretrain(tmp_path)
    with pytest.raises(ModelError, match="does not compute what was trained"):
        loop.train(job, WorkerContext())
    assert (tmp_path / DIFFERENT / "config.json").is_file()
    assert (job.checkpoints / "step-00000006" / "manifest.json").is_file()
    assert not job.model_folder.exists()
    assert not job.outcome_file.exists()
    monkeypatch.undo()
    assert loop.train(job, WorkerContext()).status == "finished", "the checkpoint is whole"


def test_a_large_model_is_compared_on_few_tokens(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    samples = open_split(job.data.path, "validation")
    columns = {
        parameters: check_batch(samples, replace(job.plan, parameters=parameters))["input_ids"].shape
        for parameters in (job.plan.parameters, 7_000_000_000, 700_000_000_000)
    }
    assert list(columns.values()) == [(4, 32), (4, 17), (4, 8)]


def test_a_generation_config_that_transformers_will_not_write_again_is_kept_as_it_is(tmp_path: Path) -> None:
    base = pretrain(tmp_path / "base")
    write(base, models.build_model(base.spec, base.plan, base.data))
    own = {"temperature": 0.6, "top_p": 0.9, "do_sample": False}  # as in Llama 2's
    (base.model_folder / "generation_config.json").write_text(json.dumps(own))
    job = continued(tmp_path / "next", base.model_folder)
    assert write(job, models.build_model(job.spec, job.plan, job.data)) is None
    found = json.loads((job.model_folder / "generation_config.json").read_text())
    assert {name: found[name] for name in own if name != "do_sample"} == {"temperature": 0.6, "top_p": 0.9}


def base_of(folder: Path, architecture: str, **config: Any) -> Path:
    """An exported new model of an architecture, with a tokenizer of its own."""
    folder.mkdir()
    values = {"model_type": architecture, **ARCHITECTURES[architecture], **config}
    (folder / "config.json").write_text(json.dumps(values))
    job = pretrain(folder / "run", model={"config": str(folder), "vocab_size": 512})
    assert write(job, models.build_model(job.spec, job.plan, job.data)) is None
    return job.model_folder


def adapted(job: TrainingJob) -> torch.nn.Module:
    """The model of a run, its adapters not as they begin but as large as its weights."""
    model = models.build_model(job.spec, job.plan, job.data)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize("architecture", ["gemma3_text", "smollm3", "gpt2"])
def test_adapters_beside_tied_embeddings_are_merged_right_and_adapters_on_them_refused(
    tmp_path: Path, architecture: str
) -> None:
    base = base_of(tmp_path / "base", architecture, tie_word_embeddings=True)
    usual = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    job = continued(tmp_path / "run", base, method="lora", lora={"targets": usual})
    assert write(job, adapted(job)) is None
    for target in ["wte", "lm_head"] if architecture == "gpt2" else ["embed_tokens", "lm_head"]:
        with pytest.raises(ModelError, match="tied layers") as planned:
            continued(tmp_path / "tied", base, method="lora", lora={"targets": [target]})
        asked = job.spec.model_copy(update={"lora": job.spec.lora.model_copy(update={"targets": (target,)})})
        with pytest.raises(ModelError, match="tied layers") as run:
            models.build_model(asked, job.plan, job.data)
        assert str(run.value) == str(planned.value)


def test_a_classifier_with_adapters_on_the_token_table_of_a_tied_base_is_exported_right(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "smollm3", tie_word_embeddings=True)
    job = classify(tmp_path / "run", model__base=str(base), method="lora", lora={"targets": ["q_proj"]})
    lora = job.spec.lora.model_copy(update={"targets": ("embed_tokens", "q_proj")})
    job = replace(job, spec=job.spec.model_copy(update={"lora": lora}))
    assert write(job, adapted(job)) is None


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_on_untied_embeddings_are_merged_right(tmp_path: Path, target: str) -> None:
    base = base_of(tmp_path / "base", "granite", tie_word_embeddings=False)
    job = continued(tmp_path / "run", base, method="lora", lora={"targets": ["q_proj"]})
    lora = job.spec.lora.model_copy(update={"targets": (target,)})
    job = replace(job, spec=job.spec.model_copy(update={"lora": lora}))
    assert write(job, adapted(job)) is None


# -- every token trains ----------------------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 512}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED,
    "mixtral": {**GATED, "num_local_experts": 2},
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "gemma3_text": GATED,
    "phi3": {**GATED, "pad_token_id": 0},
    "olmo2": GATED,
    "smollm3": GATED,
    "granite": GATED,
    "opt": {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "gpt_neox": {**SMALL, "intermediate_size": 32},
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 512, "n_positions": 64},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_end_of_text_is_learnt_like_any_other_token_where_it_is_padding_too(
    tmp_path: Path, architecture: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, **ARCHITECTURES[architecture]}))
    job = pretrain(tmp_path / "run", model={"config": str(tmp_path), "vocab_size": 512})
    end = job.data.eos_id
    assert end is not None
    assert end == job.data.pad_id
    model = models.build_model(job.spec, job.plan, job.data)
    table = model.get_input_embeddings().weight
    assert float(table[end].detach().abs().max()) > 0, "new weights"
    ids = torch.tensor([[end, 300, end, 301]])
    model(input_ids=ids).logits[:, -1].logsumexp(-1).sum().backward()
    with torch.no_grad():
        table -= 0.1 * table.grad
    assert float(table.grad[end].abs().max()) > 0
    assert write(job, model) is None
    assert config_of(job)["pad_token_id"] == end
    following = continued(tmp_path / "next", job.model_folder)
    loaded = models.build_model(following.spec, following.plan, following.data)
    assert torch.equal(loaded.get_input_embeddings().weight, table)
    assert loaded.get_input_embeddings().padding_idx is None
    assert loaded.config.pad_token_id == end


def test_a_classifier_learns_the_end_of_text_and_nothing_from_its_padding(tmp_path: Path) -> None:
    base = pretrain(tmp_path / "base", model__config="llama", model__overrides=LLAMA)
    write(base, models.build_model(base.spec, base.plan, base.data))
    job = classify(tmp_path / "run", model__base=str(base.model_folder))
    end = job.data.eos_id
    assert end == job.data.pad_id
    model = models.build_model(job.spec, job.plan, job.data)
    table = model.get_input_embeddings().weight

    def gradient(ids: list[int], mask: list[int]) -> torch.Tensor:
        table.grad = None
        model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits[0, 0].backward()
        assert table.grad is not None
        return table.grad[end]

    assert float(gradient([300, end, 301], [1, 1, 1]).abs().max()) > 0
    assert float(gradient([300, 301, end], [1, 1, 0]).abs().max()) == 0


def test_positions_of_roberta_still_count_from_its_padding(tmp_path: Path) -> None:
    job = fill_gaps(tmp_path)
    model = models.build_model(job.spec, job.plan, job.data)
    assert model.get_input_embeddings().padding_idx is None
    assert model.roberta.embeddings.position_embeddings.padding_idx == job.data.pad_id
    assert write(job, model) is None


# -- what a base's configuration says of something else ---------------------------------------------------------------

LEFT_OVER = {
    "problem_type": "regression",
    "finetuning_task": "sts-b",
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "id2label": {"0": "happy", "1": "sad", "2": "angry"},
    "label2id": {"happy": 0, "sad": 1, "angry": 2},
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "use_cache": False,
}


def left_over(base: Path) -> Path:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **LEFT_OVER}))
    return base


def test_a_language_model_forgets_what_its_base_was_for(tmp_path: Path) -> None:
    base = pretrain(tmp_path / "base")
    write(base, models.build_model(base.spec, base.plan, base.data))
    job = continued(tmp_path / "next", left_over(base.model_folder))
    assert write(job, models.build_model(job.spec, job.plan, job.data)) is None
    config = AutoConfig.from_pretrained(job.model_folder)
    assert (config.return_dict, config.output_hidden_states, config.output_attentions) == (True, False, False)
    assert config.use_cache
    assert config.num_labels == 2
    text = (job.model_folder / "config.json").read_text()
    assert [word for word in ("regression", "sts-b", "max_length", "angry") if word in text] == []


def test_a_classifier_is_one_of_single_labels_whatever_its_base_was(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(training_runs.bert(), base)
    job = classify(tmp_path / "run", model__base=str(left_over(base)))
    assert write(job, models.build_model(job.spec, job.plan, job.data)) is None
    config = config_of(job)
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert "sts-b" not in json.dumps(config)
    loaded = auto_class(job.spec.task).from_pretrained(job.model_folder)
    batch = sample(job, loaded).batch
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    wanted = torch.nn.functional.cross_entropy(loaded(**batch).logits, labels)
    assert loaded(**batch, labels=labels).loss.item() == pytest.approx(wanted.item())
