"""The shortest Ray Train + DeepSpeed script: what Ray's own example does, on the same data and model.

python -m tests.bench.plain_ray TASK.json OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer


def worker(config: dict[str, Any]) -> None:
    from tests.bench.bare import train

    rank = ray.train.get_context().get_world_rank()
    ends = train(rank, config["task"])
    if rank == 0:
        Path(config["out"]).write_text(json.dumps({"ends": ends}))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text())
    ray.init(address="local", num_cpus=task["workers"], include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        worker,
        train_loop_config={"task": task, "out": sys.argv[2]},
        scaling_config=ray.train.ScalingConfig(num_workers=task["workers"]),
        run_config=ray.train.RunConfig(storage_path=str(Path(sys.argv[2]).parent / "ray")),
    ).fit()
