"""Fields of a spec that turn a training into a search of trainings; `search_space` makes its trials of them.

`spec` puts them into the `RunSpec`; rules between these and other fields stand there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from orchestrator.spec_numbers import MOST_SMALL, Count, Seed, SmallCount
from orchestrator.spec_survival import Block


class SearchSpec(Block):
    """A search over fields of this spec: each point becomes a training of its own."""

    space: dict[str, dict[str, Any]]
    """Field path to one of `{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}`, `{loguniform: [low, high]}`,
    `{int_uniform: [low, high]}`. Grid values are all tried; the others are drawn. A grid or choice may also map each
    value to a space of its own: `{grid: {full: {training.learning_rate: {...}}, lora: {...}}}`."""
    samples: SmallCount = 1
    """Draws for every grid point."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops the worse trials early (Li et al. 2020): all are evaluated and compared after the same steps.
    A trial with `training.eval_every_steps: null` takes no part. `none` lets all of them finish."""
    metric: str | None = None
    """Metric that ranks trials, at the last evaluation of each; none given is `eval/accuracy` for classification,
    `eval/bits_per_byte` for causal and `eval/loss` for masked language models."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether the metric should be small or large; `auto` knows the metrics of this project."""
    grace_steps: Count | None = None
    """Steps that ASHA lets every trial run; fewer than the first evaluation of any trial, or none given, is that."""
    reduction_factor: Annotated[int, Field(ge=2, le=MOST_SMALL)] = 3
    """ASHA keeps one in so many at each rung."""
    max_concurrent: Literal["auto"] | SmallCount = "auto"
    """Trials at a time; `auto` is what the cluster's devices allow."""
    seed: Seed = 0
    """Seeds the draws."""
