"""What a method of adapting a model is: what it trains, what that costs, and how a module is made ready for it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.errors import SpecError
from orchestrator.tasks.base import LearntTask
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.method_names import MethodName
    from orchestrator.spec import RunSpec

Strategy = Literal["features", "peft", "full", "scratch"]
"""What the advisor calls methods."""
Module = Any
"""A `torch.nn.Module`: no torch is loaded before one is there."""


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """What a step costs for each weight of the backbone, and what it keeps for its backward pass."""

    flops_per_weight: float
    """Of a token: 2 forward, 2 for the gradients of activations, 2 for those of weights (Kaplan 2020, section 2.1)."""
    bytes_per_weight: float
    """That ZeRO-3 moves for a micro-batch in 16 bits: 2 to gather weights for each pass, 2 to scatter gradients."""
    trains_all: bool = False
    """Whether every weight has a gradient."""
    backward_share: float = 1.0
    """Of the layers, from the top, that the backward pass goes through; below a trained head it goes through none."""
    trains_layers: bool = False
    """Whether those layers' own weights are trained."""
    keeps_inputs: bool = False
    """Whether every linear module keeps its input for the backward pass: frozen ones do not, quantised ones do."""
    keeps_rows: bool = False
    """Whether RMS norms keep their rows: where their weights are trained, or cast up beside quantised ones."""
    kept_per_token: float = 0.0
    """What a layer keeps for adapters besides, in elements for each token."""
    kept_per_layer: float = 0.0
    """The same, in elements whatever the tokens."""
    kept_per_sample: float = 0.0
    """The same, in elements for each sample."""
    is_quantised: bool = False
    """Whether the backbone is stored in 4 bits, which each pass turns into 16."""
    virtual_tokens: int = 0
    """Put before every sample."""

    @property
    def passes_back(self) -> bool:
        """Whether the backward pass reaches the backbone."""
        return self.backward_share > 0


ALL_WEIGHTS = MethodCost(
    flops_per_weight=6.0, bytes_per_weight=6.0, trains_all=True, trains_layers=True, keeps_inputs=True, keeps_rows=True
)
"""Of methods that train every weight."""
FROZEN_BACKBONE = MethodCost(flops_per_weight=4.0, bytes_per_weight=4.0)
"""Of methods that train small additions all along a frozen backbone."""


def full_learning_rate(parameters: int) -> float:
    """That suits full fine-tuning of a base: 1e-4 for MiniLM on film reviews, falling with size as pretraining rates do
    (Porian 2024)."""
    return float(1e-4 * (parameters / 22.7e6) ** -0.36)


class PricedMethod(ABC):
    """A method that `estimate` knows by sizes alone. Each has one object, in the file of its name."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that it goes by."""
    title: ClassVar[str | None] = None
    """What tells it from the usual method of its strategy, in tables; None for that one."""
    cost: ClassVar[MethodCost]
    """With its usual settings."""
    quantised: ClassVar[MethodName | None] = None
    """The method that takes less memory in its place, by weights of 4 bits."""

    def usual_cost(self, shape: ModelShape) -> MethodCost:
        """With its usual settings, of a model of this shape."""
        return self.cost

    @abstractmethod
    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """How many weights it trains with its usual settings; adapters have this rank."""


