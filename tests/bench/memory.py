"""`make bench-memory`: peak memory of real trainings on one GPU, beside what the planner predicts.

python -m tests.bench.memory [--out tests/evidence/measured_memory.csv]

Every configuration runs in a process of its own, since an allocator never gives back what it reserved. Without a GPU
it says so and exits with 2. `python -m tests.evidence.score_memory` fits on one half of the rows and scores the other.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.memory import Layout, MemoryEstimate, peak_memory
from orchestrator.planning.model_shape import FAMILY_DEFAULTS, ModelShape, model_shape
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import RunPlan
from orchestrator.planning.trainable import trainable_parameters
from orchestrator.spec import RunSpec
from tests import specs

OUT = Path(__file__).parents[1] / "evidence" / "measured_memory.csv"
STEPS = 3
"""The first makes Adam's moments, the second meets them, the third shows that nothing grows."""
_TIMEOUT_S = 600.0

SIZES: dict[str, dict[str, Any]] = {
    # Depth, width and heads as of Pythia-160M, Pythia-410M, Llama-3.2-1B and Llama-3.2-3B.
    "160M": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    "410M": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16},
    "1B": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "3B": {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24},
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One training to measure."""

    size: str
    method: str = "full"
    zero_stage: int = 0
    sequence_length: int = 1024
    micro_batch: int = 1
    checkpointing: bool = False


CONFIGURATIONS = (
    *(Configuration(size="160M", zero_stage=stage) for stage in range(4)),
    *(Configuration(size="410M", micro_batch=count) for count in (1, 2, 4, 8)),
    *(Configuration(size="410M", sequence_length=length) for length in (256, 2048, 4096)),
    *(Configuration(size="1B", zero_stage=stage) for stage in range(4)),
    *(Configuration(size="1B", checkpointing=True, sequence_length=length) for length in (1024, 4096)),
    *(Configuration(size="1B", method="lora", micro_batch=count) for count in (1, 4)),
    *(Configuration(size="3B", method="lora", sequence_length=length) for length in (512, 2048)),
    *(Configuration(size="3B", method="lora", checkpointing=True, micro_batch=count) for count in (1, 8)),
    Configuration(size="3B", zero_stage=1, checkpointing=True),
)


def main() -> None:
    """Measures, or says why it cannot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the configuration of a measuring process, as JSON
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(Configuration(**json.loads(options.one)))))
        return
    if not local_cluster().gpus:
        sys.stderr.write("bench-memory measures peaks on a GPU, and this machine has none that nvidia-smi knows\n")
        sys.exit(2)
    rows = []
    for configuration in CONFIGURATIONS:
        row = in_own_process(configuration)
        print(f"{configuration}: {row.get('reserved_gib', 'failed')} GiB, predicted {row['predicted_gib']:.2f}")
        rows.append(row)
    write(options.out, rows)
    print(f"{len(rows)} rows in {options.out}")


def spec_of(configuration: Configuration, base: Path) -> RunSpec:
    """The configuration as a spec; `base` is a folder with the model's config.json."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text(json.dumps(config_of(configuration)))
    return specs.spec(
        specs.PRETRAIN,
        kind="finetune",
        model={"base": str(base)},
        method=configuration.method,
        data__sequence_length=configuration.sequence_length,
        training__global_batch=configuration.micro_batch,
        training__micro_batch=configuration.micro_batch,
        training__activation_checkpointing=configuration.checkpointing,
        deepspeed={"zero_stage": configuration.zero_stage, "offload": "none"},
    )


def config_of(configuration: Configuration) -> dict[str, Any]:
    """A Llama of the size, with its usual vocabulary."""
    sizes = SIZES[configuration.size]
    return {
        **FAMILY_DEFAULTS["llama"],
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"],
        "max_position_embeddings": 8192,
    }


def predict(configuration: Configuration, *, precision: str = "bf16") -> tuple[MemoryEstimate, ModelShape]:
    """What the planner says for one GPU."""
    shape = model_shape(config_of(configuration), task="causal-lm")
    with tempfile.TemporaryDirectory() as folder:
        trainable = trainable_parameters(spec_of(configuration, Path(folder)), shape)
    layout = Layout(
        workers=1,
        device="cuda",
        zero_stage=configuration.zero_stage,
        offload="none",
        precision=precision,  # type: ignore[arg-type]
        micro_batch=configuration.micro_batch,
        sequence_length=configuration.sequence_length,
        activation_checkpointing=configuration.checkpointing,
    )
    return peak_memory(layout, shape=shape, method=configuration.method, trainable=trainable), shape  # type: ignore[arg-type]


def in_own_process(configuration: Configuration) -> dict[str, Any]:
    """The row of one configuration; without measured figures where it ran out of memory."""
    predicted, shape = predict(configuration)
    row = {**asdict(configuration), "parameters": shape.parameters, "predicted_gib": predicted.peak_gib.mid}
    command = [sys.executable, "-m", "tests.bench.memory", "--one", json.dumps(asdict(configuration))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode != 0:
        if "OutOfMemoryError" not in done.stderr:
            raise SystemExit(f"{configuration} failed:\n{done.stderr[-3000:]}")
        return row | {"outcome": "OOM"}
    return row | {"outcome": "measured"} | json.loads(done.stdout.splitlines()[-1])


def measure(configuration: Configuration) -> dict[str, Any]:
    """Trains a few steps and reads the allocator, in this process."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(configuration, Path(folder))
        plan = make_plan(spec, local_cluster())
        train(spec, plan, configuration)
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "device": torch.cuda.get_device_name(),
        "precision": plan.precision,
        **{name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }


def train(spec: RunSpec, plan: RunPlan, configuration: Configuration) -> None:
    """The engine's own steps on random tokens, with weights drawn instead of loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.training import models
    from orchestrator.training.engine import Engine, join_process_group
    from orchestrator.training.job import WorkerContext
    from orchestrator.training.objectives import objective_for

    context = WorkerContext()
    join_process_group(plan, context)
    sizes = config_of(configuration)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    if plan.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if configuration.method == "lora":
        model = models.add_lora(model, spec)
    engine = Engine(model, plan=plan, weight_decay=0.0, objective=objective_for("causal-lm"), context=context)
    ids = torch.randint(0, sizes["vocab_size"], (plan.micro_batch, plan.sequence_length))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for _ in range(STEPS):
        engine.step([batch] * plan.accumulation, 1e-4, seeds=range(plan.accumulation))
    engine.close()


COLUMNS = (
    *(field.name for field in fields(Configuration)),
    *("parameters", "outcome", "allocated_gib", "reserved_gib", "predicted_gib", "precision"),
    *("device", "torch", "deepspeed", "transformers", "peft"),
)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
