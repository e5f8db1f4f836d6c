"""The methods by the names that a spec gives them: a name without an object does not pass the type checker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, assert_never, get_args

from orchestrator.method_names import MethodName
from orchestrator.methods.adapter import LlamaAdapter
from orchestrator.methods.as_is import AsIs
from orchestrator.methods.base import Method, PricedMethod
from orchestrator.methods.few_shot import FewShot
from orchestrator.methods.full import Full
from orchestrator.methods.head import Head
from orchestrator.methods.ia3 import Ia3
from orchestrator.methods.last_layers import LastLayers
from orchestrator.methods.lora import Lora
from orchestrator.methods.peft_method import PeftMethod
from orchestrator.methods.prefix import Prefix
from orchestrator.methods.prompt_tuning import PromptTuning
from orchestrator.methods.qlora import QLora
from orchestrator.methods.scratch import Scratch

if TYPE_CHECKING:  # it takes 0.2 s to load, which `advise` need not wait for
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


def method_of(name: MethodName) -> Method:
    """The method that a spec names."""
    match name:
        case "full":
            return Full()
        case "last_layers":
            return LastLayers()
        case "lora":
            return Lora()
        case "qlora":
            return QLora()
        case "ia3":
            return Ia3()
        case "prefix":
            return Prefix()
        case "prompt_tuning":
            return PromptTuning()
        case "head":
            return Head()
        case "scratch":
            return Scratch()
        case "few_shot":
            return FewShot()
        case "as_is":
            return AsIs()
        case _:
            assert_never(name)


def method_behind(peft_type: str) -> PeftMethod | None:
    """The method that leaves adapters of a kind, as peft names it; None for kinds that none does."""
    match peft_type:
        case "LORA":
            return Lora()
        case "IA3":
            return Ia3()
        case "PREFIX_TUNING":
            return Prefix()
        case "PROMPT_TUNING":
            return PromptTuning()
        case _:
            return None


METHODS: tuple[Method, ...] = tuple(method_of(name) for name in get_args(MethodName))
"""All that `run` knows."""
_PRICED_ALONE: tuple[PricedMethod, ...] = (LlamaAdapter(),)
PRICED: Mapping[str, PricedMethod] = {
    name: method for method in (*METHODS, *_PRICED_ALONE) for name in (method.name, *method.aliases)
}
"""Methods that `estimate` knows, by all names they go by."""


def trainable_parameters(spec: RunSpec, shape: ModelShape) -> int:
    """How many weights a training has gradients for. Raises what the method's own count raises."""
    return method_of(spec.method).trainable_parameters(spec, shape)
