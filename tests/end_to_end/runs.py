"""What the end-to-end tests share: specs on data in a folder, a tiny base model, a listener, what MLflow has."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.run_lifecycle import Listener
from orchestrator.spec import RunSpec
from orchestrator.tracking import store
from orchestrator.tracking.mlflow_backend import MODEL_STEP_TAG
from tests import specs

STEPS = 100
"""Long enough, at some 20 ms a step, to be killed in the middle."""

STEP_METRICS = (
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/tokens",
    "cost/gpu_hours",
    "cost/flops",
    "cost/usd",
)
"""Logged at every optimizer step, by every kind of run."""


def pretraining(corpus: Path, name: str, **changes: Any) -> RunSpec:
    """Two workers under ZeRO-2, dropout on."""
    values: dict[str, Any] = {
        "name": name,
        "data__train": str(corpus),
        "training__steps": STEPS,
        "training__eval_every_steps": 40,
        "checkpoint__every_steps": 10,
        "resources__workers": 2,
        "deepspeed__zero_stage": 2,
        "tracking__experiment": "runs",
    }
    return specs.spec(specs.PRETRAIN, **(values | changes))


def classification(folder: Path, name: str, **changes: Any) -> RunSpec:
    """A tiny BERT on rows whose class one word tells, evaluated at every other step."""
    values: dict[str, Any] = {
        "name": name,
        "model__base": str(folder / "base"),
        "data__train": str(folder / "rows.csv"),
        "training__steps": 8,
        "training__eval_every_steps": 2,
        "tracking__experiment": "searches",
    }
    return specs.spec(specs.CLASSIFY, **(values | changes))


def write_classification(folder: Path) -> Path:
    """Rows and a base model for `classification`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["the", "film", "was", "long", "and", "loud"]
    rows = [f"{' '.join(words[(i + j) % 6] for j in range(5))} {'good' if i % 2 else 'bad'},{i % 2}" for i in range(64)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    # Given, not trained: WordPieceTrainer (tokenizers 0.23) numbers equally frequent words differently in each process,
    # and what a diverging training gives depends on that.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, "good", "bad"]
    plain = Tokenizer(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(folder / "base")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder / "base")
    return folder


def listener(
    on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None, *, said: list[str] | None = None
) -> Listener:
    """Hears what a face would show; `said` collects its lines."""
    lines = [] if said is None else said
    return Listener(watcher=Watcher(on_progress=on_progress, on_retry=lines.append), say=lines.append)


def processes_named(part: str) -> list[psutil.Process]:
    """Ray's processes below this one, by a part of the title Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if part in " ".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:  # it ended while being looked at
            continue
    return sorted(found, key=lambda process: process.create_time())


def kill(process: psutil.Process) -> None:
    """SIGKILL, as the kernel's OOM killer would."""
    os.kill(process.pid, signal.SIGKILL)


def end_of_driver(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Kills a driver with Ray below it; gives what of it still runs after half a minute.

    Ray's two agents are left out: they take a minute to notice that their node is gone, and hold nothing.
    """
    family = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in p.name()]
    assert family
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return psutil.wait_procs(family, timeout=30)[1]


def wait_until(condition: Callable[[], bool], *, within_s: float) -> None:
    """Polls; fails with the condition's name."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.1)


def curve(run_id: str, metric: str, *, uri: str) -> dict[int, float]:
    """Step to value, as MLflow has it; fails when a step is there twice.

    A model of an earlier step has its evaluation once more at the end.
    """
    client = store.client(uri, create=False)
    points = sorted(client.get_metric_history(run_id, metric), key=lambda point: point.timestamp)
    if metric.startswith("eval/") and MODEL_STEP_TAG in client.get_run(run_id).data.tags:
        points.pop()
    steps = [point.step for point in points]
    assert len(steps) == len(set(steps)), f"{metric} has steps twice: {sorted(steps)}"
    return {point.step: point.value for point in sorted(points, key=lambda point: point.step)}


def mlflow_run(run_id: str, *, uri: str) -> Any:
    """The run itself."""
    return store.client(uri, create=False).get_run(run_id)


def leftovers(*, within_s: float = 20) -> dict[str, list[str]]:
    """What a run has left in the cluster, once what was ending has had time to end."""
    deadline = time.monotonic() + within_s
    while any((found := _leftovers()).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return {kind: names for kind, names in found.items() if names}


def _leftovers() -> dict[str, list[str]]:
    """Placement groups, living actors, our keys, taken cores."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_list
    from ray.util import placement_group_table

    groups = [g["name"] or g["placement_group_id"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    # Ray keeps one coordinator per cluster, for whoever trains next.
    actors = [
        actor["ActorClassName"]
        for actor in ray._private.state.actors().values()
        if actor["State"] != "DEAD" and actor["ActorClassName"] != "_AutoscalingCoordinatorActor"
    ]
    keys = [key.decode() for key in _internal_kv_list("run-", namespace=b"orchestrator")]
    total, free = ray.cluster_resources(), ray.available_resources()
    taken = [name for name in ("CPU", "GPU") if free.get(name, 0) != total.get(name, 0)]
    return {"groups": groups, "actors": actors, "keys": keys, "taken": taken}
