"""Expected error on labelled examples, strategy by strategy, as a ratio to full fine-tuning.

How hard a task is cannot be known from its size, but how strategies differ on the same task is measured. So one curve
gives the usual error of full fine-tuning with a wide spread, and every other strategy is a ratio to it, in logarithms,
with a narrow one. Evidence rows are named as in tests/evidence/decisions.csv and tests/evidence/curves.csv.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from orchestrator.policy.expectation import Expectation
from orchestrator.policy.laws.transfer import LORA_BITS_PER_PARAMETER
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import Name
from orchestrator.quantities import human_count

USUAL_ERROR_AT_100 = 0.28
USUAL_EXPONENT = 0.15
TASK_SPREAD = 0.5
"""err = 0.28 (n/100)^-0.15, e^0.5 up or down: fitted to 14 published fine-tunings of 23M to 355M encoders on 100 to
392,702 labels (curves.csv); MNLI, BoolQ, ACL-ARC, ChemProt, RCT, AGNews, Helpfulness, film reviews."""

_FEATURES_EQUAL_PER_CLASS = 17.0
_FEATURES_SLOPE = 0.088
"""ln(err features / err full) = 0.088 ln(labels per class / 17): frozen MiniLM against its full fine-tuning at 100,
1,000 and 8,570 film reviews gives 0.09, 0.32, 0.49; continued to 8 a class it is -0.07, where SetFit has -0.10."""
_FEATURES_FAR = 0.10  # guess: frozen features do not move towards a far domain

_PEFT_SLOPE = -0.02
_PEFT_EQUAL_PARAMETERS = 3e8
"""ln(err LoRA / err full) = -0.02 ln(N / 300M): 0.05 for MiniLM (film reviews, mean of three sizes), -0.06 RoBERTa-base
and -0.03 DeBERTa-xxl on GLUE, -0.01 to -0.08 Llama-3.2-3B on MetaMathQA, 0.00 Llama-2-7B on code."""
ADAPTER_SHARE = 0.08
"""The largest useful adapter, rank 256 on every matrix of a 7B model, has about 8 % of the weights (Biderman 2024)."""
_BITS_PER_GENERATED_TOKEN = 1.0  # guess: what an answer's token adds that the base did not know
_OVER_CAPACITY = 0.05  # guess: log error per e-fold of data beyond capacity; Biderman 2024 shows the direction

_ADAPTIVE_PRETRAINING = {"same": 0.0, "near": 0.06, "far": 0.06}
"""What continued pretraining gains however many labels there are: 0.03 to 0.11 at 18,040 and 115,251, none on news,
which RoBERTa knows (dapt-RCT, dapt-Helpfulness, dapt-AGNews)."""
_DOMAIN_PRETRAINING = {"same": 0.0, "near": 0.05, "far": 0.55}
_DOMAIN_HALF_LABELS = 2000.0
_DOMAIN_EXPONENT = 1.5
"""Further gain from much raw text of the domain, g / (1 + (n/2000)^1.5): full DAPT gains 0.41, 0.14 and 0.03 in log
error at 1,688, 4,169 and 18,040 labels of a far domain, and none at 115,000 of the same one (dapt-*)."""
_FEW_UNLABELED, _MANY_UNLABELED = 1e6, 1e9
"""Tokens of raw text at which that gain begins and is whole; guess between TAPT's 80 kB and DAPT's 47 GB."""

_TRANSFER_MULTIPLE = 20.0
_TRANSFER_EXPONENT = -0.17
_TRANSFER_PARAMETERS = 22.7e6
_TRANSFER_SIZE_EXPONENT = 0.38
_SCRATCH_EXPONENT = 0.218
"""Pretraining is worth m(n) = 20 (n/100)^-0.17 times the labels, errors from scratch falling as n^-0.218: MiniLM on
film reviews, scratch against full at 100, 1,000 and 8,570. It grows as N^0.38 (Hernandez 2021, equation 1.1)."""
_TRANSFER_BY_DOMAIN = {"same": 3.0, "near": 1.0, "far": 0.1}
"""Near and far differ by 11 in Hernandez' constants (2.1e5 and 1.9e4); same is a guess."""
_TRANSFER_TOKENS_PER_EXAMPLE = 1e4
"""At most one worth-an-example for every 10,000 tokens that the base saw: with ImageNet's 1.28M images that ends near
COCO's 118,000 with 7 objects each, where scratch draws level (he-coco-118000)."""

