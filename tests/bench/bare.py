"""The shortest honest training script: torch.multiprocessing and DeepSpeed, no Ray, no MLflow.

python -m tests.bench.bare TASK.json    prints one JSON object: the wall-clock time of every step's end
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing


def train(rank: int, task: dict[str, Any]) -> list[float]:
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model_values = dict(task["model"])
    config = AutoConfig.for_model(model_values.pop("model_type"), **model_values)
    model = AutoModelForCausalLM.from_config(config)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=task["deepspeed"])
    tokens = np.memmap(task["tokens"], dtype=task["dtype"], mode="r")
    draws = np.random.default_rng(rank)
    length, ends = task["sequence_length"], []
    for _ in range(task["steps"]):
        for _ in range(task["accumulation"]):
            starts = draws.integers(0, len(tokens) - length, task["micro_batch"])
            rows = torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]).astype(np.int64))
            engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
            engine.step()
        ends.append(time.time())
    return ends


def worker(rank: int, task: dict[str, Any], out: str) -> None:
    import deepspeed

    size = str(task["workers"])
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(task["port"]), RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank)
    )
    deepspeed.init_distributed("gloo")
    ends = train(rank, task)
    if rank == 0:
        Path(out).write_text(json.dumps({"ends": ends}))


if __name__ == "__main__":
    description = json.loads(Path(sys.argv[1]).read_text())
    torch.multiprocessing.spawn(worker, args=(description, sys.argv[2]), nprocs=description["workers"])
