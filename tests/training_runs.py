"""Trainings for tests: tiny jobs, and worker processes without Ray that stay up from one training to the next.

A worker process imports torch and DeepSpeed once (10 s on two cores), so the tests of a session share one group for
each world size. Every step's metrics are written to `history.jsonl` in the run's folder, through crashes too.
"""

from __future__ import annotations

import csv
import functools
import gc
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orchestrator import locations
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.runs.job import Outcome, Progress, TrainingJob, WorkerContext
from orchestrator.samples.prepare import encode_here, prepare
from tests import specs

CLUSTER = ClusterShape(nodes=(NodeShape(cpus=2, gpus=0, memory_gib=16.0),), device_name="cpu")
NO_DROPOUT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 1}
ROBERTA = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_TIMEOUT_S = 400.0  # two processes that import DeepSpeed took 100 s on a machine of two cores under a load of 22
Figures = dict[str, float]


# -- jobs ------------------------------------------------------------------------------------------------------------


def pretrain(folder: Path, **changes: Any) -> TrainingJob:
    """A two-layer GPT on a small corpus."""
    return _job(folder, specs.PRETRAIN, **{"data__train": str(corpus()), **changes})


def classify(folder: Path, **changes: Any) -> TrainingJob:
    """A two-layer BERT on sixty labelled rows."""
    return _job(folder, specs.CLASSIFY, **{"model__base": str(bert()), "data__train": str(rows()), **changes})


def fill_gaps(folder: Path, **changes: Any) -> TrainingJob:
    """A two-layer RoBERTa that learns the hidden tokens of a small corpus."""
    changes = {"task": "masked-lm", "model__config": "roberta", "model__overrides": ROBERTA, **changes}
    return pretrain(folder, **changes)


def continued(folder: Path, base: Path, **changes: Any) -> TrainingJob:
    """Fine-tuning of an exported language model on the small corpus."""
    return pretrain(folder, **{"kind": "finetune", "model": {"base": str(base)}, **changes})


def chat(folder: Path, **changes: Any) -> TrainingJob:
    """A two-layer GPT that learns to answer, from conversations of different lengths."""
    base = locations.home() / "chat-base"
    if not (base / "model").exists():
        run(pretrain(base, training__steps=1, model__overrides=NO_DROPOUT, model__vocab_size=384))
    named = {"kind": "finetune", "task": "chat", "model": {"base": str(base / "model")}}
    return _job(folder, specs.PRETRAIN, **{**named, "data__train": str(conversations()), **changes})


def retained(folder: Path, **changes: Any) -> TrainingJob:
    """Continued pretraining of a base that replays general data, measures forgetting and pulls weights back."""
    base = locations.home() / "general-model"
    if not (base / "model").exists():
        run(pretrain(base, training__steps=1))
    if not (general := locations.home() / "general").exists():
        specs.write_corpus(general, documents=5)
    retain = {"data": str(general), "replay": 0.4, "l2sp": 3.0, "validation_fraction": 0.3}
    return continued(folder, base / "model", **{"retain": retain, **changes})


def with_precision(job: TrainingJob, precision: Any) -> TrainingJob:
    """The same job in another precision, also in fp16, which DeepSpeed refuses on a CPU."""
    return replace(job, plan=replace(job.plan, precision=precision))


def _job(folder: Path, base: dict[str, Any], **changes: Any) -> TrainingJob:
    spec = specs.spec(base, **changes)
    data = prepare(spec, cache=locations.home() / "cache", encode=encode_here)
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingJob(spec=spec, plan=make_plan(spec, CLUSTER, counts=data.counts), data=data, run_folder=folder)


@functools.cache
def corpus() -> Path:
    """Text files."""
    return specs.write_corpus(locations.home() / "corpus", documents=12)


@functools.cache
def rows() -> Path:
    """A table of texts of different lengths with two classes."""
    file = locations.home() / "rows.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        for number in range(60):
            mood, word = ("good", "fine") if number % 2 else ("bad", "poor")
            table.writerow([f"the film was {word} " * (1 + number % 3) + str(number), mood])
    return file


@functools.cache
def conversations() -> Path:
    """Chats of one to four questions about small sums."""
    file = locations.home() / "conversations.jsonl"
    with file.open("w") as stream:
        for number in range(60):
            turns = []
            for turn in range(1 + number % 4):
                turns.append({"role": "user", "content": f"add {number % 10} and {turn}"})
                turns.append({"role": "assistant", "content": str(number % 10 + turn) + "!" * (number % 3)})
            stream.write(json.dumps({"messages": turns}) + "\n")
    return file


