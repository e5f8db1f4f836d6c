"""`method: head`: a classification head on frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.architectures.weight_names import head_modules, is_in_head
from orchestrator.errors import ModelError
from orchestrator.methods.base import Method, MethodCost, Module, Strategy

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class Head(Method):
    """See the module."""

    name = "head"
    aliases = ("frozen", "features")
    strategy: ClassVar[Strategy | None] = "features"
    cost = MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0)
    is_advised = True
    keeps_features = True
    colour, marker = 2, "^"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.head_parameters

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`: as in the runs on film reviews that `full_learning_rate` rests on."""
        return 3e-3

    def problem(self, spec: RunSpec) -> str | None:
        """See `Method`."""
        if not spec.models_language:
            return super().problem(spec)
        return f"method: head trains a new classification head; for task: {spec.task} use full or lora"

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return shape.head_parameters

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """Leaves only the modules behind the backbone trainable; dropout inside of what is frozen stays off, so that a
        row has the same features in every pass, kept or not."""
        model_type, trainable = str(model.config.model_type), 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad = is_in_head(name, model_type)
            trainable += parameter.requires_grad
        if not trainable:
            raise ModelError(
                "method: head found no head to train in this architecture",
                got=type(model).__name__,
                allowed=f"a module named {' or '.join(head_modules(model_type))}",
                do="use method: lora or full",
            )
        _keep_in_evaluation(getattr(model, model.base_model_prefix))
        return model


def _keep_in_evaluation(module: Module) -> None:
    """What of a backbone is frozen stays in evaluation when the model is set to training."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        for child in module.children():
            _keep_in_evaluation(child)
    else:
        module.eval()
        module.train = lambda mode=True: module
