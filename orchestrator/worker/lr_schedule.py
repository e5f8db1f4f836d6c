"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from orchestrator.spec import TrainingSpec
from orchestrator.spec_methods import LayerwiseSpec


def learning_rate(training: TrainingSpec, *, step: int, steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`; above zero at each.

    Warm-up rises linearly, from a first share of the peak to the peak at its last step. The step after it is the first
    of the decay, at the peak; cosine (Loshchilov & Hutter 2017, one cycle) or linear then falls so that the final
    fraction would be reached one step after the last, as with transformers' and PyTorch's schedules: the last step
    still learns where that fraction is 0.
    """
    peak = training.learning_rate
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if training.schedule == "constant":
        return peak
    done = (step - warmup_steps) / (steps - warmup_steps)
    shape = 1.0 - done if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    floor = training.final_learning_rate_fraction
    return peak * (floor + (1.0 - floor) * shape)


def layer_scale(layerwise: LayerwiseSpec, *, below_head: int, layers: int, step: int, steps: int) -> float:
    """What the learning rate of optimizer step `step` (from 0) of `steps` is multiplied by in a part of the model.

    `below_head` is 0 for the head, 1 for the top layer, and `layers` + 1 for the embeddings. A part that waits has 0.
    """
    joins_at = layerwise.unfreeze_fraction * steps * below_head / (layers + 1)
    return float(step >= joins_at) * layerwise.decay**below_head
