from __future__ import annotations

import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F

from orchestrator.architectures.families import FAMILY_DEFAULTS, model_shape
from orchestrator.checkpoints.async_writer import Saver, Writer
from orchestrator.checkpoints.catalog import Checkpoint, fetch, newest_good
from orchestrator.methods.registry import PRICED
from orchestrator.planning.memory import GIB, Layout, Trainer, peak_memory
from orchestrator.runs.job import LoopState, TrainingJob, WorkerContext
from orchestrator.samples.batches import SampleOrder, global_batch, rank_slice
from orchestrator.samples.open_split import open_split
from orchestrator.tasks.registry import task_of
from orchestrator.worker import models
from orchestrator.worker.engine import Engine, join_process_group, needed_by
from orchestrator.worker.lr_schedule import learning_rate
from orchestrator.worker.objectives import objective_for
from tests import training_runs
from tests.training_runs import NO_DROPOUT, classify, curve, pretrain

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_rank_0_is_as_large_as_its_copy_was_planned(tmp_path: Path, stage: int, precision: str) -> None:
    job = trained(
        tmp_path,
        resources__workers=2,
        deepspeed__zero_stage=stage,
        training__precision=precision,
        training__steps=1,
        model__overrides={**NO_DROPOUT, "n_embd": 256},
    )
    checkpoint = newest_good(job.checkpoints).checkpoint
    assert checkpoint is not None
    written = sum(file.bytes for file in checkpoint.files.values() if file.rank == 0)
    layout = Layout(**{field.name: getattr(job.plan, field.name) for field in fields(Layout)})
    planned = peak_memory(
        layout,
        shape=model_shape(FAMILY_DEFAULTS["gpt2"], task=task_of("causal-lm")),
        method=PRICED["full"].cost,
        trainable=job.plan.trainable_parameters,
        trainer=Trainer(copies_checkpoints=True),
    ).checkpoint_gib
    assert written == pytest.approx(planned * GIB, rel=0.01)


def test_raw_deepspeed_keys_reach_the_engine(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "raw"}
    trained(tmp_path / "run", deepspeed={"csv_monitor": monitor})
    assert list((tmp_path / "monitor" / "raw").glob("*.csv"))


