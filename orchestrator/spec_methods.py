"""Fields of a spec that say how a model is adapted: the name of the method, and a block of settings for each.

`spec` puts them into the `RunSpec`. What a method does with its settings stands in its file in `methods/`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from orchestrator.method_names import LAST_LAYERS, PREFIX_TOKENS, PROMPT_TOKENS, MethodName
from orchestrator.spec_numbers import Rate, ShotCount, SmallCount
from orchestrator.spec_survival import Block

Export = Literal["auto", "merged", "adapter", "both"]
TEXT, LABEL = "{text}", "{label}"
"""What stands for a row's text and for its class in `few_shot.template`."""


class LoraSpec(Block):
    """Low-rank adapters (Hu et al. 2021), used by `method: lora` and `qlora`."""

    rank: SmallCount = 8
    """Rank r of each adapter."""
    alpha: Rate = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each adapter."""
    targets: Literal["all-linear", "attention"] | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: every linear layer, the attention's queries and values as Hu et al. (2021) took, or
    those of these names. Attention alone learns less at equally many weights ("LoRA Without Regret" 2025)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each row of a weight apart from its direction (Liu et al. 2024); not under ZeRO stage 3."""

    @field_validator("targets", mode="wrap")
    @classmethod
    def _a_choice_or_names(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            raise ValueError(
                f"lora.targets is all-linear, attention, or a list of names of modules; got {value!r}"
            ) from error


class LastLayersSpec(Block):
    """Used by `method: last_layers`."""

    layers: SmallCount = LAST_LAYERS
    """How many layers are trained, from the top, with all that lies behind them."""


class PrefixSpec(Block):
    """Used by `method: prefix`."""

    tokens: SmallCount = PREFIX_TOKENS
    """Keys and values that are learnt in every layer: 50 in peft's comparison, 10 to 200 in Li and Liang (2021)."""


class PromptTuningSpec(Block):
    """Used by `method: prompt_tuning`."""

    tokens: SmallCount = PROMPT_TOKENS
    """Embeddings that are learnt in front of every sample: 100 in Lester et al. (2021)."""


class FewShotSpec(Block):
    """What `method: few_shot` asks the base: an instruction, examples with their classes, and a row without one."""

    examples: ShotCount = 8
    """Training rows that the prompt shows, as many of each class as can be; 0 asks without any. Drawn by
    `training.seed`."""
    template: str = f"Text: {TEXT}\nLabel: {LABEL}"
    """How a row is written; the examples and the row that is asked about stand a blank line apart."""
    instruction: str = ""
    """What the prompt begins with."""
    calibrate: bool = False
    """Divide the probability of each class by what it has behind texts without content, so that a preference of the
    prompt for some class goes (Zhao et al. 2021, "Calibrate Before Use")."""
    words: dict[str, str] = Field(default_factory=dict)
    """What stands for a class where its name says little: `{"0": negative, "1": positive}`; for all of them or none."""

    @field_validator("template")
    @classmethod
    def _names_text_and_label(cls, value: str) -> str:
        other = [name for name in re.findall(r"\{\w+\}", value) if name not in (TEXT, LABEL)]
        if other:
            raise ValueError(f"few_shot.template knows {TEXT} and {LABEL} alone; got {other[0]}")
        if value.count(TEXT) != 1 or value.count(LABEL) != 1 or not value.endswith(LABEL) or value.startswith(LABEL):
            raise ValueError(
                f"few_shot.template holds {TEXT} once and ends with {LABEL}, which the base goes on with; "
                f"got {value!r:.200}"
            )
        return value

    @field_validator("words", mode="before")
    @classmethod
    def _numbers_name_classes(cls, value: Any) -> Any:
        """YAML reads the name of a class such as 0 as a number."""
        return {str(name): word for name, word in value.items()} if isinstance(value, dict) else value

    @field_validator("words")
    @classmethod
    def _words_differ(cls, value: dict[str, str]) -> dict[str, str]:
        written = [word.strip() for word in value.values()]
        if not all(written) or len(set(written)) < len(written):
            raise ValueError(f"few_shot.words gives each class a word of its own; got {value!r:.200}")
        return value


class LayerwiseSpec(Block):
    """Learning rates that differ from layer to layer, of `method: full` and `last_layers` on a base."""

    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a layer over that of the one above it: 1 / 2.6 in ULMFiT (Howard and Ruder 2018), .7 to .95 in
    most trainings since; the head has the whole one, the embeddings the smallest."""
    unfreeze_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps after which the lowest layer joins: the head learns from the first step, the layers one after
    the other from the top (Howard and Ruder 2018). A layer that waits costs as much and does not move; Adam's moments
    gather its gradients meanwhile."""

    @property
    def is_on(self) -> bool:
        """Whether any part differs."""
        return self.decay != 1 or self.unfreeze_fraction > 0


class MethodChoice(Block):
    """A method with the settings of all: only those of the method are used, so that a search may try several."""

    method: MethodName = "full"
    """Fine-tuning: `full` trains every weight, `last_layers` the layers at the top and the head, `lora` low-rank
    adapters, `qlora` the same beside a base of 4-bit weights, `ia3` factors of keys, values and the MLP, `prefix` keys
    and values in front of every layer's and `prompt_tuning` embeddings in front of every sample (`task: causal-lm`),
    `head` only a new head on frozen features, `scratch` the same architecture with new weights, to compare with.
    `few_shot` trains nothing: the base, a causal language model, is asked with some training rows in the prompt."""
    last_layers: LastLayersSpec = LastLayersSpec()
    """Settings for `method: last_layers`."""
    layerwise: LayerwiseSpec = LayerwiseSpec()
    """Learning rates by layer."""
    few_shot: FewShotSpec = FewShotSpec()
    """Settings for `method: few_shot`."""
    lora: LoraSpec = LoraSpec()
    """Adapter settings for `method: lora` and `qlora`."""
    prefix: PrefixSpec = PrefixSpec()
    """Settings for `method: prefix`."""
    prompt_tuning: PromptTuningSpec = PromptTuningSpec()
    """Settings for `method: prompt_tuning`."""
    export: Export = "auto"
    """What is left of a model with adapters: a `merged` one that loads like any other, the small `adapter` folder of
    peft, which needs the base, or `both`; `auto` is merged where the method can be and its base is whole."""

    def method_identity(self) -> dict[str, Any]:
        """What of these fields shapes the result, as plain JSON values.

        What is not set is left out, but for what every run has had since the first version: the method's name and the
        block `lora`, in which no targets were the attention's.
        """
        lora = self.lora
        if self.method not in ("lora", "qlora") and lora.targets == "all-linear":
            lora = lora.model_copy(update={"targets": "attention"})
        later = {name for name in ("rslora", "dora") if not getattr(lora, name)}
        block = lora.model_dump(mode="json", exclude=later)
        kept = {"method": self.method, "lora": block if lora.targets != "attention" else {**block, "targets": None}}
        blocks = set(get_args(MethodName)) - {self.method}
        fields = {name: field.default for name, field in MethodChoice.model_fields.items()}
        used = {name for name in fields.keys() - kept.keys() - blocks if getattr(self, name) != fields[name]}
        return kept | self.model_dump(mode="json", include=used)
