"""Time that a training stands still for a checkpoint: ours against DeepSpeed's plain one and a synchronous report.

python -m tests.bench.checkpointing OUT.json [--rounds 5]    two ranks on gloo, ZeRO-2, GPT-2 of 25M parameters

The plain way is that of Ray's DeepSpeed example: every rank calls `save_checkpoint` on a temporary folder of its own,
and reports it, which copies it to the storage (by pyarrow, as Ray does) while the training waits. Both ways take
turns in one training. A rank's time counts from the call to its return; the slower rank's is the training's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.runs.job import LoopState, WorkerContext
from tests import specs

WORKERS = 2
LAYOUT = {"n_layer": 8, "n_embd": 512, "n_head": 8}
"""25.5M parameters."""
VOCABULARY, LENGTH = 512, 64
STEPS_BETWEEN = 4
"""At least so many undisturbed steps before a checkpoint, which the steps under writing are compared with."""


def measure(rank: int, folder: str, port: int, rounds: int) -> None:
    """One rank; rank 0 leaves the figures in OUT.json below the folder."""
    from orchestrator.checkpoints.async_writer import Saver, Writer
    from orchestrator.worker.engine import Engine, join_process_group
    from orchestrator.worker.models import parameter_groups
    from orchestrator.worker.objectives import objective_for

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    cluster = ClusterShape(nodes=(NodeShape(cpus=2, gpus=0, memory_gib=16.0),), device_name="cpu")
    spec = specs.spec(
        specs.PRETRAIN,
        model={"config": "gpt2", "overrides": LAYOUT, "vocab_size": VOCABULARY},
        data__sequence_length=LENGTH,
        training__global_batch=WORKERS,
        training__precision="fp32",
        resources__workers=WORKERS,
        deepspeed__zero_stage=2,
    )
    plan = make_plan(spec, cluster)
    context = WorkerContext(rank=rank, world_size=WORKERS)
    join_process_group(plan, context)
    whole = model()
    engine = Engine(
        whole, plan=plan, groups=parameter_groups(whole, 0.0), objective=objective_for("causal-lm"), context=context
    )
    ours, plain = Path(folder) / "ours", Path(folder) / "plain"
    writer = Writer(rank=rank, world_size=WORKERS, zero_stage=2, attempt=1)
    saver = Saver(engine, ours, writer=writer, keep=2, holds=lambda: True)
    contest = _Contest(engine, saver, storage=plain)
    for number in range(rounds + 1):  # the first one fills buffers and the page cache, by nobody's account
        contest.round(counts=number > 0)
    if rank == 0:
        (Path(folder) / "figures.json").write_text(json.dumps(contest.figures))
    saver.close()
    engine.close()


def model() -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **LAYOUT, vocab_size=VOCABULARY, n_positions=LENGTH)
    )


class _Contest:
    """One training that is saved in both ways in turn."""

    def __init__(self, engine: Any, saver: Any, *, storage: Path) -> None:
        self._engine, self._saver, self._storage = engine, saver, storage
        self._step = 0
        self._written_s = 0.0
        self.figures: dict[str, list[float]] = {
            name: [] for name in ("first_s", "ours_s", "plain_s", "writing_s", "quiet_step_s", "busy_step_s")
        }

    def round(self, *, counts: bool) -> None:
        quiet = [self._take_step() for _ in range(STEPS_BETWEEN)][1:]
        plain_s = self._slowest(self._save_plainly)
        quiet += [self._take_step() for _ in range(STEPS_BETWEEN)][1:]
        ours_s = self._slowest(lambda: self._saver.save(LoopState(step=self._step)))
        busy: list[float] = []
        while not (done := self._finished()):
            busy.append(self._take_step())
        if not counts:
            self.figures["first_s"].append(ours_s)
            return
        self.figures["plain_s"].append(plain_s)
        self.figures["ours_s"].append(ours_s)
        self.figures["writing_s"].append(done)
        self.figures["quiet_step_s"] += quiet
        self.figures["busy_step_s"] += busy[:-1]  # the last one ran on after the writing had ended

    def _take_step(self) -> float:
        ids = torch.randint(0, VOCABULARY, (1, LENGTH))
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        started = time.perf_counter()
        self._engine.step([batch], 1e-4, seeds=[self._step])
        self._step += 1
        return time.perf_counter() - started

    def _finished(self) -> float:
        """Seconds of writing once all ranks have written, else 0."""
        news = self._saver.finished()
        self._written_s = news[0].writing_s if news else self._written_s
        both = torch.tensor([self._written_s])
        dist.all_reduce(both, op=dist.ReduceOp.MIN)
        if float(both):
            self._written_s = 0.0
        return float(both)

    def _slowest(self, save: Any) -> float:
        dist.barrier()
        started = time.perf_counter()
        save()
        seconds = torch.tensor([time.perf_counter() - started])
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds)

    def _save_plainly(self) -> None:
        from pyarrow.fs import LocalFileSystem, copy_files

        local = LocalFileSystem()
        with tempfile.TemporaryDirectory(dir=self._storage.parent) as folder:
            self._engine._engine.save_checkpoint(folder, tag="state")
            target = self._storage / f"step-{self._step}"
            local.create_dir(str(target))
            copy_files(folder, str(target), source_filesystem=local, destination_filesystem=local)
            dist.barrier()
        if dist.get_rank() == 0:
            for old in self._storage.iterdir():
                if old != target:
                    shutil.rmtree(old)


def run(rounds: int) -> dict[str, list[float]]:
    """Both ranks, in processes of their own; every figure in seconds."""
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(measure, args=(folder, port, rounds), nprocs=WORKERS)
        figures: dict[str, list[float]] = json.loads((Path(folder) / "figures.json").read_text())
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    for name, values in run(parser.parse_args().rounds).items():
        print(f"{name:14} {statistics.median(values):.4f}  of {len(values)}")
