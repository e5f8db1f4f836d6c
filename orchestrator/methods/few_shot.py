"""`method: few_shot`: the base as it is, asked with examples in its prompt (Brown et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.architectures.families import ENCODERS
from orchestrator.errors import ModelError
from orchestrator.methods.base import Method, MethodCost
from orchestrator.tasks.base import LearntTask
from orchestrator.tasks.names import CONTINUED_TEXT
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class FewShot(Method):
    """See the module."""

    name = "few_shot"
    cost = MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0)
    trains = False
    recomputes = False
    can_merge = False
    colour, marker = 9, "*"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return 0

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return 0

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: keys and values of all layers are kept, though nothing is for a backward pass."""
        kept = 2 * shape.kv_heads * shape.head_dim * shape.layers
        return MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0, kept_per_token=kept)

    def largest_zero_stage(self, spec: RunSpec) -> int:
        """See `Method`."""
        return 0

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

    def problem(self, spec: RunSpec) -> str | None:
        """See `Method`."""
        settings = spec.deepspeed
        for wrong, sentence in (
            (
                not task_of(spec.task).is_classification,
                f"answers with a class: set task=text-classification, or another method for task: {spec.task}",
            ),
            (spec.export != "auto", f"trains no model to export: remove export: {spec.export}"),
            (spec.retain is not None, "forgets nothing: remove retain"),
            (spec.layerwise.is_on, "trains no layers: remove layerwise"),
            (spec.search is not None, "has no training to search over: remove search, and compare runs instead"),
            (
                settings.zero_stage not in ("auto", 0) or settings.offload not in ("auto", "none"),
                "keeps the base whole on each device: set deepspeed=auto",
            ),
            (spec.checkpoint.in_a_bucket, "keeps its answers in a folder: set checkpoint.storage to a shared one"),
        ):
            if wrong:
                return f"method: few_shot {sentence}"
        return None
