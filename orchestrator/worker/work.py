"""What a worker does for a spec: it trains, or asks a base as it is.

Only what is needed is loaded: the training loop brings DeepSpeed with it.
"""

from __future__ import annotations

from orchestrator.methods.registry import method_of
from orchestrator.runs.job import Outcome, TrainingJob, WorkerContext


def carry_out(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank of a job; raises what `loop.train` or `few_shot.ask` raises."""
    if method_of(job.spec.method).trains:
        from orchestrator.worker.loop import train

        return train(job, context)
    from orchestrator.worker.few_shot import ask

    return ask(job, context)
