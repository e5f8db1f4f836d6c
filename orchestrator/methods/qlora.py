"""`method: qlora`: low-rank adapters beside a base whose weights have 4 bits (Dettmers et al. 2023).

Every linear module of the layers is stored as NF4 with doubly quantised scales, by bitsandbytes; embeddings, norms and
heads stay as they are. Quantising is done on the CPU from fp32, so it gives the same bits wherever it is repeated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.errors import ModelError
from orchestrator.methods.base import MethodCost, Module, Strategy
from orchestrator.methods.lora import Lora
from orchestrator.methods.peft_method import TRANSPOSED, adaptable, unwrap_whole_modules

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.method_names import MethodName
    from orchestrator.spec import RunSpec

QUANTIZATION = "quantization_config.json"
"""Beside an adapter: what `BitsAndBytesConfig.from_dict` makes the argument `quantization_config` of. In the base's own
configuration transformers 5.23 would take it to say that the weights in the file have 4 bits."""
_NF4: Mapping[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
"""4 bits, their scales quantised once more: settings of bitsandbytes' layers and weights."""
_ADDED = re.compile(r"\.(lora_[AB]|modules_to_save)\.")
"""In the names of modules that peft has put beside the base's."""


class QLora(Lora):
    """See the module."""

    name: ClassVar[MethodName] = "qlora"
    strategy: ClassVar[Strategy | None] = None
    is_advised = False
    title = "QLoRA"
    quantised: ClassVar[MethodName | None] = None
    cost = MethodCost(flops_per_weight=4.0, bytes_per_weight=1.0, keeps_inputs=True, keeps_rows=True, is_quantised=True)
    requires = "bitsandbytes"
    colour, marker = 8, "p"

    def problem(self, spec: RunSpec) -> str | None:
        """See `Method`."""
        if spec.lora.dora:
            return "lora.dora measures the rows of whole weights, and those of method: qlora have 4 bits: remove it"
        return super().problem(spec)

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: norms stay in the format of the run, which others cast up to fp32."""
        return replace(super().cost_of(spec, shape), keeps_rows=False)

    def largest_zero_stage(self, spec: RunSpec) -> int:
        """See `Method`: stage 3 would split weights whose scales are kept apart."""
        return 2

    def saves_adapter(self, spec: RunSpec) -> bool:
        """See `Method`: a merged model would be four times as large as what was trained."""
        return spec.export != "merged"

    def saves_merged(self, spec: RunSpec) -> bool:
        """See `Method`."""
        return spec.export in ("merged", "both")

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`: quantised modules all keep their weights as (outputs, inputs)."""
        config = super().peft_config(model, spec, shared)
        config.fan_in_fan_out = False
        return config

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """See `PeftMethod`."""
        return super().adapt(_quantised(model), spec)

    def merged(self, model: Module) -> Module:
        """See `Method`: in fp32, since adding to weights of 4 bits would round them anew."""
        for parent, own, layer, delta in _quantised_modules(model):
            setattr(parent, own, _plain(layer, delta, transposed=str(model.config.model_type) in TRANSPOSED))
        unwrap_whole_modules(model)
        base = model.get_base_model()
        base.is_loaded_in_4bit = False
        return base

    def save_adapter(self, model: Module, folder: Path, *, base: str) -> None:
        """See `PeftMethod`; a file beside it says how transformers quantises the base in the same way."""
        super().save_adapter(model, folder, base=base)
        (folder / QUANTIZATION).write_text(json.dumps(_how_it_is_quantised(model), indent=1))

    def load_adapter(self, model: Module, folder: Path) -> Module:
        """See `PeftMethod`; the base in fp32."""
        return super().load_adapter(_quantised(model), folder)


def _quantised(model: Module) -> Module:
    """The model with 4-bit weights in its layers. Raises ModelError where there are none to quantise."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    names = adaptable(model)
    if not names:
        raise ModelError(
            "method: qlora found no linear module in the layers of this architecture",
            got=type(model).__name__,
            do="use method: full",
        )
    for name in names:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(name)
        weight = module.weight.data if hasattr(module, "in_features") else module.weight.data.T
        outputs, inputs = weight.shape
        layer: Any = Linear4bit(inputs, outputs, bias=False, **_NF4)  # type: ignore[no-untyped-call]
        # Else bitsandbytes 0.50 packs weights anew at the first evaluation on some CPUs: other roundings from there on,
        # and an error where the width is no multiple of 64 (`findings/bitsandbytes-cpu-evaluation.sh`).
        layer.support_avx512bf16_for_cpu = False
        layer.weight = Params4bit(weight.contiguous(), requires_grad=False, module=layer, **_NF4)
        layer.bias = module.bias
        setattr(model.get_submodule(parent), own, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # what peft looks at
    return model


def _quantised_modules(model: Module) -> Iterator[tuple[Module, str, Module, Any]]:
    """(parent, name in it, quantised module, what its adapter adds to its weight or None), of all of them."""
    from bitsandbytes.nn.modules import Linear4bit
    from peft.tuners.lora import LoraLayer

    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if isinstance(module, LoraLayer):
            yield modules[parent], own, module.get_base_layer(), module.get_delta_weight("default")
        elif isinstance(module, Linear4bit) and not isinstance(modules[parent], LoraLayer):
            yield modules[parent], own, module, None


def _plain(layer: Module, delta: Any, *, transposed: bool) -> Module:
    """An ordinary module in fp32 that computes what a quantised one with its adapter does."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if delta is not None:
        weight = weight + delta.float()
    outputs, inputs = weight.shape
    plain = Conv1D(outputs, inputs) if transposed else torch.nn.Linear(inputs, outputs, bias=layer.bias is not None)
    plain.weight.data = (weight.T if transposed else weight).contiguous()
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.float()
    return plain


def _how_it_is_quantised(model: Module) -> dict[str, Any]:
    """By what transformers loads the base as it was while its adapter was trained."""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    whole = {
        name.replace(".original_module", "")
        for name, module in model.get_base_model().named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and not _ADDED.search(name)
    }
    dtype = next(weight.dtype for weight in model.parameters() if weight.requires_grad)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=_NF4["quant_type"],
        bnb_4bit_use_double_quant=_NF4["compress_statistics"],
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(whole),
    )
    return dict(config.to_dict())