def test_a_training_that_is_over_leaves_no_model_in_its_process(tmp_path: Path) -> None:
    script = (
        "import gc, sys, pickle; from orchestrator.worker.loop import train; "
        "from orchestrator.runs.job import WorkerContext; "
        "train(pickle.load(sys.stdin.buffer), WorkerContext()); "
        "from deepspeed.runtime.engine import DeepSpeedEngine; "
        "sys.exit(sum(isinstance(each, DeepSpeedEngine) for each in gc.get_objects()))"
    )
    job = pickle.dumps(pretrain(tmp_path, training__steps=1))
    done = subprocess.run([sys.executable, "-c", script], input=job, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_a_start_under_zero_does_not_load_the_compiler(tmp_path: Path) -> None:
    script = (
        "import sys, pickle; from orchestrator.worker.loop import train; "
        "from orchestrator.runs.job import WorkerContext; "
        "train(pickle.load(sys.stdin.buffer), WorkerContext()); sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    job = pickle.dumps(pretrain(tmp_path, training__steps=1, deepspeed__zero_stage=2))
    done = subprocess.run([sys.executable, "-c", script], input=job, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"Warning" not in done.stderr


# -- going back in the same process ----------------------------------------------------------------------------------

REWINDS = [
    (method, stage, precision)
    for method, precision in (("full", "fp32"), ("full", "bf16"), ("lora", "fp32"))
    for stage in (3, 0, 1, 2)  # 3 in fresh processes: it cuts the weights while the model is built
]


def rewind_job(folder: Path, method: str, stage: int, precision: str) -> TrainingJob:
    """Dropout and accumulation on, two workers."""
    make = classify if method == "lora" else pretrain
    return make(
        folder,
        method=method,
        deepspeed__zero_stage=stage,
        training__precision=precision,
        training__micro_batch=2,
        resources__workers=2,
    )


def rewind(rank: int, folder: Path, port: int, jobs: list[TrainingJob]) -> None:
    """One rank: for each job three steps, a checkpoint, three steps, a ruinous one, back, and the three again."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    told = []
    for job in jobs:
        context = WorkerContext(rank=rank, world_size=2)
        join_process_group(job.plan, context)
        model = models.build_model(job.spec, job.plan, job.data)
        objective = objective_for(job.spec.task)
        engine = Engine(
            model, plan=job.plan, groups=models.parameter_groups(model, 0.1), objective=objective, context=context
        )
        saver = Saver(
            engine,
            job.checkpoints,
            writer=Writer(rank=rank, world_size=2, zero_stage=job.plan.zero_stage, attempt=1),
            keep=1,
            holds=lambda: True,
        )
        take_steps(engine, job, rank, range(3))
        saver.save(LoopState(step=3))
        first = take_steps(engine, job, rank, range(3, 6))
        take_steps(engine, job, rank, range(6, 8), rate=math.nan)  # the second has gradients that are no numbers
        saver.wait()
        dist.barrier()
        found = newest_good(job.checkpoints).checkpoint
        assert found is not None
        folder_here = fetch(job.checkpoints, found, needed=partial(needed_by, rank))
        engine.load(replace(found, path=only_needed(folder_here, found, rank)))
        again = take_steps(engine, job, rank, range(3, 6))
        told.append({"first": first, "again": again})
        saver.close()
        engine.close()
    (folder / f"rank-{rank}.pt").write_bytes(pickle.dumps(told))


def only_needed(folder: Path, checkpoint: Checkpoint, rank: int) -> Path:
    """A folder with those files alone that the rank says it needs, as an object store's would be."""
    own = folder.parent / f"for-rank-{rank}"
    for name in filter(partial(needed_by, rank), checkpoint.files):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).hardlink_to(folder / name)
    return own


def take_steps(
    engine: Engine, job: TrainingJob, rank: int, steps: Iterable[int], rate: float = 1e-2
) -> list[tuple[float, float | None, dict[str, bytes]]]:
    """(loss, gradient norm, weights on rank 0) of every step."""
    samples = open_split(job.data.path, "train")
    order = SampleOrder(seed=0, size=len(samples))
    taken = []
    for step in steps:
        mine = rank_slice(
            global_batch(order, step, job.plan.global_batch),
            rank=rank,
            world_size=job.plan.workers,
            micro_batch=job.plan.micro_batch,
            accumulation=job.plan.accumulation,
        )
        micro_batches = [{k: torch.from_numpy(v) for k, v in samples.batch(i).items()} for i in mine]
        seeds = [100 * step + 10 * index + rank for index in range(len(micro_batches))]
        loss, norm = engine.step(micro_batches, rate, seeds=seeds)
        weights = {name: bytes(t.flatten().view(torch.uint8).numpy()) for name, t in engine.full_state().items()}
        taken.append((float(loss), norm, weights))
    return taken


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each rank says of every rewind."""
    folder = tmp_path_factory.mktemp("rewound")
    jobs = [rewind_job(folder / "-".join(map(str, case)), *case) for case in REWINDS]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(rewind, args=(folder, port, jobs), nprocs=2)
    return [pickle.loads((folder / f"rank-{rank}.pt").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("case", range(len(REWINDS)), ids=[f"{m}-zero{s}-{p}" for m, s, p in REWINDS])
def test_steps_after_going_back_are_those_of_the_first_pass_bit_for_bit(
    rewound: list[list[dict[str, Any]]], case: int
) -> None:
    for rank in range(2):
        told = rewound[rank][case]
        for (loss, norm, weights), (loss_again, norm_again, weights_again) in zip(
            told["first"], told["again"], strict=True
        ):
            assert math.isfinite(loss)
            assert (loss, norm) == (loss_again, norm_again)
            assert weights.keys() == weights_again.keys()
            assert [name for name, value in weights.items() if weights_again[name] != value] == []
        assert bool(weights) == (rank == 0)


# -- fp16 ------------------------------------------------------------------------------------------------------------


FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 2, "hysteresis": 1}
STAGES = (3, 0, 1, 2)  # 3 in a fresh process: it cuts the weights while the model is built


def overflow(rank: int, folder: Path, jobs: list[TrainingJob]) -> None:
    """For each job two steps, six whose gradients overflow at every loss scale from 4 down to 1, and two good ones."""
    from deepspeed.accelerator import get_accelerator

    told = []
    for job in jobs:
        join_process_group(job.plan, WorkerContext())
        get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, and refused for that alone
        factors = [1.0] * 2 + [1e12] * 6 + [1.0] * 2
        plain = objective_for(job.spec.task)
        magnified = replace(plain, loss=lambda module, batch: plain.loss(module, batch) * factors.pop(0))  # noqa: B023
        model = models.build_model(job.spec, job.plan, job.data)
        engine = Engine(
            model,
            plan=job.plan,
            groups=models.parameter_groups(model, 0.1),
            objective=magnified,
            context=WorkerContext(),
        )
        told.append(take_steps(engine, job, rank, range(len(factors)), rate=1e-3))
        engine.close()
    (folder / "told.pt").write_bytes(pickle.dumps(told))


@pytest.fixture(scope="module")
def overflown(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What `overflow` tells of every stage."""
    folder = tmp_path_factory.mktemp("overflown")
    jobs = []
    for stage in STAGES:
        job = pretrain(folder / str(stage), deepspeed__zero_stage=stage, training__micro_batch=8)
        plan = replace(job.plan, precision="fp16", deepspeed={**job.plan.deepspeed, "fp16": FP16})
        jobs.append(replace(job, plan=plan))
    torch.multiprocessing.spawn(overflow, args=(folder, jobs), nprocs=1)
    told: list[list[Any]] = pickle.loads((folder / "told.pt").read_bytes())
    return told


@pytest.mark.parametrize("case", range(len(STAGES)), ids=[f"zero{stage}" for stage in STAGES])
def test_gradients_that_overflow_fp16_at_its_smallest_loss_scale_are_told_and_change_nothing(
    overflown: list[list[Any]], case: int
) -> None:
    losses, norms, weights = zip(*overflown[case], strict=True)
    assert all(map(math.isfinite, losses))
    assert norms[2:8] == (None, None, math.inf, math.inf, math.inf, math.inf)
    assert all(norm is not None and math.isfinite(norm) for norm in (*norms[:2], *norms[8:]))
    assert weights[1] != weights[0]
    assert all(each == weights[1] for each in weights[2:8])
    assert weights[8] != weights[1]


# -- micro-batches of bf16 -------------------------------------------------------------------------------------------


def sum_small_gradients(rank: int, folder: Path, jobs: list[TrainingJob]) -> None:
    """For each job the gradient norm of a step whose first micro-batch has gradients of 1, and all others of 2**-9."""
    found = []
    for job in jobs:
        join_process_group(job.plan, WorkerContext())
        objective = replace(objective_for("causal-lm"), loss=lambda module, batch: module(batch["x"]).sum())
        layer = torch.nn.Linear(16, 16, bias=False)
        engine = Engine(
            layer,
            plan=job.plan,
            groups=models.parameter_groups(layer, 0.0),
            objective=objective,
            context=WorkerContext(),
        )
        sizes = [1.0] + [2.0**-9] * (job.plan.accumulation - 1)
        batches = [{"x": torch.full((1, 16), size, dtype=torch.bfloat16)} for size in sizes]
        found.append((engine.step(batches, 1e-3, seeds=[0] * len(batches))[1], sum(sizes) / len(sizes) * 16))
        engine.close()
    (folder / "norms.pt").write_bytes(pickle.dumps(found))


def test_gradients_of_many_bf16_micro_batches_are_summed_in_fp32(tmp_path: Path) -> None:
    """In bf16, 1 + 2**-9 is 1: a sum there would lose all micro-batches but the first."""
    small = {"training__precision": "bf16", "training__global_batch": 64, "training__micro_batch": 1}
    jobs = [pretrain(tmp_path / str(stage), deepspeed__zero_stage=stage, **small) for stage in STAGES]
    torch.multiprocessing.spawn(sum_small_gradients, args=(tmp_path, jobs), nprocs=1)
    found = pickle.loads((tmp_path / "norms.pt").read_bytes())
    for stage, (norm, exact) in zip(STAGES, found, strict=True):
        # Each micro-batch's and, before ranks exchange it, the sum's own rounding to bf16: half of 2**-7 at most.
        assert norm == pytest.approx(exact, rel=2**-8), f"ZeRO {stage}"
    lost = 1 / (1 + 63 * 2.0**-9)
    assert lost < 1 - 2**-4
