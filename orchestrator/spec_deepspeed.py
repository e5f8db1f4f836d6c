"""Fields of a spec that DeepSpeed gets, beside those that the plan writes. `spec` puts them into the `RunSpec`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from orchestrator.credentials import public
from orchestrator.spec_survival import Block

Offload = Literal["auto", "none", "optimizer", "all"]

PLANNED_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)
"""DeepSpeed keys the plan writes itself, each from a field of the spec."""


def _not_finite(values: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the numbers in nested values that are infinite or none."""
    if isinstance(values, float) and not math.isfinite(values):
        yield path.removeprefix(".")
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from _not_finite(value, f"{path}.{key}")


def step_elsewhere(raw: dict[str, Any]) -> str | None:
    """The DeepSpeed key, if any, that moves Adam's step out of the optimizer (DeepSpeed 0.19.8: ZenFlow, SuperOffload's
    own process, and the second optimizer that a partial offload has on the GPU)."""
    zero = raw.get("zero_optimization")
    if not isinstance(zero, dict):
        return None
    if zero.get("zenflow"):
        return "zero_optimization.zenflow"
    offload = zero.get("offload_optimizer")
    if not isinstance(offload, dict):
        return None
    replaced = "super_offload" if offload.get("super_offload") else "ratio" if offload.get("ratio", 1) != 1 else None
    return replaced and f"zero_optimization.offload_optimizer.{replaced}"


class DeepSpeedSpec(Block):
    """What the plan leaves to the user. Written as `auto`, a mapping, or the path of a JSON file."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage (Rajbhandari et al. 2020): 1 shards optimizer states, 2 also gradients, 3 also weights."""
    offload: Offload = "auto"
    """What moves to host memory: nothing, optimizer states, or optimizer states and weights (`all` needs stage 3)."""
    raw: dict[str, Any] = Field(default_factory=dict)
    """Any other DeepSpeed keys, passed through."""

    @model_validator(mode="before")
    @classmethod
    def _from_mapping(cls, value: Any) -> Any:
        if value == "auto":
            return {}
        if not isinstance(value, dict):
            return value
        own = {"zero_stage", "offload", "raw"}
        merged = {key: value[key] for key in own & value.keys()}
        given = merged.get("raw", {})
        if not isinstance(given, dict):
            raise ValueError(f"deepspeed.raw is a mapping of DeepSpeed keys; got {given!r:.100}")
        raw = {**given, **{key: item for key, item in value.items() if key not in own}}
        stage = (
            raw.get("zero_optimization", {}).get("stage") if isinstance(raw.get("zero_optimization"), dict) else None
        )
        if stage is not None and merged.setdefault("zero_stage", stage) != stage:
            raise ValueError(
                f"deepspeed.zero_stage is {merged['zero_stage']} and "
                f"deepspeed.zero_optimization.stage is {stage}: keep one"
            )
        return {**merged, "raw": raw}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for path in _not_finite(self.raw):
            raise ValueError(f"deepspeed.{path} is no finite number: correct it")
        if public(self.raw) != self.raw:
            raise ValueError(
                f"deepspeed holds credentials ({public(self.raw)}), which checkpoints and logs of workers would "
                "repeat: remove them, and give each node an environment variable, such as WANDB_API_KEY"
            )
        planned = [key for key in PLANNED_DEEPSPEED_KEYS if key in self.raw]
        if planned:
            raise ValueError(
                f"the plan writes {', '.join(planned)} itself: use training.global_batch, micro_batch, precision, "
                "gradient_clip, learning_rate and schedule instead"
            )
        if self.offload == "all" and self.zero_stage not in ("auto", 3):
            raise ValueError("deepspeed.offload: all moves weights and needs zero_stage: 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("deepspeed.offload: optimizer needs zero_stage: 1, 2 or 3")
        return self
