"""Twenty steps of every task and method beside the shortest loop that does the same, in fp64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from orchestrator.methods.registry import method_of
from orchestrator.runs.job import Progress, TrainingJob, WorkerContext
from orchestrator.samples.batches import SampleOrder, global_batch
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split
from orchestrator.worker import models
from orchestrator.worker.loop import train
from tests import training_runs
from tests.training_runs import LLAMA, NO_DROPOUT, ROBERTA, classify, continued, pretrain

pytestmark = pytest.mark.slow

STEPS, WARMUP, CLIP = 20, 4, 0.1
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FROZEN_BUT = {
    "head": ("pooler.", "classifier."),
    "lora": ("lora_", "modules_to_save"),
    "qlora": ("lora_", "modules_to_save"),
    "ia3": ("ia3_", "modules_to_save"),
    "last_layers": ("layer.1.", "pooler.", "classifier."),
}
"""What is trained, by parts of the names, where not all is."""
Step = dict[str, float]


def training(stage: int, **changes: Any) -> dict[str, Any]:
    """Two micro-batches a step, clipped from the start. A larger epsilon than usual, because some biases of attention
    have gradients that are zero but for rounding, of which Adam would make whole steps."""
    return {
        "training__steps": STEPS,
        "training__micro_batch": 4,
        "training__learning_rate": 3e-3,
        "training__weight_decay": 0.1,
        "training__warmup_fraction": WARMUP / STEPS,
        "training__schedule": "linear",
        "training__final_learning_rate_fraction": 0.1,
        "training__gradient_clip": CLIP,
        "training__adam_epsilon": 1e-4,
        "deepspeed__zero_stage": stage,
        **changes,
    }


L2SP = 30.0
"""So strong that twenty small steps show it: a tenth of the way back at the peak rate."""
LORA = {"method": "lora", "lora": {"rank": 4, "dropout": 0.0}}
QLORA = {**LORA, "method": "qlora", "export": "both"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "causal-lm, gpt2, full": (0, {}),
    "causal-lm, llama, full": (3, {"model__config": "llama", "model__overrides": LLAMA}),
    "causal-lm, lora": (2, LORA),
    "causal-lm, qlora": (1, QLORA),
    "causal-lm, scratch": (1, {"method": "scratch"}),
    "masked-lm, full": (3, {}),
    "masked-lm, lora": (0, LORA),
    "masked-lm, scratch": (2, {"method": "scratch"}),
    "text-classification, full": (0, {}),
    "text-classification, head": (3, {"method": "head"}),
    "text-classification, head of kept features": (2, {"method": "head"}),
    "text-classification, lora": (2, LORA),
    "text-classification, qlora": (2, QLORA),
    "text-classification, ia3": (3, {"method": "ia3"}),
    "text-classification, last_layers": (2, {"method": "last_layers", "last_layers": {"layers": 1}}),
    "text-classification, layerwise": (3, {"layerwise": {"decay": 0.8, "unfreeze_fraction": 0.5}}),
    "text-classification, scratch": (3, {"method": "scratch"}),
    "causal-lm, replay": (1, {"retain": {"replay": 0.3}}),
    "causal-lm, l2sp": (3, {"retain": {"l2sp": L2SP}}),
    "masked-lm, replay and l2sp": (2, {"retain": {"replay": 0.4, "l2sp": L2SP}}),
    "text-classification, l2sp": (1, {"retain": {"l2sp": L2SP}}),
    "text-classification, l2sp and layerwise": (0, {"retain": {"l2sp": L2SP}, "layerwise": {"decay": 0.8}}),
}


def short_documents(folder: Path) -> Path:
    """A corpus of which some stretches are mostly separators, so that blocks hold unequally many predictions."""
    folder.mkdir()
    for number in range(6):
        rows = ["a model reads the line after the next"] * 6 + ["a", "b"] * 40
        text = "\n".join(json.dumps({"text": row}) for row in rows)
        (folder / f"{number}.jsonl").write_text(text)
    return folder


def general_documents(folder: Path) -> Path:
    """Other text than the training data's, of which some passes fit into twenty steps."""
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(" ".join(f"end of {n % 7} documents" for n in range(number, 60)))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported new models by task, without dropout."""
    root = tmp_path_factory.mktemp("bases")
    bert = shutil.copytree(training_runs.bert(), root / "bert")
    config = bert / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **STEADY}))
    made = {"text-classification": bert}
    roberta = {"task": "masked-lm", "model__config": "roberta", "model__overrides": {**ROBERTA, **STEADY}}
    for task, changes in (("causal-lm", {"model__overrides": NO_DROPOUT}), ("masked-lm", roberta)):
        job = pretrain(root / task, training__steps=1, **changes)
        train(job, WorkerContext())
        made[task] = job.model_folder
    return made


def job_of(case: str, folder: Path, bases: dict[str, Path]) -> TrainingJob:
    task = case.partition(",")[0]
    stage, changes = CASES[case]
    changes = {**training(stage), **changes}
    if "replay" in changes.get("retain", {}):
        changes["retain"] = {"data": str(general_documents(folder.with_name("general"))), **changes["retain"]}
    if task == "text-classification":
        return classify(folder, model__base=str(bases[task]), **changes)
    if task == "masked-lm":
        documents = str(short_documents(folder.with_name("documents")))
        changes |= {"data__train": documents, "task": task, "training__masking_rate": 0.6}
        return continued(folder, bases[task], data__sequence_length=16, **changes)
    if case.endswith(" full"):
        return pretrain(folder, **{"model__overrides": NO_DROPOUT, **changes})
    return continued(folder, bases[task], **changes)


def with_the_values_of_4_bits(job: TrainingJob, quantised: torch.nn.Module) -> torch.nn.Module:
    """A plain base with LoRA's adapters, whose weights are what the quantised ones stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = models.build_model(job.spec.model_copy(update={"method": "lora"}), job.plan, job.data)
    for name, module in quantised.named_modules():
        if name.endswith("base_layer"):
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            other = plain.get_submodule(name)
            other.weight.data = values.T.contiguous() if type(other).__name__ == "Conv1D" else values
    return plain


