"""`method: last_layers`: the layers at the top, and all that lies behind them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.architectures.weight_names import depth_of
from orchestrator.errors import ModelError
from orchestrator.method_names import LAST_LAYERS
from orchestrator.methods.base import ALL_WEIGHTS, Method, MethodCost, Module

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class LastLayers(Method):
    """See the module."""

    name = "last_layers"
    cost = replace(ALL_WEIGHTS, trains_all=False)
    colour, marker = 5, "X"

    def usual_cost(self, shape: ModelShape) -> MethodCost:
        """See `PricedMethod`."""
        return _cost(shape, LAST_LAYERS)

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return _trained(shape, min(LAST_LAYERS, shape.layers))

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`."""
        return _cost(shape, spec.last_layers.layers)

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`. Raises ModelError where there are not so many layers, or they share their weights."""
        if shape.used_again:
            raise ModelError(
                f"the layers of {shape.model_type} share their weights, so the last ones cannot be trained alone",
                got="method: last_layers",
                do="use method: head, lora or full",
            )
        if spec.last_layers.layers > shape.layers:
            raise ModelError(
                "the model has fewer layers",
                got=f"last_layers.layers: {spec.last_layers.layers}",
                allowed=f"1 to {shape.layers}",
                do="use method: full to train all of them",
            )
        return _trained(shape, spec.last_layers.layers)

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """Leaves only the last layers and what lies behind them trainable; an output layer tied to the token table is
        part of that, and stays as it is."""
        depths = depths_of(model)
        first = max(depth for depth in depths.values() if depth is not None) + 1 - spec.last_layers.layers
        for name, parameter in model.named_parameters():
            depth = depths[name]
            parameter.requires_grad = depth is None or depth >= first
        return model


def depths_of(model: Module) -> dict[str, int | None]:
    """`depth_of` each parameter; a token table lies before the layers also where the output layer has given the name of
    both, as in CamemBERT."""
    table = model.get_input_embeddings().weight
    return {name: -1 if weight is table else depth_of(name) for name, weight in model.named_parameters()}


def _cost(shape: ModelShape, layers: int) -> MethodCost:
    share = min(1.0, layers / shape.layers)
    return replace(
        LastLayers.cost, flops_per_weight=2 + 4 * share, bytes_per_weight=2 + 4 * share, backward_share=share
    )


def _trained(shape: ModelShape, layers: int) -> int:
    """Weights of the last layers and of what lies behind them."""
    if not shape.weights:  # an architecture we do not know by name: all its layers are alike
        output = 0 if shape.tied or shape.head_parameters else shape.vocab * shape.hidden
        body = shape.parameters - shape.embedding_parameters - shape.head_parameters - output
        return body * layers // shape.layers + shape.head_parameters + output
    depths = {name: depth_of(name) for name in shape.weights}
    first = shape.layers - layers
    return sum(
        math.prod(size) for name, size in shape.weights.items() if (depth := depths[name]) is None or depth >= first
    )
