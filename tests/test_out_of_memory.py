from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ClusterError
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.out_of_memory import is_out_of_memory, smaller_micro_batch
from tests.specs import PRETRAIN, spec
from tests.training_runs import CLUSTER

PLAN = make_plan(spec(PRETRAIN, resources__workers=2, training__global_batch=16), CLUSTER)


def planned(workers: int, micro_batch: int, accumulation: int) -> RunPlan:
    batch = workers * micro_batch * accumulation
    sizes = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    return replace(
        PLAN,
        workers=workers,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=batch,
        deepspeed={**PLAN.deepspeed, **sizes},
    )


class RemoteError(Exception):
    """A failure of a worker as text, which is how errors that do not pickle reach the driver."""


class OutOfMemoryError(RuntimeError):
    """The name that torch and Ray both give to theirs."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("whatever it says"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        # Each as its library writes it: PyTorch 2.13 on Linux and on Windows, CUDA, cuBLAS, NCCL 2.27, libstdc++.
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error. Last error:\nCuda failure 2 'out of memory'"),
        RuntimeError("std::bad_alloc"),
        # Ray 2.60's memory monitor.
        RemoteError("Task was killed due to the node running low on memory."),
        RemoteError("1 worker(s) were killed due to the node running low on memory. OOM kill reason: ..."),
        RemoteError("OutOfMemoryError", "", "loop.py:12 step: loss.backward()", False),
        RemoteError("MemoryError", "", "data.py:3 batch", False),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:40]}",
)
def test_every_library_s_way_to_say_that_memory_ran_out_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert is_out_of_memory(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x32 and 64x8)"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        KeyError("memory"),
        # Ray says this of every worker that died without a word, of a segmentation fault too.
        RemoteError(
            "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) "
            "the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or "
            "(3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
        ),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:40]}",
)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_cause_of_an_error_counts() -> None:
    error = ClusterError("training failed on rank 3")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def test_errors_that_cause_each_other_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


@given(st.integers(1, 5), st.integers(1, 48), st.integers(1, 12))
def test_half_the_micro_batch_keeps_the_global_batch(workers: int, micro_batch: int, accumulation: int) -> None:
    plan = planned(workers, micro_batch, accumulation)
    smaller = smaller_micro_batch(plan)
    if micro_batch == 1:
        assert smaller is None
        return
    assert smaller is not None
    assert 1 <= smaller.micro_batch <= micro_batch // 2
    assert smaller.workers * smaller.micro_batch * smaller.accumulation == plan.global_batch == smaller.global_batch
    assert smaller.deepspeed["train_micro_batch_size_per_gpu"] == smaller.micro_batch
    assert smaller.deepspeed["gradient_accumulation_steps"] == smaller.accumulation
    assert smaller.deepspeed["train_batch_size"] == plan.global_batch


def test_an_even_micro_batch_is_halved_and_a_prime_one_takes_what_divides() -> None:
    assert [planned_down(2, 8, 3), planned_down(1, 7, 1), planned_down(1, 7, 3)] == [(4, 6), (1, 7), (3, 7)]


def planned_down(workers: int, micro_batch: int, accumulation: int) -> tuple[int, int]:
    smaller = smaller_micro_batch(planned(workers, micro_batch, accumulation))
    assert smaller is not None
    return smaller.micro_batch, smaller.accumulation


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_but_the_split_of_the_batch_changes_at_any_zero_stage(stage: int) -> None:
    plan = make_plan(
        spec(PRETRAIN, resources__workers=2, training__global_batch=16, deepspeed={"zero_stage": stage}), CLUSTER
    )
    smaller = smaller_micro_batch(plan)
    assert smaller is not None
    asked = make_plan(
        spec(
            PRETRAIN,
            resources__workers=2,
            training__global_batch=16,
            training__micro_batch=plan.micro_batch // 2,
            deepspeed={"zero_stage": stage},
        ),
        CLUSTER,
    )
    assert smaller.deepspeed == asked.deepspeed, "as if the user had set training.micro_batch"
    assert "no longer bit-identical" in smaller.reasons[-1]
    same = replace(plan, micro_batch=1, accumulation=1, deepspeed={}, reasons=())
    assert replace(smaller, micro_batch=1, accumulation=1, deepspeed={}, reasons=()) == same


_STEP = """
import json, resource, sys
from dataclasses import replace
import torch
from torch import nn
from orchestrator.runs.out_of_memory import is_out_of_memory, smaller_micro_batch
from tests.test_out_of_memory import planned

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 65536), nn.GELU(), nn.Linear(65536, 8))
samples = torch.randn(256, 64)


def gradient(plan):
    model.zero_grad()
    for part in samples.split(plan.micro_batch):
        (model(part).square().mean() / plan.accumulation).backward()
    return model[0].weight.grad.clone()


plan = planned(1, 256, 1)
expected = gradient(planned(1, 16, 16))
mapped_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
tried = []
for more_mib in range(384, -1, -32):  # what a step takes depends on the machine's kernels: the most that is too little
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + (more_mib << 20), resource.RLIM_INFINITY))
    while True:
        try:
            found = gradient(plan)
            break
        except Exception as error:
            tried.append({"micro_batch": plan.micro_batch, "error": str(error), "known": is_out_of_memory(error)})
        plan = smaller_micro_batch(plan)
    if tried:
        break
print(json.dumps({
    "tried": tried, "micro_batch": plan.micro_batch, "accumulation": plan.accumulation,
    "difference": float((found - expected).abs().max() / expected.abs().max()),
}))
"""


@pytest.mark.slow
def test_a_step_that_runs_into_the_memory_limit_passes_with_smaller_micro_batches() -> None:
    # A Ray that an earlier test has started leaves its settings for malloc, which keep freed memory beyond the limit.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command, folder = [sys.executable, "-c", _STEP], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tried"], "some limit is meant to stop the first try"
    assert all(each["known"] for each in result["tried"]), result["tried"]
    assert "DefaultCPUAllocator: can't allocate memory" in result["tried"][0]["error"]
    assert 1 < result["micro_batch"] < 256
    assert result["micro_batch"] * result["accumulation"] == 256
    assert result["difference"] < 1e-5
