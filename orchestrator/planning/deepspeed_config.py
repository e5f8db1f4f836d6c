"""The DeepSpeed configuration of a plan. Pure: a mapping to print, compare and hand to `deepspeed.initialize`.

Every key was checked against DeepSpeed 0.19.8 (`runtime/config.py`, `runtime/zero/config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.planning.memory import BUCKET_ELEMENTS, Layout
from orchestrator.spec import TrainingSpec

_NEVER = 10**9
"""Steps between DeepSpeed's own progress lines: ours are enough."""


def deepspeed_config(
    layout: Layout, *, training: TrainingSpec, accumulation: int, trainable: int, raw: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole configuration; `raw` keys of the user's are merged over it, block by block.

    There is no scheduler: the training loop sets the learning rate of every step itself, so that a resumed run, at
    any number of workers, goes on at the same rate.
    """
    config: dict[str, Any] = {
        "train_batch_size": layout.workers * layout.micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.gradient_clip,
        "optimizer": _optimizer(layout, training),
        "zero_optimization": _zero(layout, trainable),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
    }
    if layout.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if sums_in_fp32(precision=layout.precision, accumulation=accumulation) and layout.zero_stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if layout.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return _merged(config, raw)


def sums_in_fp32(*, precision: str, accumulation: int) -> bool:
    """Whether gradients of micro-batches are summed in fp32 though they are computed in bf16, which has 8 bits.

    DeepSpeed 0.19.8 does so on request under ZeRO 2 and 3. Without ZeRO it refuses, and under ZeRO-1 the request brings
    an optimizer of another class, whose checkpoints are others: there the training's engine sees to it.
    """
    return precision == "bf16" and accumulation > 1


def _optimizer(layout: Layout, training: TrainingSpec) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if layout.offload == "none":
        # PyTorch's AdamW: DeepSpeed's own compiles for 36 s on first use, and needs nvcc on a GPU. Offloaded states
        # keep DeepSpeed's CPUAdam, which it insists on.
        params["torch_adam"] = True
    return {"type": "AdamW", "params": params}


def _zero(layout: Layout, trainable: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    if layout.zero_stage == 0:
        return zero
    bucket = max(1, min(trainable, BUCKET_ELEMENTS))
    zero |= {
        "contiguous_gradients": True,
        "overlap_comm": layout.device == "cuda",  # on a CPU there is no second stream to overlap with
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if layout.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # else the model cannot be exported
    if layout.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`; mappings in both are merged, anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged
