"""Peak memory against what was published: `python -m tests.evidence.score_memory` prints every row and the score.

`memory.csv` holds the public rows, with the layout of each training beside it, column by column; `layout_note` says
where a layout was deduced rather than stated. Rows marked `held_out` were added from the same tables after the parts
of the model stood; the allocator's share and the widths of the intervals were chosen with both in view.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.architectures.families import ModelShape
from orchestrator.architectures.standard_shape import standard_shape
from orchestrator.intervals import Interval
from orchestrator.methods.registry import PRICED
from orchestrator.planning.estimate import Estimate, Workload, estimate
from orchestrator.planning.hardware import catalogue
from orchestrator.planning.memory import Layout, Trainer, peak_memory
from orchestrator.planning.placement import USABLE_DEVICE_MEMORY

EVIDENCE = Path(__file__).with_name("memory.csv")
_DEVICES = {"24": "A10G", "40": "A100-40GB", "48": "L40S", "80": "A100-80GB", "96": "H100-96GB"}
_MULTIPLIERS = {"full": 16.0, "lora": 2.0, "qlora": 0.5}
"""Bytes per weight that people multiply with: mixed-precision Adam, 16-bit weights, 4-bit weights."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published training beside its prediction."""

    name: str
    split: str
    published_gib: float | None
    """None for a published out-of-memory."""
    device_gib: float
    peak_gib: Interval
    baseline_gib: float

    @property
    def error(self) -> float | None:
        """Of the middle, relative to what was published."""
        return None if self.published_gib is None else self.peak_gib.mid / self.published_gib - 1

    @property
    def fits(self) -> bool:
        """What `estimate` says: the upper end has room."""
        return self.peak_gib.high <= USABLE_DEVICE_MEMORY * self.device_gib


@dataclass(frozen=True, kw_only=True)
class MemoryScore:
    """How good the predictions are over the measured rows."""

    rows: tuple[Row, ...]
    median_error: float
    """Median absolute relative error."""
    coverage: float
    """Share inside the 90 % interval."""
    wrong_fits: int
    """Out-of-memories that were said to fit."""
    wrong_refusals: int
    """Trainings that ran and were said not to fit surely."""
    baseline_error: float
    """Median absolute relative error of the usual multipliers."""


def score(*, split: str | None = None, sizes_known: bool = True) -> MemoryScore:
    """Scores the rows of a split, or all; without `sizes_known` as `estimate` sees them, by parameters alone."""
    read = [raw for raw in read_rows() if split in (None, raw["split"])]
    return summarise([predict(raw) if sizes_known else predict_by_flags(raw) for raw in read])


def summarise(rows: list[Row]) -> MemoryScore:
    """The figures over rows."""
    measured = [row for row in rows if row.published_gib is not None]
    inside = [row.peak_gib.low <= (row.published_gib or 0) <= row.peak_gib.high for row in measured]
    return MemoryScore(
        rows=tuple(rows),
        median_error=statistics.median(abs(row.error or 0.0) for row in measured),
        coverage=sum(inside) / len(inside),
        wrong_fits=sum(row.fits for row in rows if row.published_gib is None),
        wrong_refusals=sum(not row.fits for row in measured),
        baseline_error=statistics.median(abs(row.baseline_gib / (row.published_gib or 1) - 1) for row in measured),
    )


def read_rows() -> list[dict[str, str]]:
    """The scored rows: measurements and out-of-memories whose layout can be stated."""
    with EVIDENCE.open(newline="", encoding="utf-8") as stream:
        return [raw for raw in csv.DictReader(stream) if raw["as_method"]]


def predict(raw: dict[str, str], *, scale: float = 1.0) -> Row:
    """The row with its layout and the model's own sizes; `scale` perturbs the number of parameters."""
    shape, method = shape_of(raw, scale=scale), raw["as_method"]
    layout = Layout(
        workers=int(raw["devices"]),
        device="cuda",
        zero_stage=int(raw["as_zero_stage"]),
        offload=raw["offload"],  # type: ignore[arg-type]
        precision=raw["as_precision"],  # type: ignore[arg-type]
        micro_batch=int(raw["as_micro_batch"]),
        sequence_length=int(raw["sequence_length"]),
        activation_checkpointing=raw["checkpointing"] == "yes",
    )
    memory = peak_memory(
        layout,
        shape=shape,
        method=PRICED[method].cost,
        trainable=PRICED[method].usual_parameters(shape, rank=8),
        trainer=Trainer(
            master_weights=raw["master_weights"] == "yes",
            optimizer=raw["optimizer"],
            fused_step=raw["fused_step"] == "yes",
            loss_chunks=int(raw["loss_chunks"]),
            loads_whole=raw["loads_whole"] == "yes",
        ),
    )
    return _row(raw, memory.peak_gib, scale=scale)


