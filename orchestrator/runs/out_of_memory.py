"""Out of memory: telling it from other failures, and the plan that needs less. Pure; the driver acts on it.

No torch and no Ray here: their errors are known by name and by what they say, also after they crossed processes as
text. A kernel that ends a process says nothing to it; it counts such deaths, and the driver compares.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from orchestrator.planning.run_plan import RunPlan

_KINDS = ("OutOfMemoryError", "MemoryError")
"""torch.OutOfMemoryError and ray.exceptions.OutOfMemoryError share a name; numpy's error is a MemoryError too."""

_SIGNS = re.compile(
    "|".join(
        (
            # PyTorch 2.13 (c10/core/impl/alloc_cpu.cpp): what Linux and Windows say.
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
            # The CUDA runtime, also through NCCL ("Cuda failure 2 'out of memory'"), and PyTorch's caching allocator.
            r"cuda[^\n]{0,40}out of memory",
            r"(CUBLAS|CUDNN|CUSPARSE)_STATUS_ALLOC_FAILED",
            r"cudaErrorMemoryAllocation",
            # C++ and libc.
            r"std::bad_alloc",
            r"Cannot allocate memory",
            # Ray 2.60's memory monitor, when it ends a worker.
            r"node running low on memory",
            r"killed due to memory pressure",
            # An error that crossed processes as text keeps the name of its class.
            r"\b(OutOf)?MemoryError\b",
        )
    ),
    re.IGNORECASE,
)
"""Not among them: "killed by the OOM killer", which Ray 2.60 names among the possible causes of every death."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out on a device or a host."""
    return any(_says_so(one) for one in _with_causes(error))


def kernel_kills() -> int | None:
    """Processes that this machine's kernel has ended for want of memory since it began; None where it does not say.

    Linux counts them in /proc/vmstat (4.13 and later), for all control groups and containers together.
    """
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def smaller_micro_batch(plan: RunPlan) -> RunPlan | None:
    """The plan with at most half the micro-batch and the same global batch; None when that is one sample already.

    Nothing else changes, so a checkpoint of the one plan is read under the other at every ZeRO stage. The sums behind a
    step are taken in another order and dropout draws other masks: losses agree, but not to the last bit.
    """
    if plan.micro_batch == 1:
        return None
    share = plan.micro_batch * plan.accumulation  # samples of one worker and step
    micro_batch = next(size for size in range(plan.micro_batch // 2, 0, -1) if share % size == 0)
    accumulation = share // micro_batch
    why = (
        f"micro_batch: {micro_batch} instead of {plan.micro_batch}, since memory ran out; accumulation: "
        f"{accumulation}, so that {plan.workers} x {micro_batch} x {accumulation} = {plan.global_batch} as before; "
        "dropout masks are drawn for each micro-batch, so losses are no longer bit-identical to those of the larger one"
    )
    return replace(
        plan,
        micro_batch=micro_batch,
        accumulation=accumulation,
        deepspeed={
            **plan.deepspeed,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
        },
        reasons=(*plan.reasons, why),
    )


def _says_so(error: BaseException) -> bool:
    if type(error).__name__ in _KINDS or isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return _SIGNS.search(str(error)) is not None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, newest first; a cycle ends it."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
