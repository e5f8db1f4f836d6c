"""`advise` as a person meets it: options and a dataset to a question, the answer to a table, a page or a spec."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from orchestrator import console
from orchestrator.credentials import hide
from orchestrator.errors import SpecError, StorageError
from orchestrator.facts.domains import DOMAINS, Domain
from orchestrator.policy.advise import Recommendation, advise
from orchestrator.policy.question import GOALS, Base, Given, Question, ask, raw_text_task_of
from orchestrator.policy.views.text import advice_answer, advice_table
from orchestrator.quantities import MOST, MOST_INFERENCE, Budget, parse_budget, parse_count
from orchestrator.tasks.names import ANSWERED_CHAT, CONTINUED_TEXT, LABELLED_TEXT, TASKS
from orchestrator.tasks.registry import task_of
from orchestrator.tracking.finished_model import found_base

if TYPE_CHECKING:
    from orchestrator.data.layouts import Layout
    from orchestrator.policy.write_spec import Source

T = TypeVar("T", bound=str)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `advise`, as typed."""

    dataset: str | None
    text_column: str | None
    label_column: str | None
    delimiter: str | None
    examples: str | None
    tokens: str | None
    task: str | None
    classes: str | None
    labels_per_class: str | None
    base_model: str | None
    base_params: str | None
    base_tokens: str | None
    no_base_model: bool
    domain_distance: str | None
    unlabeled_tokens: str | None
    budget: str | None
    gpu: str | None
    gpus: int | None
    goal: str
    inference_tokens: str | None
    history: str | None


def advise_command(options: Options, *, write_spec: Path | None, report: Path | None, as_json: bool) -> None:
    """Answers, and writes what was asked for; raises what is wrong with the options, the dataset or the base."""
    given, source = read_options(options)
    question = ask(given)
    if options.history is not None:
        question = _learnt(question, options.history, source)
    advice = advise(question)
    next_command = next_step(advice, question, source, written=write_spec, arguments=sys.argv[1:])
    if write_spec is not None:
        _write_spec(write_spec, advice, question, source)
    if report is not None:
        from orchestrator.policy.views.html import write_advice_report

        write_advice_report(report, advice, question, next_command=next_command)
    if as_json:
        console.print_json(advice_answer(advice, next_command=next_command))
        return
    console.print_table(advice_table(advice))
    console.print_lines(f"\nnext\n  {next_command}")
    for path in (write_spec, report):
        if path is not None:
            console.print_lines(f"\nwritten: {path}")


def read_options(options: Options) -> tuple[Given, Source | None]:
    """What the user states, measured data included. Raises SpecError, DataError or ModelError."""
    _refuse_contradictions(options)
    task = _one_of(options.task, TASKS, option="--task")
    domain: Domain | None = _one_of(options.domain_distance, DOMAINS, option="--domain-distance")
    base = _base(options)
    given = Given(
        task=task,
        examples=_count(options.examples, "--examples", least=0),
        tokens=_count(options.tokens, "--tokens"),
        classes=_count(options.classes, "--classes", least=2),
        labels_per_class=_count(options.labels_per_class, "--labels-per-class"),
        base=base,
        base_tokens=_count(options.base_tokens, "--base-tokens"),
        no_base=options.no_base_model,
        domain=domain,
        unlabeled_tokens=_count(options.unlabeled_tokens, "--unlabeled-tokens", least=0),
        budget=_budget(options.budget),
        gpu=options.gpu,
        gpus=options.gpus,
        goal=_one_of(options.goal, GOALS, option="--goal") or "quality",
        inference_tokens=_count(options.inference_tokens, "--inference-tokens", least=0, most=MOST_INFERENCE),
    )
    if options.dataset is None:
        return given, None
    return _measured(options.dataset, given, options)


