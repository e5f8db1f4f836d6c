"""One rank of two that counts the bytes DeepSpeed really holds: `python -m tests.zero_states RANK PORT`.

Rank 0 prints one JSON line for every precision, accumulation and ZeRO stage: bytes per weight of the model, after an
optimizer step and after the next backward pass. Run by `tests/test_memory.py`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch

from orchestrator.architectures.families import model_config
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.job import WorkerContext
from orchestrator.worker.engine import Engine, join_process_group
from orchestrator.worker.models import parameter_groups
from orchestrator.worker.objectives import objective_for
from tests import specs
from tests.training_runs import CLUSTER, NO_DROPOUT

WIDE = {**NO_DROPOUT, "n_embd": 256}
"""Two million weights, so that states are large beside everything else."""


CASES = [(precision, accumulation) for accumulation in (1, 2) for precision in ("fp32", "bf16")]


def plan_for(precision: str, stage: int, *, accumulation: int = 1) -> RunPlan:
    """Two workers, one sample each."""
    changes: dict[str, Any] = {"training__precision": precision, "deepspeed__zero_stage": stage}
    changes |= {"training__micro_batch": 1, "training__global_batch": 2 * accumulation, "resources__workers": 2}
    return make_plan(specs.spec(specs.PRETRAIN, model__overrides=WIDE, **changes), CLUSTER)


def config() -> dict[str, Any]:
    """The Hugging Face configuration of the model."""
    return model_config(specs.spec(specs.PRETRAIN, model__overrides=WIDE).model, sequence_length=32)


def main() -> None:
    """Trains one step in every precision and stage."""
    rank, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = int(sys.argv[1]), "127.0.0.1", sys.argv[2]
    context = WorkerContext(rank=rank, world_size=2, local_rank=rank)
    join_process_group(plan_for("fp32", 0), context)
    for precision, accumulation in CASES:
        for stage in range(4):
            stepped, backward = measure(plan_for(precision, stage, accumulation=accumulation), context)
            if rank == 0:
                found = {"precision": precision, "accumulation": accumulation, "stage": stage}
                found |= {"stepped": stepped, "backward": backward}
                print(json.dumps(found), flush=True)


def measure(plan: RunPlan, context: WorkerContext) -> tuple[float, float]:
    """Bytes per weight after a step, and after the backward pass that follows it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = config()
    before = set(storages())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    objective = objective_for("causal-lm")
    engine = Engine(model, plan=plan, groups=parameter_groups(model, 0.0), objective=objective, context=context)
    ids = torch.zeros(1, 32, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    engine.step([batch] * plan.accumulation, 1e-3, seeds=[0] * plan.accumulation)
    stepped = new_bytes(before)
    loss = objective.loss(engine._engine, batch)
    engine._engine.backward(loss)
    del loss
    backward = new_bytes(before)
    engine.close()
    return stepped / plan.parameters, backward / plan.parameters


def new_bytes(before: set[int]) -> int:
    """Bytes of all storages that were not there before."""
    return sum(size for address, size in storages().items() if address not in before)


def storages() -> dict[int, int]:
    """Size of every tensor storage of this process, by address."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


if __name__ == "__main__":
    main()
