"""A recommendation to a spec that `run` carries out: the chosen strategy, or the pilot that tells rivals apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.architectures.standard_shape import standard_shape
from orchestrator.data.layouts import Layout
from orchestrator.errors import SpecError
from orchestrator.facts.row_lengths import LONGEST_CUT_OFF, fine_tuning_batch
from orchestrator.method_names import PROMPTED, MethodName
from orchestrator.methods.registry import METHODS, method_of
from orchestrator.policy.advise import Recommendation
from orchestrator.policy.candidates import Candidate, fine_tuning_epochs
from orchestrator.policy.language_quality import SCARCE_EPOCHS
from orchestrator.policy.laws.hyperparameters import suggested_learning_rate
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import STRATEGIES, Name
from orchestrator.tasks.names import ANSWERED_CHAT, LABELLED_TEXT, TrainedTask, raw_text_task
from orchestrator.tasks.registry import advised_task

PILOT_EXAMPLES = 1000
"""Labels of a pilot: enough that one standard error of the difference is about 2 points on 400 held-out rows."""
PILOT_TOKENS = 2_000_000
"""Tokens of a pilot on raw text."""
FEWEST_ASKED = 16
"""Labelled rows below which a prompt is not tried: examples would take up what is to be asked about (a judgement)."""
ASKED_SHARE = 0.5
"""Of labelled rows, held out to ask a prompt about: it needs few to show, and the more are asked the less a figure
depends on which (a judgement)."""
_METHODS: dict[Name, MethodName] = {
    **{method.strategy: method.name for method in METHODS if method.is_advised and method.strategy},
    "continued": "full",
}
_RAW_BATCH = 32
_RAW_LENGTH = 512
"""Tokens of a block of raw text: what BERT and RoBERTa were trained at, and short enough for any decoder."""
_SHORTEST_LENGTH = 32
_HELD_OUT_SHARE = 40
"""A block is at most this part of the text, so that the twentieth which is held out holds one surely."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data lies."""

    path: str
    text_column: str | None
    label_column: str | None
    delimiter: str | None = None
    """What separates fields, where someone has said so."""
    incomplete: bool = False
    """Whether rows miss a text or a class, which a training then leaves out."""
    layout: Layout | None = None
    """Where a row's text is that of several columns."""


def first_spec(advice: Recommendation, question: Question, source: Source | None, *, name: str) -> dict[str, Any]:
    """The spec as a plain mapping, ready for YAML.

    Raises SpecError when there is nothing to train, or what a spec must name is not known.
    """
    if source is None:
        raise SpecError("a spec names its data, and no dataset was given", do="add --dataset PATH")
    if source.layout is not None and not source.layout.is_conversation:
        raise SpecError(
            f"{source.path} holds {source.layout.title}, which `run` cannot train as such yet",
            got=f"the columns {', '.join(source.layout.fields)}",
            do="write prompt and answer into one column `text` for task causal-lm, and advise on that file",
        )
    wanted = _trainable(advice, question)
    if not wanted and _can_be_asked(question):
        return _common(question, source, name=name) | _asked(question, source)
    if not wanted:
        raise SpecError(
            f"{STRATEGIES[advice.leading].title} trains nothing, so there is no spec to write",
            do="try the prompt on held-out examples; --goal or more labels may change the advice",
        )
    if any(one != "scratch" for one in wanted) and (question.base is None or question.base.name is None):
        raise SpecError(
            "a spec names its base model, and only a size was given",
            got=", ".join(wanted),
            do="add --base-model PATH_OR_NAME",
        )
    found = {one.strategy: one for one in advice.candidates}
    pilot = bool(advice.rivals)
    spec = _common(question, source, name=f"{name}-pilot" if pilot else name)
    if question.labelled and not _continues_encoder(wanted[0], question):
        spec |= _labelled(question, source, [found[one] for one in wanted], pilot=pilot)
    else:
        spec |= _raw(question, source, found[wanted[0]], pilot=pilot)
    return spec


