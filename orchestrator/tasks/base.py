"""What a task is: its metrics, the kind of model that learns it, its loss, and the sums that its evaluation rests on.

Torch is loaded inside functions alone, so that a plan knows tasks without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from orchestrator.tasks.names import FormName

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from torch.nn import Module

    Batch = dict[str, Tensor]

BITS_PER_BYTE = "eval/bits_per_byte"
"""All nats over the held-out tokens that are predicted, over ln 2 and over the UTF-8 bytes that these stand for."""


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """How a model answers for one class."""

    name: str
    precision: float
    """Share of what it took for this class that is of it; 0 where it took nothing for it."""
    recall: float
    """Share of the rows of this class that it took for it; 0 where there are none."""
    f1: float
    """Harmonic mean of the two."""
    rows: int
    """How many are of this class."""


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """What an evaluation says beyond the metrics that a training logs."""

    metrics: dict[str, float]
    """Further ones, by name."""
    classes: tuple[ByClass, ...]
    """In the model's order."""
    confusion: tuple[tuple[int, ...], ...]
    """Rows of each class (outer) that were taken for each class (inner)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A task's loss for training and its sums for evaluation."""

    loss: Callable[[Module, Batch], Tensor]
    """Mean loss of a micro-batch, a scalar in fp32."""
    evaluate: Callable[[Module, Batch], Tensor]
    """Per sample, shape (n, 3 or more): summed loss in nats, correct predictions, predictions; a task may add sums that
    its `summarize` takes."""
    summarize: Callable[..., dict[str, float]]
    """The sums over all held-out samples as named metrics."""
    answers: Callable[[Tensor], Tensor] | None = None
    """Of what `evaluate` gives per sample, the true class of each and the one that was predicted, shape (n, 2); None
    without classes."""
    predictions: Callable[[Batch], Tensor] | None = None
    """How many a micro-batch's loss is the mean of, a scalar; None where equal micro-batches hold equally many."""


@dataclass(frozen=True, kw_only=True)
class ClassLoss:
    """How the loss of a classification counts its classes in training."""

    weights: tuple[float, ...] | None = None
    """Of a row of each class; None counts all rows alike."""
    smoothing: float = 0.0
    """Share of the target that is spread over all classes."""


class AdvisedTask(ABC):
    """A task that the advisor answers for. Each has one object, in the file of its name."""

    name: ClassVar[str]
    is_classification: ClassVar[bool] = False
    """Whether the result is a class, and its quality an accuracy."""
    models_language: ClassVar[bool] = False
    """Whether tokens of the examples themselves are predicted, by the output layer that a base has."""
    reads_raw_text: ClassVar[bool] = False
    """Whether an example is raw text alone."""
    generates: ClassVar[bool] = False
    """Whether the result continues a text."""
    hides_tokens: ClassVar[bool] = False
    """Whether a share of the tokens is hidden and predicted from both sides."""
    tokens_per_example: ClassVar[int]
    """Assumed when nothing was measured."""
    assumed_base: ClassVar[tuple[int, float]]
    """Parameters and training tokens of a usual public base, for when none is named."""


class LearntTask(AdvisedTask):
    """A task that `run` trains: a value of `task` in a spec."""

    form: ClassVar[FormName]
    """What its samples are."""
    metrics: ClassVar[tuple[str, ...]]
    """Logged at each evaluation."""
    further_metrics: ClassVar[tuple[str, ...]] = ()
    """Those of `breakdown`, which an evaluation alone logs."""
    ranked_by: ClassVar[str]
    """The metric that says how good a result is."""
    auto_class: ClassVar[str]
    """The class of transformers that builds a model for it."""
    model_table: ClassVar[str]
    """The table in transformers' `modeling_auto.py` of the architectures that have one."""
    takes_virtual_tokens: ClassVar[bool] = False
    """Whether tokens that stand for no text may be put before each sample."""
    peft_type: ClassVar[str | None]
    """What peft calls the task; None where it has no name, and wraps the model as it is."""

    @abstractmethod
    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """Modules that an adapted model trains whole, by their names; None for none."""

    def breakdown(self, true: ndarray, answers: ndarray, names: Sequence[str]) -> Breakdown | None:
        """What comes of each class, from the class of each row and the one that was predicted, both (rows,); None
        for a task without classes."""
        return None

    def group(self, kind: str) -> str:
        """The heading under which results are compared, for a run of a `kind`."""
        return kind

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Its loss and sums."""

    def objective_with(self, loss: ClassLoss) -> Objective:
        """The same, with another loss for training; the sums of evaluations stay. For classifications alone."""
        raise AssertionError(f"{self.name} has no classes")
