from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orchestrator.training import models
from orchestrator.training.batches import SampleOrder, global_batch, open_split
from orchestrator.training.job import TrainingJob
from orchestrator.training.schedule import learning_rate
from tests import training_runs
from tests.training_runs import NO_DROPOUT, curve, pretrain

pytestmark = pytest.mark.slow

PLAIN = {"model__overrides": NO_DROPOUT, "training__weight_decay": 0.1, "training__gradient_clip": 0.5}


def trained(folder: Path, **changes: Any) -> TrainingJob:
    job = pretrain(folder, **{**PLAIN, **changes})
    training_runs.run(job)
    return job


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return trained(tmp_path_factory.mktemp("unsharded"), resources__workers=2, deepspeed__zero_stage=0)


def plain_training(job: TrainingJob) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the shortest loop in PyTorch: whole batches, one process, no DeepSpeed."""
    training, plan = job.spec.training, job.plan
    assert plan.steps is not None
    assert plan.warmup_steps is not None
    model = models.build_model(job.spec, replace(plan, zero_stage=0), job.data)
    optimizer = torch.optim.AdamW(models.parameter_groups(model, training.weight_decay), lr=0.0)
    samples = open_split(job.data.path, "train")
    order = SampleOrder(seed=training.seed, size=len(samples))
    losses, norms = [], []
    for step in range(plan.steps):
        batch = {k: torch.from_numpy(v) for k, v in samples.batch(global_batch(order, step, plan.global_batch)).items()}
        logits = model(input_ids=batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        limit = training.gradient_clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step=step, steps=plan.steps, warmup_steps=plan.warmup_steps)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("stage", [0, 3])
def test_losses_and_gradient_norms_are_those_of_a_plain_loop(tmp_path: Path, clip: float, stage: int) -> None:
    job = trained(tmp_path, training__gradient_clip=clip, deepspeed__zero_stage=stage)
    losses, norms = plain_training(job)
    np.testing.assert_allclose(curve(job), losses, atol=1e-5)
    np.testing.assert_allclose(curve(job, "train/grad_norm"), norms, atol=1e-5)
    assert min(norms) > 0.5, "the clipped run would be the same as the unclipped one"


def test_clipping_changes_the_steps(unsharded: TrainingJob, tmp_path: Path) -> None:
    unclipped = trained(tmp_path, training__gradient_clip=0, resources__workers=2)
    assert curve(unclipped)[0] == curve(unsharded)[0]
    assert abs(curve(unclipped)[-1] - curve(unsharded)[-1]) > 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_same_losses_and_norms(unsharded: TrainingJob, tmp_path: Path, stage: int) -> None:
    sharded = trained(tmp_path, resources__workers=2, deepspeed__zero_stage=stage)
    assert sharded.plan.zero_stage == stage
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(curve(sharded, name), curve(unsharded, name), atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("stage", [0, 2])
def test_accumulation_does_not_change_the_losses(
    unsharded: TrainingJob, tmp_path: Path, micro_batch: int, stage: int
) -> None:
    accumulated = trained(
        tmp_path, resources__workers=2, training__micro_batch=micro_batch, deepspeed__zero_stage=stage
    )
    assert (unsharded.plan.accumulation, accumulated.plan.accumulation) == (1, 4 // micro_batch)
    np.testing.assert_allclose(curve(accumulated), curve(unsharded), atol=1e-6)


def test_one_and_two_workers_give_the_same_losses(unsharded: TrainingJob, tmp_path: Path) -> None:
    np.testing.assert_allclose(curve(trained(tmp_path)), curve(unsharded), atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_gives_the_same_losses(tmp_path: Path, stage: int) -> None:
    dropout = {"model__overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "deepspeed__zero_stage": stage}
    kept = trained(tmp_path / "kept", **dropout)
    recomputed = trained(tmp_path / "recomputed", **dropout, training__activation_checkpointing=True)
    assert recomputed.plan.activation_checkpointing
    np.testing.assert_allclose(curve(recomputed), curve(kept), atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains(unsharded: TrainingJob, tmp_path: Path, stage: int) -> None:
    job = trained(tmp_path, resources__workers=2, training__precision="bf16", deepspeed__zero_stage=stage)
    assert (unsharded.plan.precision, job.plan.precision) == ("fp32", "bf16")
    losses = curve(job)
    assert losses != curve(unsharded)
    np.testing.assert_allclose(losses, curve(unsharded), atol=0.003)
    np.testing.assert_allclose(curve(job, "train/grad_norm"), curve(unsharded, "train/grad_norm"), rtol=0.05)


def test_raw_deepspeed_keys_reach_the_engine(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "raw"}
    trained(tmp_path / "run", deepspeed={"csv_monitor": monitor})
    assert list((tmp_path / "monitor" / "raw").glob("*.csv"))


def test_a_start_under_zero_does_not_load_the_compiler(tmp_path: Path) -> None:
    script = (
        "import sys, pickle; from orchestrator.training.loop import train; "
        "from orchestrator.training.job import WorkerContext; "
        "train(pickle.load(sys.stdin.buffer), WorkerContext()); sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    job = pickle.dumps(pretrain(tmp_path, training__steps=1, deepspeed__zero_stage=2))
    done = subprocess.run([sys.executable, "-c", script], input=job, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"Warning" not in done.stderr