def remarks(spec: dict[str, Any], question: Question, advice: Recommendation) -> Iterator[str]:
    """What the reader of a spec must know to go on from it."""
    if question.labelled and spec["kind"] == "pretrain":
        yield (
            "first the domain's text, then its labels: add the raw text to data.train, which names the labelled texts "
            "alone, and fine-tune with model.base: runs:/ID of this run"
        )
    wanted = _trainable(advice, question)
    for method in (method_of(_method(one)) for one in advice.candidates if one.strategy in wanted):
        if method.requires is not None:
            yield f'{method.name} needs {method.requires} on every node: pip install "orchestrator[{method.name}]"'


def _method(one: Candidate) -> MethodName:
    """What carries out a candidate's strategy: beside quantised weights where it was priced so."""
    usual = _METHODS[one.strategy]
    smaller = method_of(usual).quantised
    return smaller if smaller is not None and one.method == smaller else usual


def _trainable(advice: Recommendation, question: Question) -> list[Name]:
    """The strategies that the spec carries out or compares.

    Continuing an encoder's pretraining is another task than the fine-tuning that rivals compare on, so it is left out
    beside others.
    """
    wanted = [one for one in (advice.rivals or (advice.leading,)) if one in _METHODS]
    if not question.labelled:
        return wanted
    return [one for one in wanted if not _continues_encoder(one, question)] or wanted


def _continues_encoder(strategy: Name, question: Question) -> bool:
    return strategy == "continued" and question.base is not None and question.base.is_encoder


def _masks(question: Question) -> bool:
    """Whether raw text is learnt by filling gaps."""
    return advised_task(question.task).hides_tokens or (question.base is not None and question.base.is_encoder)


def _common(question: Question, source: Source, *, name: str) -> dict[str, Any]:
    common: dict[str, Any] = {"name": name}
    if question.budget is not None:
        common["budget"] = str(question.budget)
    common["tracking"] = {"experiment": name}
    return common


def _labelled(question: Question, source: Source, wanted: list[Candidate], *, pilot: bool) -> dict[str, Any]:
    assert question.base is not None or wanted[0].strategy == "scratch"
    limit = min(question.examples, PILOT_EXAMPLES) if pilot else question.examples
    data = _rows(question, source)
    if pilot and limit < question.examples:
        data["max_train_examples"] = limit
    methods = [_method(one) for one in wanted]
    spec: dict[str, Any] = {
        "kind": "finetune",
        "model": {"base": question.base.name if question.base else None},
        "task": _labelled_task(question, source),
        "method": methods[0],
        "data": data,
        "training": {
            "epochs": _epochs(methods[0], limit),
            "global_batch": fine_tuning_batch(limit),
            "learning_rate": _rate(question, methods[0]),
            "schedule": "linear",
        },
    }
    if len(methods) > 1:
        grid = {method: _tried(method, question, limit) for method in methods}
        spec["search"] = {"space": {"method": {"grid": grid}}, "scheduler": "none"}
        if question.accuracy_hides:
            spec["search"]["metric"] = "eval/macro_f1"
    return spec


def _labelled_task(question: Question, source: Source) -> TrainedTask:
    if question.is_classification:
        return LABELLED_TEXT
    return _language_task(question) if source.layout is None else ANSWERED_CHAT


def _rows(question: Question, source: Source) -> dict[str, Any]:
    """The block `data` of labelled rows."""
    data: dict[str, Any] = {"train": source.path, "sequence_length": _cut_off(question)}
    if source.text_column:
        data["text_column"] = source.text_column
    if source.label_column:
        data["label_column"] = source.label_column
    if source.delimiter:
        data["delimiter"] = source.delimiter
    if source.incomplete:
        data["incomplete_rows"] = "leave-out"
    return data


def _can_be_asked(question: Question) -> bool:
    """Whether a prompt can be tried on labelled rows: some to show, others to ask about."""
    base = question.base
    named = base is not None and base.name is not None and not base.is_encoder
    return named and question.labelled and question.is_classification and question.examples >= FEWEST_ASKED