def plain_model(job: TrainingJob) -> torch.nn.Module:
    """The initial weights of the run in a module that transformers, or peft, has built alone."""
    first = models.build_model(job.spec, job.plan.__class__(**{**vars(job.plan), "zero_stage": 0}), job.data)
    if job.spec.method == "qlora":
        model = with_the_values_of_4_bits(job, first)
    elif job.spec.method in ("lora", "ia3"):
        model = first
    else:
        config = first.config.__class__(**{**first.config.to_dict(), "dtype": "float32"})
        if job.spec.task == "causal-lm":
            config.pad_token_id = None
        model = models.auto_class(job.spec.task).from_config(config)
        model.load_state_dict(first.state_dict())
    trained = FROZEN_BUT.get(job.spec.method, ("",))
    for name, weight in model.named_parameters():
        weight.requires_grad = any(part in name for part in trained)
    return model.double()


def rates() -> Iterator[float]:
    """Linear up to the peak, from the first share of it on, and linear down to a tenth of it at the last step."""
    for step in range(STEPS):
        if step < WARMUP:
            yield 3e-3 * (step + 1) / WARMUP
        else:
            yield 3e-3 * (0.1 + 0.9 * (STEPS - step) / (STEPS - WARMUP))


def below(name: str) -> int:
    """How many parts of a model of two layers lie between a weight and the head."""
    return 3 if "embeddings" in name else 2 if "layer.0." in name else 1 if "layer.1." in name else 0


def mean_loss(task: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Over all predictions of the global batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    logits = model(**inputs).logits
    if task == "masked-lm":
        logits = logits[torch.arange(len(logits))[:, None], batch["positions"]]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"].reshape(-1))


def global_batch_of(job: TrainingJob, step: int, masking: Masking) -> dict[str, np.ndarray]:
    """The next samples of the training data and, behind them, of the general data, each in passes of its own."""
    seed, replayed = job.spec.training.seed, job.spec.replayed
    parts = []
    for data, share, seed_of in ((job.data, 8 - replayed, seed), (job.data.retained, replayed, seed + 2**32)):
        if data is not None and share:
            samples = open_split(data.path, "train", masking=masking)
            order = SampleOrder(seed=seed_of, size=len(samples))
            places = np.arange(step * share, step * share + share)
            assert (order.samples(places) == global_batch(order, step, share)).all()
            parts.append(samples.batch(order.samples(places), epochs=order.epochs(places)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plain_loop(job: TrainingJob) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """The figures of every step and the weights after the last."""
    spec = job.spec
    model = plain_model(job).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight],
            "name": name,
            "weight_decay": 0.1 if weight.dim() > 1 and "ia3" not in name else 0.0,
            "below": below(name),
        }
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-4)
    masking = Masking(rate=spec.training.masking_rate, seed=spec.training.seed)
    pull = 0.0 if spec.retain is None else spec.retain.l2sp
    new = ("pooler.", "classifier.") if spec.task == "text-classification" else ()
    pulled = {name for name, _ in model.named_parameters() if pull and not name.startswith(new)}
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for group in groups:
        group["weight_decay"] *= group["name"] not in pulled
    steps = []
    for step, rate in enumerate(rates()):
        arrays = global_batch_of(job, step, masking)
        loss = mean_loss(spec.task, model, {name: torch.from_numpy(array) for name, array in arrays.items()})
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimizer.param_groups:
            waits = step < spec.layerwise.unfreeze_fraction * STEPS * group["below"] / 3
            group["lr"] = 0.0 if waits else rate * spec.layerwise.decay ** group["below"]
            if group["name"] in pulled:
                (weight,) = group["params"]
                weight.data -= group["lr"] * pull * (weight.data - start[group["name"]])
        optimizer.step()
        steps.append({"train/loss": loss.item(), "train/grad_norm": norm.item(), "train/learning_rate": rate})
    if spec.method in ("lora", "qlora", "ia3"):
        model = method_of("lora" if spec.method == "qlora" else spec.method).merged(model)
    return steps, model.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_a_plain_loop(case: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    job = job_of(case, tmp_path / "run", bases)
    assert (job.plan.accumulation, job.plan.global_batch, job.plan.precision) == (2, 8, "fp32")
    expected, weights = plain_loop(job)
    found: dict[int, Step] = {}

    def progress(news: Progress) -> None:
        if news.phase == "training" and news.step:
            found[news.step] = dict(news.metrics)

    train(job, WorkerContext(progress=progress))
    for step, figures in enumerate(expected, start=1):
        assert {name: found[step][name] for name in figures} == pytest.approx(figures, abs=1e-6, rel=1e-6), step
    assert any(figures["train/grad_norm"] > CLIP for figures in expected), "some steps are clipped"
    exported = load_file(job.model_folder / "model.safetensors")
    assert len(exported) > 10
    for name, weight in exported.items():
        assert float((weight.double() - weights[name]).abs().max()) < 1e-6, name
