"""Past runs -> a question that knows them, and what they changed about the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from orchestrator.methods.registry import METHODS
from orchestrator.policy.candidates import Candidate, candidates
from orchestrator.policy.corrections import Corrected, Corrections, RunRecord, what_changed
from orchestrator.policy.labelled_quality import TASK_SPREAD, labelled_expectation
from orchestrator.policy.language_quality import language_expectation
from orchestrator.policy.laws.scaling import CORPUS_LOG_SD
from orchestrator.policy.pricing import Work, changes_of_price, longest_sample, price, sample_length
from orchestrator.policy.question import Learned, Question
from orchestrator.policy.strategies import Name

_STRATEGIES: dict[str, Name] = {method.name: method.strategy for method in METHODS if method.strategy is not None}


def learn(question: Question, corrections: Corrections, *, data: str | None) -> Question:
    """The question with what runs say about its device, and about `data` (a location or fingerprint) if it is known."""
    quality = None
    if data is not None and corrections.runs_on(data, question.task):
        if question.is_classification:
            quality = corrections.error(
                data, question.task, predicted=lambda run: _expected_error(run, question), prior_sd=TASK_SPREAD
            )
        else:
            quality = corrections.loss(
                data, question.task, predicted=lambda run: _expected_loss(run, question), prior_sd=CORPUS_LOG_SD
            )
    return replace(question, learned=Learned(corrections=corrections, quality=quality))


def changed(question: Question, strategy: Name) -> tuple[str, ...]:
    """What the history changed about a strategy's figures, a sentence for each correction."""
    if question.learned is None:
        return ()
    plain = replace(question, learned=None)
    found = next(one for one in candidates(plain) if one.strategy == strategy)
    return what_changed(_changes(found, question))


def _changes(found: Candidate, question: Question) -> Iterator[Corrected]:
    assert question.learned is not None
    if found.price is None or found.expectation is None:
        return
    work = Work(
        method=found.method,
        parameters=found.parameters,
        tokens=found.tokens,
        sequence_length=sample_length(question),
        longest=longest_sample(question),
    )
    yield from changes_of_price(work, price([work], replace(question, learned=None)), question)
    if question.learned.quality is not None:
        yield found.expectation.change(question.learned.quality)


def _expected_error(run: RunRecord, question: Question) -> float | None:
    strategy = _STRATEGIES.get(run.method)
    if strategy is None or (question.base is None and strategy != "scratch"):
        return None
    sized = replace(question, examples=run.train_samples, tokens=float(run.train_tokens), learned=None)
    return math.exp(labelled_expectation(strategy, sized).badness)


def _expected_loss(run: RunRecord, question: Question) -> float | None:
    strategy = "scratch" if run.base_model is None else _STRATEGIES.get(run.method)
    if strategy in (None, "features") or (question.base is None and strategy != "scratch"):
        return None
    sized = replace(question, tokens=float(run.train_tokens), learned=None)
    return language_expectation(strategy, sized, parameters=run.parameters, tokens=float(run.tokens_seen)).badness
