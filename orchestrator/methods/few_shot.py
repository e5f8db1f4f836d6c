"""`method: few_shot`: the base as it is, asked with examples in its prompt (Brown et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.architectures.families import ENCODERS
from orchestrator.errors import ModelError
from orchestrator.methods.base import MethodCost
from orchestrator.methods.untrained import Untrained
from orchestrator.tasks.base import LearntTask
from orchestrator.tasks.names import CONTINUED_TEXT
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec

PROMPT, SCORES = "prompt.txt", "scores.npy"
"""In a run folder: the prompt with places for a row and its class, and the scores, (held-out rows, classes)."""


class FewShot(Untrained):
    """See the module."""

    name = "few_shot"
    cost = MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0)
    asks_in_prompts = True
    colour, marker = 9, "*"

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: keys and values of all layers are kept, though nothing is for a backward pass."""
        kept = 2 * shape.kv_heads * shape.head_dim * shape.layers
        return MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0, kept_per_token=kept)

    def model_task(self, spec: RunSpec) -> LearntTask:
        """See `Method`: the classes are read off a language model."""
        return task_of(CONTINUED_TEXT)

    def check_architecture(self, kind: str) -> None:
        """See `Method`."""
        if kind in ENCODERS:
            raise ModelError(
                f"method: few_shot asks a model that continues a text, and {kind} sees the whole text at once",
                got=f"model_type {kind}",
                do="use a base such as gpt2 or llama, or method: head, lora or full for this one",
            )

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """See `Untrained`."""
        if not task_of(spec.task).is_classification:
            yield f"answers with a class: set task=text-classification, or another method for task: {spec.task}"
        yield from super().problems(spec)