def next_step(
    advice: Recommendation, question: Question, source: Source | None, *, written: Path | None, arguments: Sequence[str]
) -> str:
    """The command that comes next; it runs as printed."""
    if written is not None:
        return shlex.join(["orchestrator", "run", str(written)])
    best = advice.candidates[0]
    wanted = advice.rivals or (advice.leading,)
    trains = source is not None and source.layout is None and any(name != "prompt" for name in wanted)
    if trains and (question.base is None or question.base.name is not None):
        file = "pilot.yaml" if advice.rivals else "advice.yaml"
        again = [one for one in arguments if one != "--json"]
        return f"{shlex.join(['orchestrator', *map(hide, again), '--write-spec', file])} && orchestrator run {file}"
    assert best.price is not None
    command = [
        "orchestrator",
        "estimate",
        "--params",
        str(best.parameters),
        "--tokens",
        str(max(1, round(best.tokens))),
    ]
    command += ["--gpu", question.device.name, "--gpus", str(best.price.gpus), "--method", best.method]
    return shlex.join(command)


def _refuse_contradictions(options: Options) -> None:
    if options.dataset is not None:
        for option, value in (("--examples", options.examples), ("--tokens", options.tokens)):
            if value is not None:
                raise SpecError(
                    f"{option} and --dataset both say how much data there is",
                    got=f"--dataset {options.dataset} {option} {value}",
                    do="leave one of them out: a dataset is measured",
                )
    if options.base_model is not None and options.base_params is not None:
        raise SpecError(
            "--base-model and --base-params both say how large the base is",
            got=f"--base-model {options.base_model} --base-params {options.base_params}",
            do="leave one of them out: a model's size is read from its configuration",
        )
    if options.no_base_model and (options.base_model or options.base_params or options.base_tokens):
        raise SpecError("--no-base-model says there is none, and a base model is given too", do="leave one of them out")


def _measured(path: str, given: Given, options: Options) -> tuple[Given, Source]:
    """What is given, with what the dataset says of itself and of its distance to the base."""
    from orchestrator.facts.measure import measure_against
    from orchestrator.facts.row_lengths import fine_tuning_batch
    from orchestrator.policy.dataset_notes import exact_duplicates, notes_on
    from orchestrator.policy.write_spec import Source

    measurement = measure_against(
        path,
        None if options.base_model is None else found_base(options.base_model),
        text_column=options.text_column,
        label_column=options.label_column,
        delimiter=_delimiter(options.delimiter),
        task=given.task,
    )
    facts, distance = measurement.facts, measurement.distance
    layout, context = facts.columns.layout, None if given.base is None else given.base.context
    if layout is not None:
        _refuse_encoder(given.base, layout, path)
    filled = replace(
        given,
        task=given.task or (LABELLED_TEXT if facts.is_classified else raw_text_task_of(given.base)),
        tokens=facts.token_count.tokens.mid,
        domain=given.domain or (None if given.no_base else distance.kind),
    )
    if facts.is_classified:
        examples = max(1, round(facts.labelled_examples.mid))
        seen = facts.row_lengths.seen(context=context, batch=fine_tuning_batch(examples))
        filled = replace(
            filled,
            examples=examples,
            classes=len(facts.classes),
            tokens=examples * seen.padded_tokens,
            seen=seen,
            commonest=facts.classes[0].share,
        )
    elif layout is not None:
        task = ANSWERED_CHAT if layout.is_conversation else CONTINUED_TEXT
        filled = replace(filled, task=task, examples=max(1, round(facts.examples.mid)))
    else:
        filled = replace(filled, tokens=facts.token_count.tokens.mid * (1 - exact_duplicates(facts)))
    notes = list(notes_on(facts, seen=filled.seen, context=context))
    if given.domain is None and not given.no_base:
        notes.append(f"domain {distance.kind}, by {distance.method}: {distance.reason}")
    source = Source(
        path=path,
        text_column=facts.columns.text,
        label_column=facts.columns.label,
        delimiter=options.delimiter,
        incomplete=facts.is_classified and facts.labelled_share < 1,
        layout=layout,
    )
    return replace(filled, measured=tuple(notes)), source


