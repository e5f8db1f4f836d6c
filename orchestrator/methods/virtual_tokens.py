"""What methods share that put virtual tokens before every sample: they have no place in the weights of the base.

Only models that continue texts learn by them. peft 0.21.2 leaves the head of a classifier as it was drawn beside them,
and virtual tokens in front move what a pooler or a rule for the last token reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.methods.base import Module
from orchestrator.methods.peft_method import PeftMethod
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec


class VirtualTokens(PeftMethod):
    """A method with virtual tokens."""

    can_merge = False

    def problem(self, spec: RunSpec) -> str | None:
        """See `Method`."""
        if task_of(spec.task).takes_virtual_tokens:
            return super().problem(spec)
        return f"method: {self.name} is for task: causal-lm; for task: {spec.task} use lora or ia3"

    def merged(self, model: Module) -> Module:
        """See `Method`: there is no such module."""
        raise NotImplementedError(f"{self.name} cannot be merged")
