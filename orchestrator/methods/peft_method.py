"""What the methods that peft carries out share: which modules there are to adapt, and which are trained whole besides.

A classification head is new, so it is trained whole; so are `MASKED_LM_TRANSFORMS`, without which a sentence encoder
comes.
"""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.architectures.masked_lm_heads import MASKED_LM_TRANSFORMS
from orchestrator.architectures.weight_names import is_in_head
from orchestrator.methods.base import FROZEN_BACKBONE, Method, Module
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec

TRANSPOSED = ("gpt2",)
"""Architectures whose projections are `Conv1D` modules, which keep their weights as (inputs, outputs)."""
_UP_TO_LAYER = re.compile(r"^.*\.\d+\.")


class PeftMethod(Method):
    """Small weights beside a frozen backbone, by a configuration of peft."""

    cost = FROZEN_BACKBONE
    has_adapter = True

    @abstractmethod
    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """How many weights stand beside the backbone. Raises ModelError where there is nothing to adapt."""

    @abstractmethod
    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """The method's configuration for a module; `shared` are `task_type` and `modules_to_save`."""

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return self.adapter_parameters(spec, shape) + whole_parameters(spec, shape)

    def trains_new_masked_lm_head(self, model_type: str) -> bool:
        """See `Method`."""
        return model_type in MASKED_LM_TRANSFORMS

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """The model with its adapters, drawn by `training.seed`."""
        import torch
        from peft import get_peft_model

        # Under ZeRO-3 only rank 0 has drawn the base's new weights, so the streams are apart by now.
        torch.manual_seed(spec.training.seed)
        task = task_of(spec.task)
        whole = task.trained_beside_adapters(str(model.config.model_type))
        shared = {"task_type": task.peft_type, "modules_to_save": None if whole is None else list(whole)}
        adapted: Module = get_peft_model(model, self.peft_config(model, spec, shared))
        return adapted

    def merged(self, model: Module) -> Module:
        """See `Method`."""
        with warnings.catch_warnings():  # peft warns of a tied token table also where there is no output layer
            warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
            unwrap_whole_modules(model)
            return model.merge_and_unload()

    def save_adapter(self, model: Module, folder: Path, *, base: str) -> None:
        """Writes what an adapted module has beside the base, a folder or a hub name: as peft lays it out, with the
        modules that were trained whole."""
        for config in model.peft_config.values():
            config.base_model_name_or_path = base
        model.save_pretrained(folder, save_embedding_layers=False)  # else peft would ask the hub about the base

    def load_adapter(self, model: Module, folder: Path) -> Module:
        """A base with the adapter that `save_adapter` wrote."""
        from peft import PeftModel

        loaded: Module = PeftModel.from_pretrained(model, str(folder))
        return loaded


def unwrap_whole_modules(model: Module) -> None:
    """Puts the modules that were trained whole in their places.

    Left to peft 0.21.2, IA3 does so only where such a module has a weight itself: not BERT's pooler.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, wrapper.modules_to_save[wrapper.active_adapter])


def whole_parameters(spec: RunSpec, shape: ModelShape) -> int:
    """Weights of the modules that are trained whole beside adapters."""
    task = task_of(spec.task)
    if not task.hides_tokens:
        return shape.head_parameters
    transforms = task.trained_beside_adapters(shape.model_type) or ()
    return sum(
        math.prod(size) for name, size in shape.weights.items() if any(f".{part}." in f".{name}" for part in transforms)
    )


def within_layer(name: str) -> str:
    """A module's name inside of its layer: `bert.encoder.layer.0.output.dense` -> `output.dense`."""
    return _UP_TO_LAYER.sub("", name)


def is_within_layer(name: str) -> bool:
    """Whether a module or weight is inside of a layer, by its full name."""
    return _UP_TO_LAYER.match(name) is not None


def linear_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear modules of all layers, by full name; empty for an unknown architecture."""
    found = {
        name.removesuffix(".weight"): (size[1], size[0])
        for name, size in shape.weights.items()
        if len(size) == 2 and is_within_layer(name)
    }
    if shape.model_type in TRANSPOSED:
        return {name: (inputs, outputs) for name, (outputs, inputs) in found.items()}
    return found


def adaptable(model: Module) -> list[str]:
    """Full names of the linear modules of all layers of a module; the task's head lies behind them."""
    import torch

    model_type = str(model.config.model_type)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and is_within_layer(name)
        and not is_in_head(name, model_type)
    ]


def modules_within_layers(model: Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the modules of all layers that are called so inside of their layer."""
    return [name for name, _ in model.named_modules() if is_within_layer(name) and within_layer(name) in wanted]
