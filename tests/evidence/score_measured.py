"""Our own engine's peaks against the planner's: `python -m tests.evidence.score_measured` prints rows and score.

`measured_memory.csv` holds what `make bench-memory` measured, by device. Two of the planner's figures do not follow
from sizes: what a process takes before any model, and on a GPU what the allocator holds beside the tensors. Both are
fitted on every other row of a device, and scored on the rest beside the shipped ones.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize

from orchestrator.architectures.families import FAMILY_DEFAULTS, ModelShape, model_shape
from orchestrator.intervals import Interval
from orchestrator.methods.registry import PRICED, trainable_parameters
from orchestrator.planning.memory import ALLOCATOR_SHARE, BASELINE_GIB, Layout, MemoryEstimate, peak_memory
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of
from tests import specs

MEASURED = Path(__file__).with_name("measured_memory.csv")

SIZES: dict[str, dict[str, Any]] = {
    # Depth, width and heads as of Karpathy's stories15M, 42M and 110M, ...
    "15M": {"num_hidden_layers": 6, "hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6},
    "42M": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
    "110M": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12},
    # ... Pythia-410M, Llama-3.2-1B and Llama-3.2-3B.
    "410M": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16},
    "1B": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "3B": {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24},
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One training to measure."""

    size: str
    """Key of `SIZES`."""
    method: Literal["full", "lora"] = "full"
    workers: int = 1
    zero_stage: int = 0
    sequence_length: int = 1024
    micro_batch: int = 1
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A configuration that ran, beside what the planner says of it."""

    configuration: Configuration
    device: str
    peak_gib: float
    predicted: MemoryEstimate

    @property
    def error(self) -> float:
        """Of the shipped prediction's middle, relative to what was measured."""
        return self.predicted.peak_gib.mid / self.peak_gib - 1


@dataclass(frozen=True, kw_only=True)
class MeasuredScore:
    """One device's rows: the shipped constants, and those fitted on one half, on the other half."""

    rows: tuple[Measured, ...]
    shipped_error: float
    """Median absolute relative error on the second half, as the planner predicts."""
    coverage: float
    """Share of all rows inside the planner's 90 % interval."""
    baseline_gib: float
    """Fitted on the first half: what a process takes before any model."""
    allocator_share: float
    """Likewise: what the allocator holds, as a share of activations and logits; 0 on a CPU."""
    fitted_error: float
    """Median absolute relative error on the second half, with these two."""


def config_of(configuration: Configuration) -> dict[str, Any]:
    """A Llama of the size, with its usual vocabulary."""
    sizes = SIZES[configuration.size]
    return {
        **FAMILY_DEFAULTS["llama"],
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"],
        "max_position_embeddings": 8192,
    }


def spec_of(configuration: Configuration, base: Path) -> RunSpec:
    """The configuration as a spec; `base` is a folder that does not matter, but for the model's config.json in it."""
    return specs.spec(
        specs.PRETRAIN,
        kind="finetune",
        model={"base": str(base)},
        method=configuration.method,
        data__sequence_length=configuration.sequence_length,
        training__global_batch=configuration.workers * configuration.micro_batch,
        training__micro_batch=configuration.micro_batch,
        training__activation_checkpointing=configuration.checkpointing,
        deepspeed={"zero_stage": configuration.zero_stage, "offload": "none"},
        resources={"workers": configuration.workers},
    )


def predict(configuration: Configuration, *, on_gpu: bool) -> tuple[MemoryEstimate, ModelShape]:
    """What the planner says, for bf16 on a GPU and fp32 on a CPU."""
    shape = model_shape(config_of(configuration), task=task_of("causal-lm"))
    with tempfile.TemporaryDirectory() as folder:
        trainable = trainable_parameters(spec_of(configuration, Path(folder)), shape)
    layout = Layout(
        workers=configuration.workers,
        device="cuda" if on_gpu else "cpu",
        zero_stage=configuration.zero_stage,
        offload="none",
        precision="bf16" if on_gpu else "fp32",
        micro_batch=configuration.micro_batch,
        sequence_length=configuration.sequence_length,
        activation_checkpointing=configuration.checkpointing,
    )
    return peak_memory(layout, shape=shape, method=PRICED[configuration.method].cost, trainable=trainable), shape


