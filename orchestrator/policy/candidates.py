"""A question to one candidate per strategy: its trainings, their price cut to the budget, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.methods.registry import PRICED, method_of
from orchestrator.policy.expectation import Expectation
from orchestrator.policy.labelled_quality import labelled_expectation
from orchestrator.policy.language_quality import REPLAY, language_expectation, raw_epochs
from orchestrator.policy.new_model import size_from_scratch
from orchestrator.policy.pricing import Price, Work, affordable_share, longest_sample, price, sample_length
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import STRATEGIES, Name
from orchestrator.quantities import Budget, human_count

PROMPT_TRIAL_TOKENS = 1e6
"""What trying a prompt takes: 1,000 requests of 1,000 tokens. A guess at an honest evaluation."""
LEAST_SHARE = 0.02
"""Smallest part of a training that is still that training; below it the budget is too small for the strategy."""
_ROUNDING = 1e-4
_FIRST_EPOCHS, _LAST_EPOCHS, _EPOCH_EXPONENT = 15.0, 2.0, -0.45
"""15, 5 and 2 epochs at 100, 1,000 and 8,570 labels: what the film-review runs needed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A strategy for this question."""

    strategy: Name
    feasible: bool
    why: str
    """In one sentence: what speaks for it, or why it cannot be done."""
    price: Price | None
    """None where the strategy does not apply at all."""
    expectation: Expectation | None
    share: float = 1.0
    """Part of the data that the budget allows."""
    method: str = "full"
    """How its last training is done: head, lora, qlora or full."""
    parameters: int = 0
    tokens: float = 0.0
    """Model size, and tokens processed by the training."""
    on_front: bool = False
    """Whether nothing feasible is at least as good in quality, money, hours and memory, and better in one."""

    @property
    def label(self) -> str:
        """The strategy, with the size of a new model, and with its method where that is not the usual one."""
        size = f" {human_count(self.parameters)}" if self.strategy == "scratch" else ""
        title = PRICED[self.method].title
        return f"{self.strategy}{size}" + ("" if title is None else f" ({title})")


def candidates(question: Question) -> tuple[Candidate, ...]:
    """One candidate for every strategy, feasible or not; where nothing surely fits, what may fit is feasible."""
    found = tuple(_candidate(name, question, surely=True) for name in STRATEGIES)
    if any(one.price is not None and one.price.fits for one in found):
        return found
    return tuple(_candidate(name, question, surely=False) for name in STRATEGIES)


def _candidate(name: Name, question: Question, *, surely: bool) -> Candidate:
    obstacle = _obstacle(name, question)
    if obstacle is not None:
        return Candidate(strategy=name, feasible=False, why=obstacle, price=None, expectation=None)
    fixed, scalable = _works(name, question)
    priced = price((*fixed, *scalable), question)
    if not priced.fits and name == "peft":
        smaller = tuple(replace(work, method=PRICED[work.method].quantised or work.method) for work in scalable)
        quantised = price(smaller, question)
        if quantised.fits or (quantised.may_fit and not priced.may_fit):
            scalable, priced = smaller, quantised
    share = 1.0
    if question.budget is not None and scalable:
        left = affordable_share(scalable, _less(question, fixed))
        if left < 1:
            share, scalable = left, tuple(work.scaled(left) for work in scalable)
            priced = price((*fixed, *scalable), question)
    expectation = _expectation(name, question, share, scalable)
    if question.learned is not None and question.learned.quality is not None:
        expectation = expectation.learned(question.learned.quality)
    works = (*fixed, *scalable)
    common = Candidate(
        strategy=name,
        feasible=True,
        why=expectation.reasons[0],
        price=priced,
        expectation=expectation,
        share=share,
        method=works[-1].method,
        parameters=works[-1].parameters,
        tokens=sum(work.tokens for work in works),
    )
    if not (priced.fits if surely else priced.may_fit):
        return replace(common, feasible=False, why=f"does not surely fit in memory: {priced.memory_note}")
    if question.budget is not None and not _affordable(priced, share, question.budget):
        whole = price((*fixed, *_works(name, question)[1]), question).in_unit(question.budget)
        why = f"costs {whole:.3g}{question.budget.unit}; {question.budget} allow less than {LEAST_SHARE:.0%} of it"
        return replace(common, feasible=False, why=why)
    return common


def _affordable(priced: Price, share: float, budget: Budget) -> bool:
    """Whether enough of the work is left to be that work, and what must be done whole is inside the budget."""
    return share >= LEAST_SHARE and priced.in_unit(budget) <= budget.amount * (1 + _ROUNDING)


def _obstacle(name: Name, question: Question) -> str | None:
    strategy = STRATEGIES[name]
    if strategy.needs_base and question.base is None:
        return "there is no base model"
    if name == "prompt" and question.base is not None and question.base.is_encoder:
        return "an encoder writes no text, so it follows no prompt"
    if strategy.needs_labels and not question.labelled:
        return "there are no labels"
    if name == "features" and not question.is_classification:
        return "frozen features classify; they do not generate text"
    if question.is_classification and not question.labelled and name not in ("prompt", "continued"):
        return "there are no labels"
    if name == "continued" and question.is_classification and not question.labelled:
        return "raw text alone teaches no classes"
    if name == "continued" and question.labelled and not question.unlabeled_tokens:
        return "there is no raw text of the domain: --unlabeled-tokens N says how much there is"
    nothing = not question.labelled and not question.tokens and not question.unlabeled_tokens
    if nothing and (name in ("peft", "full", "continued") or (name == "scratch" and question.budget is None)):
        return "there is no data"
    return None


def fine_tuning_epochs(examples: int) -> float:
    """Passes over labelled data, fewer where there is more."""
    wanted = _FIRST_EPOCHS * float((max(1, examples) / 100) ** _EPOCH_EXPONENT)
    return min(_FIRST_EPOCHS, max(_LAST_EPOCHS, wanted))


def _works(name: Name, question: Question) -> tuple[tuple[Work, ...], tuple[Work, ...]]:
    """(what must be done whole, what can be cut to the budget)."""
    length, longest = sample_length(question), longest_sample(question)
    if name == "scratch":
        return (), (_scratch_work(question, length, longest),)
    assert question.base is not None
    size = question.base.parameters

    def work(method: str, tokens: float) -> Work:
        return Work(method=method, parameters=size, tokens=tokens, sequence_length=length, longest=longest)

    if name == "prompt":
        return (work("head", PROMPT_TRIAL_TOKENS),), ()
    if name == "features":
        return (), (work("head", question.tokens),)  # the backbone reads every example once, whatever the passes
    if not question.labelled:
        replay = 1 / (1 - REPLAY[question.domain]) if name == "continued" else 1.0
        tokens = max(question.tokens, question.unlabeled_tokens)
        return (), (work("lora" if name == "peft" else "full", tokens * raw_epochs(tokens, size) * replay),)
    tuned = question.tokens * fine_tuning_epochs(question.examples)
    if name == "continued":
        raw = question.unlabeled_tokens / (1 - REPLAY[question.domain])
        return (work("full", tuned),), (work("full", raw),)
    return (), (work("lora" if name == "peft" else "full", tuned),)


def _scratch_work(question: Question, length: int, longest: int | None) -> Work:
    if question.labelled:
        assert question.base is not None or question.examples
        size = question.base.parameters if question.base else 22_700_000
        tokens = question.tokens * fine_tuning_epochs(question.examples) * method_of("scratch").epochs_factor
        return Work(method="full", parameters=size, tokens=tokens, sequence_length=length, longest=longest)
    new, note = size_from_scratch(question), None
    if new.parameters < new.best_parameters:
        note = (
            f"the largest that surely fits {question.gpus or 'any number of'} {question.device.name}; "
            f"{human_count(new.best_parameters)} parameters would suit the "
            f"{'data' if question.budget is None else 'budget'} better"
        )
    return Work(method="full", parameters=new.parameters, tokens=new.tokens, sequence_length=length, note=note)


def _less(question: Question, spent: tuple[Work, ...]) -> Question:
    """The question with what must be spent taken from its budget."""
    if not spent or question.budget is None:
        return question
    left = question.budget.amount - price(spent, question).in_unit(question.budget)
    return replace(question, budget=replace(question.budget, amount=max(1e-12, left)))


def _expectation(name: Name, question: Question, share: float, scalable: tuple[Work, ...]) -> Expectation:
    if not question.labelled and not question.is_classification:
        work = scalable[-1] if scalable else None
        found = language_expectation(
            name,
            question,
            parameters=work.parameters if work else question.base.parameters if question.base else 0,
            tokens=work.tokens if work else 0.0,
        )
        return replace(found, reasons=(*found.reasons, work.note)) if work and work.note else found
    if name == "continued":
        return labelled_expectation(name, replace(question, unlabeled_tokens=question.unlabeled_tokens * share))
    return labelled_expectation(name, question if share == 1 else question.resized(max(share, 1e-9)))