@functools.cache
def bert() -> Path:
    """A base model with random weights, saved by transformers with a WordPiece tokenizer trained on the rows."""
    import torch
    from tokenizers import BertWordPieceTokenizer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = locations.home() / "bert"
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(rows().read_text().splitlines(), vocab_size=200, show_progress=False)
    # WordPieceTrainer (tokenizers 0.23) numbers equally frequent words differently in each process.
    known = trained.get_vocab()
    special = sorted((token for token in known if token.startswith("[")), key=known.__getitem__)
    ordered = [*special, *sorted(known.keys() - special)]
    numbers = {token: number for number, token in enumerate(ordered)}
    trained._tokenizer.model = models.WordPiece(numbers, unk_token="[UNK]")
    tokenizer = BertTokenizerFast(tokenizer_object=trained._tokenizer)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- worker processes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Events:
    """What happens to a training from outside."""

    stop_at: int | None = None
    """Step at which a stop is requested."""
    kill_at: int | None = None
    """Step at which rank 0's process dies by SIGKILL."""
    spoil_at: int | None = None
    """Step after which a weight of rank 0 turns into a NaN, once."""
    exit_at_report: int | None = None
    """Step at which `context.report` raises SystemExit, as Ray Tune does."""


class WorkerDied(Exception):
    """A worker process ended without an answer."""


class Workers:
    """Processes that carry out one training after the other, all ranks of it."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world_size, port), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: TrainingJob, events: Events) -> Outcome:
        """Trains; raises what rank 0 raised, and WorkerDied when a process ended."""
        try:
            for pipe in self._pipes:
                pipe.send((job, events))
            answers = []
            for pipe in self._pipes:
                if not pipe.poll(_TIMEOUT_S):
                    raise WorkerDied("no answer in time")
                answers.append(pipe.recv())
        except (EOFError, ConnectionError) as error:
            raise WorkerDied from error
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]

    def end(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()


@functools.cache
def workers(world_size: int) -> Workers:
    """The session's processes for a world size; daemons, so they end with it."""
    return Workers(world_size)


def run(job: TrainingJob, **events: Any) -> Outcome:
    """Trains a job in as many processes as its plan has workers; `events` are fields of `Events`."""
    try:
        return workers(job.plan.workers).run(job, Events(**events))
    except WorkerDied:
        workers(job.plan.workers).end()
        workers.cache_clear()
        raise


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    if world_size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    from orchestrator.worker.work import carry_out

    while True:
        job, events = pipe.recv()
        try:
            answer: Any = carry_out(job, _context(job, events, rank, world_size))
        except (Exception, SystemExit) as error:
            answer = error
        pipe.send(answer)


def _context(job: TrainingJob, events: Events, rank: int, world_size: int) -> WorkerContext:
    here = {"step": 0, "spoilt": 0}

    def progress(news: Progress) -> None:
        here["step"] = news.step
        with (job.run_folder / "history.jsonl").open("a") as stream:
            stream.write(json.dumps(news.to_dict()) + "\n")
        if events.kill_at == news.step and news.phase == "training":
            os.kill(os.getpid(), signal.SIGKILL)
        if events.spoil_at == news.step and news.phase == "training" and not here["spoilt"]:
            here["spoilt"] = 1
            _spoil_a_weight()

    def report(step: int, metrics: Mapping[str, float]) -> None:
        if step == events.exit_at_report:
            raise SystemExit

    return WorkerContext(
        rank=rank,
        world_size=world_size,
        progress=progress,
        report=report,
        stop_requested=lambda: events.stop_at is not None and here["step"] + 1 >= events.stop_at,
    )


def _spoil_a_weight() -> None:
    """What a flipped bit of the exponent does, in the model that this process trains."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    # Engines of earlier trainings in this process may still be there; nothing becomes of theirs.
    for engine in [thing for thing in gc.get_objects() if isinstance(thing, DeepSpeedEngine)]:
        for weight in list(engine.module.parameters())[:1]:
            if weight.numel():  # a ZeRO-3 engine's are in shards elsewhere
                weight.data.view(-1)[0] = float("nan")


# -- what they left --------------------------------------------------------------------------------------------------

SAME_AFTER_RESUME = ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "cost/flops")


def history(job: TrainingJob) -> dict[int, list[Figures]]:
    """The training figures of every step, one mapping for each time that it was taken."""
    found: dict[int, list[Figures]] = {}
    for line in (job.run_folder / "history.jsonl").read_text().splitlines():
        news = json.loads(line)
        if news["phase"] == "training" and "train/loss" in news["metrics"]:
            kept = {name: news["metrics"][name] for name in SAME_AFTER_RESUME}
            known = found.setdefault(news["step"], [])
            if kept not in known:
                known.append(kept)
    return found


def curve(job: TrainingJob, name: str = "train/loss") -> list[float]:
    """One figure of every step of a run that took each step in one way only."""
    steps = history(job)
    assert all(len(each) == 1 for each in steps.values()), "a step was repeated with other figures"
    return [steps[step][0][name] for step in range(1, len(steps) + 1)]
