"""`make bench-memory`: peak memory of real trainings on this machine's GPU, or else on its CPU, kept as evidence.

python -m tests.bench.memory [--out tests/evidence/measured_memory.csv]

Each worker of a configuration is a process of its own, since an allocator never gives back what it reserved. Rows of
other devices in the file stay. `python -m tests.evidence.score_measured` compares them with the planner.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.job import WORKER_ENVIRONMENT
from orchestrator.spec import RunSpec
from tests.bases import write_base
from tests.evidence.score_measured import MEASURED, Configuration, config_of, predict, spec_of

STEPS = 3
"""The first makes Adam's moments, the second meets them, the third shows that nothing grows."""
_TIMEOUT_S = 600.0

ON_A_GPU = (
    *(Configuration(size="110M", zero_stage=stage) for stage in range(4)),
    *(Configuration(size="410M", micro_batch=count) for count in (1, 2, 4, 8)),
    *(Configuration(size="410M", sequence_length=length) for length in (256, 2048, 4096)),
    *(Configuration(size="1B", zero_stage=stage) for stage in range(4)),
    *(Configuration(size="1B", checkpointing=True, sequence_length=length) for length in (1024, 4096)),
    *(Configuration(size="1B", method="lora", micro_batch=count) for count in (1, 4)),
    *(Configuration(size="3B", method="lora", sequence_length=length) for length in (512, 2048)),
    *(Configuration(size="3B", method="lora", checkpointing=True, micro_batch=count) for count in (1, 8)),
    Configuration(size="3B", zero_stage=1, checkpointing=True),
)
ON_A_CPU = (
    *(Configuration(size="15M", zero_stage=stage, sequence_length=256) for stage in range(4)),
    *(Configuration(size="42M", workers=2, zero_stage=stage, sequence_length=256) for stage in range(4)),
    *(Configuration(size="42M", micro_batch=count, sequence_length=256) for count in (1, 2, 4, 8)),
    *(Configuration(size="42M", sequence_length=length) for length in (128, 512, 1024)),
    *(Configuration(size="110M", zero_stage=stage, sequence_length=128) for stage in (0, 1)),
    *(Configuration(size="110M", workers=2, zero_stage=stage, sequence_length=128) for stage in (0, 2, 3)),
    *(Configuration(size="110M", checkpointing=True, sequence_length=length) for length in (256, 1024)),
    *(Configuration(size="110M", method="lora", sequence_length=256, micro_batch=count) for count in (1, 4)),
    Configuration(size="110M", method="lora", checkpointing=True, sequence_length=256, micro_batch=8),
)

VERSIONS = ("torch", "deepspeed", "transformers", "peft")
COLUMNS = (
    *("device", "precision", *(field.name for field in fields(Configuration))),
    *("parameters", "outcome", "peak_gib", "allocated_gib", "hardware", *VERSIONS),
)


def main() -> None:
    """Measures everything for this machine's device."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the configuration of a worker, as JSON
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(Configuration(**json.loads(options.one)))))
        return
    machine = local_cluster()
    on_gpu = bool(machine.gpus)
    rows = []
    for configuration in ON_A_GPU if on_gpu else ON_A_CPU:
        row = in_own_processes(configuration)
        predicted, shape = predict(configuration, on_gpu=on_gpu)
        print(f"{configuration}: {row.get('peak_gib', 'no memory for it')} GiB, predicted {predicted.peak_gib.mid:.2f}")
        rows.append({**asdict(configuration), "parameters": shape.parameters, **row})
    write(options.out, rows, device=machine.device_name)
    print(f"{len(rows)} rows in {options.out}")


def in_own_processes(configuration: Configuration) -> dict[str, Any]:
    """What the workers of a configuration measured; nothing where one ran out of memory."""
    command = [sys.executable, "-m", "tests.bench.memory", "--one", json.dumps(asdict(configuration))]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = {**os.environ, **WORKER_ENVIRONMENT, **environment}
    others = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(1, configuration.workers)
    ]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    finally:
        for other in others:
            other.kill()
            other.wait()
    if done.returncode == 0:
        return {"outcome": "measured", **json.loads(done.stdout.splitlines()[-1])}
    if "OutOfMemoryError" not in done.stderr:
        raise SystemExit(f"{configuration} failed:\n{done.stderr[-3000:]}")
    return {"outcome": "OOM"}


def measure(configuration: Configuration) -> dict[str, Any]:
    """Trains a few steps in this process, the worker RANK, and asks the engine for its peak."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_base(base, config_of(configuration))
        spec = spec_of(configuration, base)
        plan = make_plan(spec, local_cluster())
        peak_gib = train(spec, plan, configuration)
    on_gpu = plan.device == "cuda"
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "precision": plan.precision,
        "peak_gib": peak_gib,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        **{name: version(name) for name in VERSIONS},
    }


def train(spec: RunSpec, plan: RunPlan, configuration: Configuration) -> float:
    """The engine's own steps on random tokens, with weights drawn instead of loaded; the peak in GiB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.methods.lora import Lora
    from orchestrator.runs.job import WorkerContext
    from orchestrator.worker import models
    from orchestrator.worker.engine import Engine, join_process_group
    from orchestrator.worker.objectives import objective_for

    rank = int(os.environ.get("RANK", "0"))
    context = WorkerContext(rank=rank, world_size=plan.workers, local_rank=rank)
    join_process_group(plan, context)
    sizes = config_of(configuration)
    with models.sharded_construction(plan):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    if plan.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if configuration.method == "lora":
        model = Lora().adapt(model, spec)
    engine = Engine(
        model,
        plan=plan,
        groups=models.parameter_groups(model, 0.0),
        objective=objective_for("causal-lm"),
        context=context,
    )
    ids = torch.randint(0, sizes["vocab_size"], (plan.micro_batch, plan.sequence_length))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for _ in range(STEPS):
        engine.step([batch] * plan.accumulation, 1e-4, seeds=range(plan.accumulation))
    peak_gib = engine.peak_gib()
    engine.close()
    return peak_gib


def write(file: Path, rows: list[dict[str, Any]], *, device: str) -> None:
    """The rows of a device as a table, in place of those that it had; the catalogue names devices."""
    kept = []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            kept = [row for row in csv.DictReader(stream) if row["device"] != device]
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows([*kept, *({"device": device, **row} for row in rows)])


if __name__ == "__main__":
    main()
