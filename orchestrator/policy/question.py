"""What is asked of the advisor: data, base model, budget, devices and goal, as one frozen value.

The face fills it from options and, where a dataset is given, from what was measured; everything left open gets a
stated assumption here, so that the deciding code meets no None it has to interpret.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from orchestrator.errors import SpecError
from orchestrator.facts.domains import Domain
from orchestrator.planning.hardware import Device, find_device
from orchestrator.quantities import MOST_WORKERS, Budget, human_count
from orchestrator.tasks.names import LABELLED_TEXT, Task, raw_text_task
from orchestrator.tasks.registry import advised_task

if TYPE_CHECKING:
    from orchestrator.facts.row_lengths import Seen
    from orchestrator.policy.corrections import Correction, Corrections

Goal = Literal["quality", "cost", "retain"]
GOALS: tuple[Goal, ...] = ("quality", "cost", "retain")

UNEQUAL = 3.0
"""Rows of the largest class over those of the smaller ones from which accuracy is said to hide these. A guess."""

ASSUMED_DEVICE = "H100-80GB"
"""Priced on when no device is named: what most clouds rent out for training in 2026."""


def usual_base_tokens(parameters: int) -> float:
    """Tokens that a public base of this size was trained on: 30B at 125M (RoBERTa), 1T at 1B (between Pythia's 0.3T and
    TinyLlama's 3T), and no more than Llama 2's 2T, since a larger guess would flatter prompting."""
    return min(2e12, 1e12 * float((parameters / 1e9) ** 1.7))


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model to start from."""

    parameters: int
    tokens: float
    """Tokens it was trained on."""
    name: str | None = None
    """Folder, hub name or `runs:/ID`; None when only a size is known."""
    context: int | None = None
    """Tokens it reads at once; None when that is not known, or without limit."""
    is_encoder: bool = False
    """Whether its tokens see those on both sides (BERT, RoBERTa), so that it fills gaps and continues no text."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What past runs say that bears on a question."""

    corrections: Corrections
    quality: Correction | None = None
    """Error or loss on this very dataset, over the expected; None where it was never trained on."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that advice depends on. Counts are positive; `examples` and `tokens` may be zero but not both unknown."""

    task: Task
    examples: int
    """Labelled examples or instruction pairs; 0 when there is only raw text."""
    tokens: float
    """Tokens of one epoch of the examples, or of the raw text where there are none."""
    classes: int
    """Classes of a classification; 1 otherwise."""
    base: Base | None
    """None: new weights only."""
    domain: Domain
    """How far the data lies from what the base was trained on."""
    unlabeled_tokens: float
    """Tokens of raw text of the same domain, beside the examples."""
    budget: Budget | None
    device: Device
    gpus: int | None
    """Devices; None is as few as the memory asks for."""
    goal: Goal
    inference_tokens: float
    """Tokens that the result will process in its life; 0 when they do not matter."""
    assumed: tuple[str, ...] = field(default=())
    """What was taken for granted, a sentence each."""
    measured: tuple[str, ...] = ()
    """What was measured of the dataset, a sentence each."""
    seen: Seen | None = None
    """What a training sees of measured rows, of which `tokens` counts the padded ones; None where sizes are given."""
    commonest: float | None = None
    """Share of the largest class, which is the accuracy of always answering it; None: as large as the others."""
    learned: Learned | None = None
    """Corrections by past runs; None without a history."""

    @property
    def labelled(self) -> bool:
        """Whether there are examples of the task, not only raw text."""
        return self.examples > 0

    @property
    def is_classification(self) -> bool:
        """Whether the result is a class, and its quality an accuracy."""
        return advised_task(self.task).is_classification

    @property
    def tokens_per_example(self) -> float:
        """Mean length of a labelled example."""
        return self.tokens / self.examples if self.examples else float(advised_task(self.task).tokens_per_example)

    @property
    def balanced_examples(self) -> float:
        """Examples in classes of one size that would hold as many of the rarer classes: what there is to learn from."""
        if self.commonest is None or self.classes < 2:
            return float(self.examples)
        return self.examples * (1 - self.commonest) / (1 - 1 / self.classes)

    @property
    def accuracy_hides(self) -> bool:
        """Whether accuracy says little of the rarer classes: the largest has most of the rows, several times as many as
        others have on average."""
        if self.commonest is None or self.classes < 2:
            return False
        return self.commonest > 0.5 and self.commonest * (self.classes - 1) >= UNEQUAL * (1 - self.commonest)

    def resized(self, factor: float) -> Question:
        """The same question with `factor` times the data."""
        return replace(self, examples=round(self.examples * factor), tokens=self.tokens * factor)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The question as far as the user stated it; None is open."""

    task: Task | None = None
    examples: int | None = None
    tokens: float | None = None
    classes: int | None = None
    labels_per_class: int | None = None
    base: Base | None = None
    base_tokens: float | None = None
    no_base: bool = False
    domain: Domain | None = None
    unlabeled_tokens: float | None = None
    budget: Budget | None = None
    gpu: str | None = None
    gpus: int | None = None
    goal: Goal = "quality"
    inference_tokens: float | None = None
    measured: tuple[str, ...] = ()
    """What was measured of the dataset, a sentence each."""
    seen: Seen | None = None
    commonest: float | None = None


def ask(given: Given) -> Question:
    """The whole question, every gap filled with a stated assumption.

    Raises SpecError when the statements contradict each other or leave the data unknown.
    """
    _refuse_contradictions(given)
    assumed: list[str] = []
    task = given.task or _task(given, assumed)
    classification = advised_task(task).is_classification
    classes = given.classes or 2 if classification else 1
    if classification and given.classes is None:
        assumed.append("2 classes: the number of labels was not given")
    examples, tokens = _amounts(given, task, classes, assumed)
    base = _base(given, task, assumed)
    if base is not None and advised_task(task).hides_tokens:
        base = replace(base, is_encoder=True)  # nothing else learns it, whether it has a name or only a size
    if given.gpu is None:
        assumed.append(f"priced on {ASSUMED_DEVICE}, as many as the memory asks for: no --gpu was given")
    if base is not None and given.domain is None:
        assumed.append("a domain near the base model's: no --domain-distance was given and none was measured")
    return Question(
        task=task,
        examples=examples,
        tokens=tokens,
        classes=classes,
        base=base,
        domain=given.domain or "near",
        unlabeled_tokens=given.unlabeled_tokens or 0.0,
        budget=given.budget,
        device=find_device(given.gpu or ASSUMED_DEVICE),
        gpus=1 if given.gpus is None and given.gpu is not None else given.gpus,
        goal=given.goal,
        inference_tokens=given.inference_tokens or 0.0,
        assumed=tuple(assumed),
        measured=given.measured,
        seen=given.seen,
        commonest=given.commonest if classification else None,
    )


def raw_text_task_of(base: Base | None) -> Task:
    """What a base model learns from raw text."""
    return raw_text_task(is_encoder=base is not None and base.is_encoder)


def _refuse_contradictions(given: Given) -> None:
    if given.no_base and given.base is not None:
        raise SpecError(
            "--no-base-model says there is none, and a base model is given too",
            got=given.base.name or f"{human_count(given.base.parameters)} parameters",
            do="leave one of them out",
        )
    if given.gpus is not None and given.gpus < 1:
        raise SpecError("at least one device is needed", got=f"--gpus {given.gpus}", do="set --gpus 1 or more")
    if given.gpus is not None and given.gpus > MOST_WORKERS:
        raise SpecError("no cluster is that large", got=f"--gpus {given.gpus}", allowed=f"up to {MOST_WORKERS:,}")
    if given.base_tokens is not None and given.base is None:
        raise SpecError(
            "--base-tokens describes a base model, and none is given", do="add --base-params N or --base-model PATH"
        )
    if given.examples is not None and given.labels_per_class is not None and given.classes is not None:
        total = given.labels_per_class * given.classes
        if total > given.examples:
            raise SpecError(
                "more labels than examples",
                got=f"{given.labels_per_class} per class in {given.classes} classes, {given.examples} examples",
                do="give --examples or --labels-per-class, or make them agree",
            )
    hides = given.task is not None and advised_task(given.task).hides_tokens
    if hides and given.base is not None and given.base.name and not given.base.is_encoder:
        raise SpecError(
            "a decoder cannot learn to fill gaps in a text",
            got=f"--task masked-lm with --base-model {given.base.name}",
            do="use --task causal-lm, or an encoder such as BERT or RoBERTa",
        )
    nothing = given.examples is None and given.tokens is None and given.labels_per_class is None
    if nothing and given.budget is None and not given.unlabeled_tokens:
        raise SpecError(
            "there is nothing to advise on: no data and no budget",
            do="give --dataset PATH, --examples N or --tokens N, or at least --budget, such as --budget 500usd",
        )


def _task(given: Given, assumed: list[str]) -> Task:
    labelled = given.classes is not None or given.labels_per_class is not None
    if labelled or (given.examples is not None and given.tokens is None):
        assumed.append(f"task {LABELLED_TEXT}: examples were given and no --task")
        return LABELLED_TEXT
    task: Task = raw_text_task_of(given.base)
    assumed.append(f"task {task}: raw text was given and no --task")
    return task


def _amounts(given: Given, task: Task, classes: int, assumed: list[str]) -> tuple[int, float]:
    """Labelled examples, and tokens of one epoch of them (or of the raw text)."""
    examples = given.examples
    if given.labels_per_class is not None:
        examples = min(given.labels_per_class * classes, examples or given.labels_per_class * classes)
    if examples is None:
        return 0, given.tokens or 0.0
    if given.tokens is not None:
        if given.tokens < examples:
            raise SpecError(
                "fewer tokens than examples",
                got=f"--tokens {human_count(given.tokens)} in --examples {examples}",
                do="give one of them, or check the numbers",
            )
        return examples, given.tokens
    each = advised_task(task).tokens_per_example
    assumed.append(f"{each} tokens an example: nothing was measured")
    return examples, float(examples * each)


def _base(given: Given, task: Task, assumed: list[str]) -> Base | None:
    if given.no_base:
        return None
    if given.base is None:
        if given.examples is None and given.tokens is None and given.labels_per_class is None:
            return None  # only a budget: what to pretrain
        parameters, tokens = advised_task(task).assumed_base
        assumed.append(
            f"a usual public base of {human_count(parameters)} parameters trained on {human_count(tokens)} tokens: "
            "no --base-params or --base-model was given"
        )
        return Base(parameters=parameters, tokens=tokens)
    if given.base_tokens is not None:
        return replace(given.base, tokens=given.base_tokens)
    if not given.base.tokens:
        tokens = usual_base_tokens(given.base.parameters)
        assumed.append(f"the base saw {human_count(tokens)} tokens: no --base-tokens was given")
        return replace(given.base, tokens=tokens)
    return given.base