class Method(PricedMethod):
    """A method that `run` trains by: a value of `method` in a spec."""

    name: ClassVar[MethodName]
    strategy: ClassVar[Strategy | None] = None
    """The advisor's, whose expectations its runs tell about; None where they would tell of something else."""
    is_advised: ClassVar[bool] = False
    """Whether the advisor writes it into a spec for its strategy; one method for each strategy is."""
    trains: ClassVar[bool] = True
    """Whether weights change; else the base answers as it is."""
    asks_in_prompts: ClassVar[bool] = False
    """Whether the base is asked about rows in prompts."""
    is_from_scratch: ClassVar[bool] = False
    """Whether the weights of a base are left unread."""
    epochs_factor: ClassVar[float] = 1.0
    """Passes over labelled rows that it takes, over those of full fine-tuning."""
    keeps_features: ClassVar[bool] = False
    """Whether what the backbone makes of a row is the same in every pass, so that it is computed once and kept."""
    recomputes: ClassVar[bool] = True
    """Whether activations can be computed again in the backward pass."""
    can_merge: ClassVar[bool] = True
    """Whether what it trains can become part of a model that loads like any other."""
    has_adapter: ClassVar[bool] = False
    """Whether what it trains can be saved apart from the base."""
    requires: ClassVar[str | None] = None
    """A package that it needs besides those that every method needs; `pip install "orchestrator[NAME]"` brings it."""
    colour: ClassVar[int]
    """Of its runs in plots, in the palette."""
    marker: ClassVar[str]
    """Of its runs in plots, as matplotlib calls it; tells methods apart without colour."""

    def learning_rate(self, base_parameters: int | None) -> float:
        """A peak learning rate of AdamW to start from, for a base of this size; None where there is none."""
        assert base_parameters is not None
        return full_learning_rate(base_parameters)

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """What it costs with the settings of a spec."""
        return self.cost

    def model_task(self, spec: RunSpec) -> LearntTask:
        """The task whose kind of model it works with."""
        return task_of(spec.task)

    def check_architecture(self, kind: str) -> None:
        """Raises ModelError for a `model_type` that it cannot work with."""

    def problem(self, spec: RunSpec) -> str | None:
        """Why a spec cannot train by this method, in a sentence; None where it can."""
        if spec.kind == "pretrain" and not self.cost.trains_all:
            return f"method: {self.name} adapts a base model: use kind: finetune, or remove method"
        if spec.export in ("adapter", "both") and not self.has_adapter:
            return f"export: {spec.export} is for adapters, and method: {self.name} changes the base itself: use merged"
        if spec.export in ("merged", "both") and not self.can_merge:
            return f"export: {spec.export} cannot be: method: {self.name} adds what no weight can hold: use adapter"
        if spec.layerwise.is_on and not self.cost.trains_layers:
            return f"layerwise is for methods that train the base's layers: remove it for method: {self.name}"
        if spec.layerwise.is_on and (self.is_from_scratch or spec.model.base is None):
            return "layerwise keeps what lower layers have learnt, and new weights have learnt nothing: remove it"
        if spec.retain is not None and self.is_from_scratch:
            return f"retain keeps what a base knows, and method: {self.name} leaves it unread: remove it"
        if spec.retain is not None and spec.retain.l2sp and not self.cost.trains_layers:
            return (
                f"retain.l2sp pulls trained weights of the base back, and method: {self.name} leaves them as they are: "
                "set retain.l2sp=0, or use method: full"
            )
        if spec.training.activation_checkpointing is True and not self.recomputes:
            return f"training.activation_checkpointing: a layer computed again would lose its {self.name}: remove it"
        return self._zero_problem(spec)

    def _zero_problem(self, spec: RunSpec) -> str | None:
        stage, offload = spec.deepspeed.zero_stage, spec.deepspeed.offload
        most = self.largest_zero_stage(spec)
        if most < 3 and (stage == 3 or offload == "all"):
            asked = "zero_stage: 3" if stage == 3 else "offload: all"
            return (
                f"deepspeed.{asked} splits weights that method: {self.name} reads whole: use zero_stage {most} or less"
            )
        return None

    def check_installed(self) -> None:
        """Raises SpecError where the package that it requires is not there."""
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            raise SpecError(
                f"method: {self.name} needs the package {self.requires}, which is not installed",
                do=f'pip install "orchestrator[{self.name}]", on every node, or use another method',
            )

    def positions(self, spec: RunSpec) -> int:
        """Places of the context that it takes from every sample."""
        return 0

    def largest_zero_stage(self, spec: RunSpec) -> int:
        """The highest ZeRO stage that it trains under."""
        return 3

    def saves_adapter(self, spec: RunSpec) -> bool:
        """Whether an adapter folder is left."""
        return spec.export in ("adapter", "both") or not self.can_merge

    def saves_merged(self, spec: RunSpec) -> bool:
        """Whether a model is left that loads without the base."""
        return self.can_merge and spec.export != "adapter"

    @abstractmethod
    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """How many weights it trains. Raises ModelError where the architecture lacks what it needs."""

    def trains_new_masked_lm_head(self, model_type: str) -> bool:
        """Whether a masked-LM head that a base comes without is trained, not left as it was drawn."""
        return True

    def reads(self, model: Module) -> list[Any]:
        """Parameters of a module whose values `adapt` looks at: under ZeRO-3 they must be whole meanwhile."""
        return []

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """The module with the right parameters trainable. Raises ModelError where it lacks what the method needs."""
        return model

    def merged(self, model: Module) -> Module:
        """An adapted module as a plain one that computes the same."""
        return model

    def decays(self, name: str, dimensions: int) -> bool:
        """Whether weight decay applies to a parameter: to matrices, not to biases and normalisation weights."""
        return dimensions >= 2