def predict_by_flags(raw: dict[str, str], *, scale: float = 1.0) -> Row:
    """The row as somebody types it: `estimate --params ... --method ...`, with what the source's table states."""
    return _row(raw, estimate_by_flags(raw, scale=scale).peak_gib, scale=scale)


def estimate_by_flags(raw: dict[str, str], *, scale: float = 1.0) -> Estimate:
    """What `estimate` answers from the source's own columns, and the checkpointing that it is known to use."""
    stated = raw["precision"]
    known: dict[str, Any] = {"precision": "fp16" if stated == "fp16" else "bf16"}
    if raw["seq"]:
        known |= {"sequence_length": int(raw["seq"]), "micro_batch": int(raw["micro_batch"])}
    return estimate(
        Workload(
            parameters=round(float(raw["params"]) * scale),
            tokens=1e6,
            device=catalogue()[_DEVICES[raw["device_gib"] or "80"]],
            gpus=int(raw["devices"]),
            method=raw["as_method"],
            zero_stage=int(raw["as_zero_stage"]),
            offload=raw["offload"],  # type: ignore[arg-type]
            activation_checkpointing=raw["checkpointing"] == "yes" and "no grad ckpt" not in raw["source"],
            **known,
        )
    )


def shape_of(raw: dict[str, str], *, scale: float = 1.0) -> ModelShape:
    """The model's published sizes; an ungated MLP with a fused activation and layer norms where it has those."""
    sizes = {name: int(raw[name]) for name in ("layers", "hidden", "heads", "kv_heads", "vocab") if raw[name]}
    shape = standard_shape(round(float(raw["params"]) * scale), **sizes)
    if raw["mlp"] != "gelu":
        return shape
    return replace(shape, mlp_tensors=2, rms_norm=False, intermediate=round(1.5 * shape.intermediate))


def _row(raw: dict[str, str], peak: Interval, *, scale: float) -> Row:
    published = float(raw["published_gib"]) * scale if raw["published_gib"] else None
    multiplier = _MULTIPLIERS.get(raw["as_method"], 2.0)
    return Row(
        name=f"{raw['model']} {raw['method']} x{raw['devices']} {raw['sequence_length']}x{raw['as_micro_batch']}",
        split=raw["split"],
        published_gib=published,
        device_gib=float(raw["device_gib"] or 80),
        peak_gib=peak,
        baseline_gib=multiplier * float(raw["params"]) * scale / 2**30 / int(raw["devices"]),
    )


def main() -> None:
    """Prints the rows and all scores."""
    for heading, sizes_known in (("with the models' sizes", True), ("by parameters alone", False)):
        print(f"\n{heading}\n{'':52}{'published':>10}{'middle':>8}{'low':>7}{'high':>7}{'error':>8}  fits")
        for row in score(sizes_known=sizes_known).rows:
            published = "OOM" if row.published_gib is None else f"{row.published_gib:.2f}"
            error = "" if row.error is None else f"{row.error:+.0%}"
            peak = f"{row.peak_gib.mid:8.2f}{row.peak_gib.low:7.1f}{row.peak_gib.high:7.1f}"
            verdict = ("yes" if row.fits else "no") + f" of {row.device_gib:g}"
            print(f"{row.name[:52]:52}{published:>10}{peak}{error:>8}  {verdict}  {row.split}")
        for split in ("given", "held_out"):
            found = score(split=split, sizes_known=sizes_known)
            print(
                f"{split}: median error {found.median_error:.1%} (usual multipliers {found.baseline_error:.1%}), "
                f"{found.coverage:.0%} inside the interval, wrong fits {found.wrong_fits}, "
                f"wrong refusals {found.wrong_refusals} of {len(found.rows)}"
            )


if __name__ == "__main__":
    main()