def _delimiter(given: str | None) -> str | None:
    if given is None:
        return None
    from orchestrator.spec_data import as_delimiter

    try:
        return as_delimiter(given)
    except ValueError as error:
        raise SpecError(f"--delimiter {error}", got=repr(given)) from error


def _refuse_encoder(base: Base | None, layout: Layout, path: str) -> None:
    if base is not None and base.is_encoder:
        raise SpecError(
            f"{path} holds {layout.title}, and an encoder writes no answers",
            got=f"--base-model {base.name}, and the columns {', '.join(layout.fields)}",
            allowed="a causal language model as the base",
            do="give another --base-model"
            + (
                "" if layout.plain is None else f", or --text-column {layout.plain} --task masked-lm for its text alone"
            ),
        )


def _base(options: Options) -> Base | None:
    if options.base_params is not None:
        parameters = _count(options.base_params, "--base-params")
        assert parameters is not None
        return Base(parameters=parameters, tokens=0.0)
    if options.base_model is None:
        return None
    from orchestrator.architectures.families import ENCODERS, model_config, model_shape
    from orchestrator.spec import ModelSpec

    config = model_config(ModelSpec(base=found_base(options.base_model)))
    is_encoder = config["model_type"] in ENCODERS
    shape = model_shape(config, task=task_of(LABELLED_TEXT if is_encoder else CONTINUED_TEXT))
    parameters = shape.parameters - shape.head_parameters
    return Base(
        parameters=parameters, tokens=0.0, name=options.base_model, is_encoder=is_encoder, context=shape.context
    )


def _count(text: str | None, option: str, *, least: int = 1, most: int = MOST) -> int | None:
    """A number as people write them; raises SpecError."""
    if text is None:
        return None
    value = 0 if text.strip() in ("0", "0.0") else parse_count(text)
    if not isinstance(value, int) or value < least:
        raise SpecError(
            f"{option} is a whole number of {least} or more",
            got=text,
            allowed="such as 2000, 2k, 1.5M, 10B or 1e12",
            do=f"give {option} as one of these",
        )
    if value > most:
        raise SpecError(f"{option} is beyond all use", got=text, allowed=f"up to {most:.0e}")
    return value


def _budget(text: str | None) -> Budget | None:
    if text is None:
        return None
    try:
        return parse_budget(text)
    except ValueError as error:
        raise SpecError(
            "--budget cannot be read",
            got=text,
            allowed="500usd, 100gpu-hours, 1e20flops, 8hours",
            do="give a number above zero and one of these units",
        ) from error


def _one_of(value: str | None, allowed: tuple[T, ...], *, option: str) -> T | None:
    if value is None:
        return None
    for one in allowed:
        if value == one:
            return one
    raise SpecError(f"{option} is none of its values", got=value, allowed=", ".join(allowed), do="choose one of these")


def _learnt(question: Question, uri: str, source: Source | None) -> Question:
    from orchestrator.policy.apply_history import learn
    from orchestrator.policy.corrections import corrections
    from orchestrator.tracking.past_runs import read_history

    return learn(question, corrections(read_history(uri).records), data=None if source is None else source.path)


def _write_spec(path: Path, advice: Recommendation, question: Question, source: Source | None) -> None:
    """Writes the spec and reads it back, so that what is printed next runs."""
    import yaml

    from orchestrator.load_spec import load_spec
    from orchestrator.policy.write_spec import first_spec, remarks

    name = path.stem.replace("_", "-").lower()
    spec = first_spec(advice, question, source, name=name)
    lines = [f"# {reason}" for reason in (*advice.reasons, *remarks(spec, question, advice))]
    text = "\n".join([*lines, f"#   orchestrator run {path}", yaml.safe_dump(spec, sort_keys=False)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            "the spec cannot be written", got=f"{path} ({error.strerror})", do="give another --write-spec"
        ) from error
    load_spec(path)