def _asked(question: Question, source: Source) -> dict[str, Any]:
    assert question.base is not None
    return {
        "kind": "finetune",
        "model": {"base": question.base.name},
        "task": LABELLED_TEXT,
        "method": PROMPTED,
        "data": _rows(question, source) | {"validation_fraction": ASKED_SHARE},
    }


def _cut_off(question: Question) -> int:
    """That of the rows which were measured and priced; else twice the mean, in powers of two."""
    if question.seen is not None:
        return question.seen.cut_off
    mean = 1 << max(4, (int(question.tokens_per_example * 1.25) - 1).bit_length())
    return min(LONGEST_CUT_OFF, mean)


def _epochs(method: MethodName, examples: int) -> float:
    return round(fine_tuning_epochs(examples) * method_of(method).epochs_factor, 1)


def _tried(method: MethodName, question: Question, examples: int) -> dict[str, Any]:
    """A method's own fields in a search over methods."""
    own: dict[str, Any] = {"training.learning_rate": {"grid": [_rate(question, method)]}}
    if method_of(method).epochs_factor != 1:
        own["training.epochs"] = {"grid": [_epochs(method, examples)]}
    return own


def _language_task(question: Question) -> TrainedTask:
    return raw_text_task(is_encoder=_masks(question))


def _raw(question: Question, source: Source, chosen: Candidate, *, pilot: bool) -> dict[str, Any]:
    masks = _masks(question)
    length = _block_length(question.tokens) if masks else _RAW_LENGTH
    wanted = chosen.tokens
    if question.labelled:  # the candidate's tokens are those of the labels' passes too
        wanted = min(question.unlabeled_tokens * chosen.share, SCARCE_EPOCHS * question.tokens)
    tokens = min(PILOT_TOKENS, wanted) if pilot else wanted
    data: dict[str, Any] = {"train": source.path, "sequence_length": length}
    if source.delimiter:
        data["delimiter"] = source.delimiter
    if source.text_column:
        data["text_column"] = source.text_column
    spec: dict[str, Any] = {"kind": "finetune", "task": _language_task(question), "data": data}
    if chosen.strategy == "scratch":
        spec |= {"kind": "pretrain", "model": _new_model(chosen.parameters, masks=masks)}
        rate = suggested_learning_rate(chosen.parameters).mid
    else:
        assert question.base is not None
        method = _method(chosen)
        spec |= {"model": {"base": question.base.name}, "method": method}
        if masks and method_of(method).cost.trains_all:
            spec["kind"] = "pretrain"
        rate = _rate(question, method)
    batch = int(max(1, min(_RAW_BATCH, tokens // length // 10)))
    spec["training"] = {
        "tokens": int(max(tokens, batch * length)),
        "global_batch": batch,
        "learning_rate": float(f"{rate:.2g}"),
        "schedule": "cosine",
    }
    return spec


def _block_length(text_tokens: float) -> int:
    """The usual length, halved until enough blocks are in the text to hold some out."""
    length = _RAW_LENGTH
    while length > _SHORTEST_LENGTH and length * _HELD_OUT_SHARE > text_tokens:
        length //= 2
    return length


def _new_model(parameters: int, *, masks: bool) -> dict[str, Any]:
    """The model block of new weights: a decoder like Llama, or an encoder like RoBERTa."""
    shape = standard_shape(parameters)
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
    }
    if masks:  # an MLP of two matrices where Llama's has three
        sizes["intermediate_size"] = round(1.5 * shape.intermediate)
    else:
        sizes["num_key_value_heads"] = shape.kv_heads
    config = "roberta" if masks else "llama"
    return {"config": config, "overrides": sizes, "vocab_size": min(32_000, shape.vocab)}


def _rate(question: Question, method: MethodName) -> float:
    """Learning rate of a method for the base's size."""
    size = None if question.base is None else question.base.parameters
    return float(f"{method_of(method).learning_rate(size):.2g}")
