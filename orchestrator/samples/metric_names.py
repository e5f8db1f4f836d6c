"""The names of all metrics that a training logs, known before it runs. A slow test compares them with what runs log.

In MLflow each stands against the optimizer step. Called by `plan`.
"""

from __future__ import annotations

from orchestrator.errors import SpecError
from orchestrator.methods.registry import method_of
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of

_COSTS = ("cost/gpu_hours", "cost/flops", "cost/usd")
_BESIDE_THE_PLAN = ("predicted/gpu_hours", "measured/gpu_hours", "predicted/peak_gib", "measured/peak_gib")
EVERY_STEP = (
    *("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "train/tokens"),
    *_COSTS,
)
AT_THE_END = (
    *_BESIDE_THE_PLAN,
    *("predicted/tokens_per_second", "measured/tokens_per_second", "measured/step_s", "measured/goodput"),
    *("measured/steps", "data/train_samples", "data/train_tokens"),
)
AT_CHECKPOINTS = ("checkpoint/interval_steps", "checkpoint/lost_s")
"""With `checkpoint.every_steps: auto`."""

GAP = "eval/generalization_gap"
"""Held-out loss less that on training samples, of the same weights and without dropout: it grows with memorising."""
RETAINED_LOSS, FORGETTING = "eval/retained_loss", "eval/forgetting"
"""With `retain.data`: the loss on the held-out general data, in the unit of `eval/loss`, and by how much it is above
its value before the first step (0 at the start; positive where something was forgotten)."""


TEST = "test/"
"""Of the figures of the model that is left, on `data.test`."""


def of_test_set(metric: str) -> str:
    """What a metric of an evaluation is called where it is one of the test set: `eval/loss` is `test/loss`."""
    return TEST + metric.removeprefix("eval/")


def _at_evaluations(spec: RunSpec) -> tuple[str, ...]:
    general = () if spec.of_general_data is None else (RETAINED_LOSS, FORGETTING)
    return (*task_of(spec.task).metrics, GAP, *general)


OF_ASKING = (*_COSTS, *_BESIDE_THE_PLAN)
"""With a method that trains nothing."""


def logged_metrics(spec: RunSpec) -> tuple[str, ...]:
    """What a run of this spec logs."""
    if not method_of(spec.method).trains:
        further = () if method_of(spec.method).asks_in_prompts else task_of(spec.task).further_metrics
        return (*task_of(spec.task).metrics, *further, *OF_ASKING)
    saving = AT_CHECKPOINTS if spec.checkpoint.every_steps == "auto" else ()
    task = task_of(spec.task)
    test = () if spec.data.test is None else map(of_test_set, (*task.metrics, *task.further_metrics))
    return (*EVERY_STEP, *_at_evaluations(spec), *AT_THE_END, *saving, *test)


def check_goal(spec: RunSpec) -> None:
    """Raises SpecError when a search is to be ranked by a metric that its trials do not have at an evaluation."""
    known = (*_at_evaluations(spec), *EVERY_STEP)
    if spec.search is not None and spec.goal.metric not in known:
        raise SpecError(
            f"search.metric: trials of task {spec.task} have no such metric at an evaluation",
            got=spec.goal.metric,
            allowed=", ".join(known),
        )
