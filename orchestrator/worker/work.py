"""What a worker does for a spec: it trains, or asks or measures a base as it is.

Only what is needed is loaded: the training loop brings DeepSpeed with it.
"""

from __future__ import annotations

from orchestrator.methods.registry import method_of
from orchestrator.runs.job import Outcome, TrainingJob, WorkerContext


def carry_out(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank of a job; raises what `loop.train`, `few_shot.ask` or `as_is.measure` raises."""
    if method_of(job.spec.method).trains:
        from orchestrator.worker.loop import train

        return train(job, context)
    if method_of(job.spec.method).asks_in_prompts:
        from orchestrator.worker.few_shot import ask

        return ask(job, context)
    from orchestrator.worker.as_is import measure

    return measure(job, context)