def read(file: Path = MEASURED) -> list[Measured]:
    """The rows that were measured, not those that ran out of memory; empty where there is no such file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [_measured(raw) for raw in csv.DictReader(stream) if raw["outcome"] == "measured"]


def _measured(raw: dict[str, str]) -> Measured:
    configuration = Configuration(
        size=raw["size"],
        method=raw["method"],  # type: ignore[arg-type]
        workers=int(raw["workers"]),
        zero_stage=int(raw["zero_stage"]),
        sequence_length=int(raw["sequence_length"]),
        micro_batch=int(raw["micro_batch"]),
        checkpointing=raw["checkpointing"] == "True",
    )
    predicted, _ = predict(configuration, on_gpu=raw["device"] != "cpu")
    return Measured(
        configuration=configuration, device=raw["device"], peak_gib=float(raw["peak_gib"]), predicted=predicted
    )


def scores(file: Path = MEASURED) -> dict[str, MeasuredScore]:
    """By device; those with fewer than four rows are left out."""
    by_device: dict[str, list[Measured]] = defaultdict(list)
    for row in read(file):
        by_device[row.device].append(row)
    return {device: _score(rows) for device, rows in by_device.items() if len(rows) >= 4}


def _score(rows: Sequence[Measured]) -> MeasuredScore:
    fitted_on, scored = rows[::2], rows[1::2]
    baseline, share = fit(fitted_on)
    inside = [row.predicted.peak_gib.low <= row.peak_gib <= row.predicted.peak_gib.high for row in rows]
    return MeasuredScore(
        rows=tuple(rows),
        shipped_error=statistics.median(abs(row.error) for row in scored),
        coverage=sum(inside) / len(inside),
        baseline_gib=baseline,
        allocator_share=share,
        fitted_error=statistics.median(abs(_with(row, baseline, share).mid / row.peak_gib - 1) for row in scored),
    )


def fit(rows: Sequence[Measured]) -> tuple[float, float]:
    """(baseline in GiB, allocator's share) with the least mean absolute logarithm of predicted over measured."""
    on_gpu = rows[0].device != "cpu"

    def loss(constants: Any) -> float:
        baseline, share = abs(constants)
        peaks = [_with(row, baseline, share if on_gpu else 0.0).mid for row in rows]
        return float(np.mean(np.abs(np.log(peaks) - np.log([row.peak_gib for row in rows]))))

    start = (BASELINE_GIB["cuda" if on_gpu else "cpu"], ALLOCATOR_SHARE)
    baseline, share = np.abs(minimize(loss, start, method="Nelder-Mead").x)
    return float(baseline), float(share) if on_gpu else 0.0


def _with(row: Measured, baseline: float, share: float) -> Interval:
    """The peak with other constants than the shipped ones."""
    shipped = BASELINE_GIB["cpu" if row.device == "cpu" else "cuda"]
    held = share * (row.predicted.activations_gib + row.predicted.logits_gib)
    changed = replace(row.predicted, buffers_gib=row.predicted.buffers_gib - shipped + baseline, reserve_gib=held)
    return changed.peak_gib


def main() -> None:
    """Prints the rows and the scores."""
    for device, score in scores().items():
        print(f"\n{device}\n{'':58}{'measured':>9}{'middle':>8}{'low':>7}{'high':>7}{'error':>8}")
        for row in score.rows:
            peak = row.predicted.peak_gib
            what = " ".join(str(getattr(row.configuration, field.name)) for field in fields(Configuration))
            print(f"{what:58}{row.peak_gib:9.2f}{peak.mid:8.2f}{peak.low:7.2f}{peak.high:7.2f}{row.error:+8.0%}")
        print(
            f"{len(score.rows)} peaks, {score.coverage:.0%} inside the interval; on one half median error "
            f"{score.shipped_error:.1%}, and {score.fitted_error:.1%} with a baseline of {score.baseline_gib:.2f} GiB "
            f"and an allocator's share of {score.allocator_share:.2f} fitted on the other"
        )


if __name__ == "__main__":
    main()