_PROMPT_COMPUTE = 3.15e23
_PROMPT_SKILL = 0.38
_PROMPT_SLOPE = 0.07
"""Share of chance error that a prompt removes: 0.38 at GPT-3's 6 x 175B x 300B FLOPs (RAFT, raft-50), 0.07 more for
each e-fold, none below 1.4e21 (RoBERTa-large is at chance: lescao-RTE-0). Three rows: a rule of thumb."""

_CORNER = 4.0  # fitted to that one run

_SPREAD: dict[Name, float] = {
    "prompt": 0.35,  # guess
    "features": 0.25,  # SetFit, RAFT and film reviews agree to 0.1; pairs of sentences are 0.4 off (lescao-MNLI-32)
    "peft": 0.07,  # residual of the rows above
    "full": 0.0,  # it is what the others are measured against
    "continued": 0.10,  # residual of dapt-*
    "scratch": 0.15,  # guess
}
_FORGETS: dict[Name, float] = {
    "prompt": 0.0,
    "features": 0.0,
    "peft": 0.06,
    "full": 0.15,
    "continued": 0.08,
    "scratch": 1.0,
}
"""Log error that skills of the base lose; LoRA against full .631 and .446 of them kept (Biderman 2024, lora-code-ift);
the sizes are guesses. What is frozen forgets nothing, what is new never knew."""


def labelled_expectation(strategy: Name, question: Question) -> Expectation:
    """What a strategy gives on the question's examples; needs a base unless the strategy is `scratch`."""
    if strategy == "prompt":
        error, reason = _prompt(question)
    else:
        ratio, reason = _RATIOS[strategy](question)
        equal = equal_chance_error(question)
        error = _below(equal, _usual_error(question) * math.exp(ratio)) * chance_error(question) / equal
    return Expectation(
        badness=math.log(error),
        spread=_SPREAD[strategy],
        kind="error",
        shared=TASK_SPREAD,
        forgetting=_FORGETS[strategy],
        reasons=(reason,),
        rule_of_thumb=strategy == "prompt",
    )


def _below(chance: float, error: float) -> float:
    """An error that nears chance without a corner: MiniLM from scratch on 100 reviews is at 0.41 of 0.5, not at 0.5."""
    return float((error**-_CORNER + chance**-_CORNER) ** (-1 / _CORNER))


def equal_chance_error(question: Question) -> float:
    """Error of guessing among classes of one size; for generated answers there is no lucky guess."""
    return 1 - 1 / question.classes if question.is_classification and question.classes > 1 else 0.98


def chance_error(question: Question) -> float:
    """Error of the constant answer. What is learnt is taken to remove the same share of it whatever the sizes of the
    classes, with as many labels as there are of the rarer ones (a guess: the curves are of nearly equal classes)."""
    if question.commonest is None or question.classes < 2:
        return equal_chance_error(question)
    return min(equal_chance_error(question), 1 - question.commonest)


def _usual_error(question: Question) -> float:
    count = max(1.0, question.balanced_examples)
    return float(USUAL_ERROR_AT_100 * (count / 100) ** -USUAL_EXPONENT)


def _full(question: Question) -> tuple[float, str]:
    labels, equal = human_count(question.examples), human_count(max(1, round(question.balanced_examples)))
    told = "" if equal == labels else f", which tell as much as {equal} in classes of one size"
    return 0.0, f"full fine-tuning is the reference: usual error on {labels} labels{told} (curves)"


