"""The methods by the names that a spec gives them: a name without an object does not pass the type checker."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from orchestrator.methods.base import Method
from orchestrator.methods.full import Full
from orchestrator.methods.head import Head
from orchestrator.methods.lora import Lora
from orchestrator.methods.scratch import Scratch

if TYPE_CHECKING:  # it takes 0.2 s to load, which `advise` need not wait for
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import MethodName, RunSpec

_FULL, _HEAD, _LORA, _SCRATCH = Full(), Head(), Lora(), Scratch()


def method_of(name: MethodName) -> Method:
    """The method that a spec names."""
    match name:
        case "full":
            return _FULL
        case "head":
            return _HEAD
        case "lora":
            return _LORA
        case "scratch":
            return _SCRATCH
        case _:
            assert_never(name)


def trainable_parameters(spec: RunSpec, shape: ModelShape) -> int:
    """How many weights a training has gradients for. Raises what the method's own count raises."""
    return method_of(spec.method).trainable_parameters(spec, shape)


METHODS: tuple[Method, ...] = (_FULL, _LORA, _HEAD, _SCRATCH)
"""All of them."""