def _features(question: Question) -> tuple[float, str]:
    each = max(1.0, question.balanced_examples) / question.classes
    ratio = _FEATURES_SLOPE * math.log(each / _FEATURES_EQUAL_PER_CLASS)
    if question.domain == "far":
        ratio += _FEATURES_FAR
    return ratio, (
        f"frozen features have {_times(ratio)} the error of full fine-tuning at {each:.0f} labels a class; "
        "they draw level at 17 (setfit-8shot, film reviews)"
    )


def _peft(question: Question) -> tuple[float, str]:
    assert question.base is not None
    ratio = _PEFT_SLOPE * math.log(question.base.parameters / _PEFT_EQUAL_PARAMETERS)
    capacity = ADAPTER_SHARE * LORA_BITS_PER_PARAMETER * question.base.parameters
    if question.is_classification:
        bits = question.examples * math.log2(max(2, question.classes))
    else:
        bits = question.tokens * _BITS_PER_GENERATED_TOKEN
    why = f"adapters have {_times(ratio)} the error of full fine-tuning at {human_count(question.base.parameters)}"
    if bits > capacity:
        ratio += _OVER_CAPACITY * math.log(bits / capacity)
        why += f", and the data ({human_count(bits)} bits) exceeds the largest adapter's capacity"
    return ratio, f"{why} (lora-*, peft-metamath-3B, film reviews)"


def _continued(question: Question) -> tuple[float, str]:
    more = _DOMAIN_PRETRAINING[question.domain] / (1 + (question.examples / _DOMAIN_HALF_LABELS) ** _DOMAIN_EXPONENT)
    text = question.unlabeled_tokens
    share = math.log(max(1.0, text) / _FEW_UNLABELED) / math.log(_MANY_UNLABELED / _FEW_UNLABELED)
    ratio = -_ADAPTIVE_PRETRAINING[question.domain] - more * min(1.0, max(0.0, share))
    return ratio, (
        f"continuing on {human_count(text)} tokens of raw text leaves {_times(ratio)} the error in a "
        f"{question.domain} domain at {human_count(question.examples)} labels (dapt-*)"
    )


def _scratch(question: Question) -> tuple[float, str]:
    if question.base is None:
        return 0.0, "no base model to compare with"
    count = max(1, question.examples)
    worth = transfer_multiple(question)
    ratio = _SCRATCH_EXPONENT * math.log1p(worth)
    return ratio, (
        f"from scratch has {_times(ratio)} the error: pretraining is worth {human_count(worth * count)} more labels "
        "(film reviews; Hernandez 2021)"
    )


def transfer_multiple(question: Question) -> float:
    """How many further labels each label is worth to a pretrained model, compared with new weights."""
    assert question.base is not None
    count = max(1, question.examples)
    size = float((question.base.parameters / _TRANSFER_PARAMETERS) ** _TRANSFER_SIZE_EXPONENT)
    multiple = _TRANSFER_MULTIPLE * float((max(count, 10) / 100) ** _TRANSFER_EXPONENT) * size
    limit = question.base.tokens / _TRANSFER_TOKENS_PER_EXAMPLE / count
    return _TRANSFER_BY_DOMAIN[question.domain] * min(multiple, limit)


def _prompt(question: Question) -> tuple[float, str]:
    """The error itself, not a ratio: it has nothing to do with the number of labels."""
    assert question.base is not None
    compute = 6 * question.base.parameters * question.base.tokens
    skill = min(0.9, max(0.0, _PROMPT_SKILL + _PROMPT_SLOPE * math.log(compute / _PROMPT_COMPUTE)))
    error = chance_error(question) * (1 - skill)
    level = "chance" if skill == 0 else f"an error near {error:.2f}"
    return error, f"a prompt to {human_count(question.base.parameters)} gives {level} (raft-50, lescao-RTE-0)"


def _times(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.2f} times"


_RATIOS: dict[Name, Callable[[Question], tuple[float, str]]] = {
    "features": _features,
    "peft": _peft,
    "full": _full,
    "continued": _continued,
    "scratch": _scratch,
}
