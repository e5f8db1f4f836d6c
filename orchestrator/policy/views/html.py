"""A recommendation as one HTML file that needs no network: the answer, the candidates, two pictures, and the reasons.

Called by `advise --report`. matplotlib is loaded only here, when the pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from orchestrator.page import listing, picture, write_page
from orchestrator.policy.advise import Recommendation
from orchestrator.policy.candidates import Candidate
from orchestrator.policy.citations import cited
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import STRATEGIES
from orchestrator.policy.views.pictures import STRATEGY_STYLE, curves_picture, front_picture
from orchestrator.policy.views.sweep import sweep
from orchestrator.policy.views.text import range_text
from orchestrator.quantities import human_count, human_duration

_STYLE = """
p.answer { font-size: 1.15rem; margin: .75rem 0 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: #666; }
dd { margin: 0; }
p.note { color: #666; font-size: .9rem; margin: .6rem 0 0; }
td.strategy { white-space: nowrap; }
tr.advised td.strategy { font-weight: 600; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
pre { background: #f4f4f4; padding: .6rem .8rem; border-radius: 3px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_HEADINGS = ("strategy", "expected", "device hours", "US dollars", "wall time", "peak GiB", "front")


def write_advice_report(path: Path, advice: Recommendation, question: Question, *, next_command: str) -> None:
    """Write the page: what was asked, the answer with everything it rests on, and what to do next.

    Raises StorageError when the file cannot be written, and what `candidates` raises.
    """
    title = f"Advice: {advice.leading}" if advice.strategy != "uncertain" else "Advice: uncertain"
    write_page(path, title=title, body=_body(advice, question, next_command), style=_STYLE)


def _body(advice: Recommendation, question: Question, next_command: str) -> Iterator[str]:
    yield f'<h1>What should I do?</h1><p class="answer">{escape(_answer(advice))}</p>'
    yield _facts(question)
    yield listing("What was assumed", question.assumed)
    yield f"<h2>The candidates</h2>{_table(advice)}"
    yield (
        '<p class="note">Middles with 90 % intervals. Front: nothing feasible is better in quality, money, hours and '
        "memory together.</p>"
    )
    yield listing("What each risks", _risks(advice))
    yield listing("What cannot be done", _infeasible(advice))
    yield picture(
        "What each strategy should give, and what it costs",
        front_picture(advice.candidates),
        kind="svg+xml",
        shows="The table's expected quality drawn against its cost",
    )
    yield (
        '<p class="note">Points of about equal cost stand side by side. How hard the task is counts for all strategies '
        "alike, so whole intervals overlap more than the strategies do; only the thick parts tell them apart.</p>"
    )
    yield from _curves(advice, question)
    yield listing("Why", _reasons(advice, question))
    yield listing("Where it would change", (f"{flip.when}: {flip.then}" for flip in advice.flips))
    yield listing("What past runs changed", advice.changed_by_history)
    yield listing("What it rests on", _sources(advice, question))
    yield f"<h2>Next</h2><pre>{escape(next_command)}</pre>"


def _answer(advice: Recommendation) -> str:
    title = STRATEGIES[advice.leading].title
    if advice.strategy == "uncertain":
        return (
            f"It is uncertain: {' or '.join(advice.rivals)} cannot be told apart by what is known. The best guess is "
            f"to {title} (confidence {advice.confidence:.0%}); the next command is the cheapest experiment to tell."
        )
    return f"{title[0].upper()}{title[1:]} ({advice.leading}; confidence {advice.confidence:.0%})."


def _facts(question: Question) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _asked(question))
    return f"<dl>{rows}</dl>"


def _asked(question: Question) -> Iterator[tuple[str, str]]:
    """(what, how much) of the question, only what there is."""
    yield "task", question.task + (f", {question.classes} classes" if question.is_classification else "")
    if question.labelled:
        yield "data", f"{human_count(question.examples)} examples, {human_count(question.tokens)} tokens"
    elif question.tokens:
        yield "data", f"{human_count(question.tokens)} tokens of raw text"
    if question.unlabeled_tokens:
        yield "raw text of the domain", f"{human_count(question.unlabeled_tokens)} tokens"
    base = question.base
    if base is None:
        yield "base model", "none"
    else:
        size = f"{human_count(base.parameters)} parameters trained on {human_count(base.tokens)} tokens"
        yield "base model", size if base.name is None else f"{base.name}: {size}"
        yield "the data's domain", f"{question.domain} as seen from the base model"
    yield "budget", "none" if question.budget is None else str(question.budget)
    yield "devices", f"{question.device.name}, {question.gpus or 'as many as the memory asks for'}"
    yield "goal", question.goal
    if question.inference_tokens:
        yield "tokens to serve", human_count(question.inference_tokens)


def _table(advice: Recommendation) -> str:
    head = "".join(f'<th class="{_cell_class(name)}">{escape(name)}</th>' for name in _HEADINGS)
    lines = [f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>']
    for one in advice.candidates:
        if not one.feasible:
            continue
        cells = "".join(
            f'<td class="{_cell_class(name)}">{cell}</td>' for name, cell in zip(_HEADINGS, _cells(one), strict=True)
        )
        lines.append(f'<tr class="{"advised" if one.strategy == advice.leading else ""}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell_class(heading: str) -> str:
    return heading if heading == "strategy" else "number"


def _cells(one: Candidate) -> tuple[str, ...]:
    """The row's cells as HTML, in the order of `_HEADINGS`."""
    assert one.price is not None
    assert one.expectation is not None
    quality = one.expectation.score or one.expectation.loss
    assert quality is not None
    labelled = one.expectation.kind == "error"
    expected = f"{'accuracy' if labelled else 'loss'} {range_text(quality, digits=2 if labelled else 3)}"
    dot = f'<span class="dot" style="background: {STRATEGY_STYLE[one.strategy][0]}"></span>'
    devices = f" on {one.price.gpus}" if one.price.gpus > 1 else ""
    return (
        f"{dot}{escape(one.label)}",
        expected,
        range_text(one.price.gpu_hours),
        "not known" if one.price.usd is None else range_text(one.price.usd),
        human_duration(3600 * one.price.hours.mid) + devices,
        range_text(one.price.peak_gib),
        "yes" if one.on_front else "",
    )


def _risks(advice: Recommendation) -> Iterator[str]:
    return (f"{one.strategy}: {STRATEGIES[one.strategy].risks}" for one in advice.candidates if one.feasible)


def _infeasible(advice: Recommendation) -> Iterator[str]:
    return (f"{one.strategy}: {one.why}" for one in advice.candidates if not one.feasible)


def _curves(advice: Recommendation, question: Question) -> Iterator[str]:
    swept = sweep(question)
    if swept is None:
        return
    along = f"with more or fewer {swept.what}" if swept.what in ("labels", "tokens") else "with more or less budget"
    yield picture(f"What each strategy should give {along}", curves_picture(swept, advice.flips), kind="svg+xml")
    yield (
        '<p class="note">Middles only. Above the curves: what would be advised. Of strategies that are tied as far as '
        "is known, the one that needs fewer resources is advised, so it need not be the best line. A line ends where "
        "its strategy would no longer fit the memory or the budget.</p>"
    )


def _reasons(advice: Recommendation, question: Question) -> Iterator[str]:
    stated = {f"assumed: {sentence}" for sentence in question.assumed}  # they have a section of their own
    return (reason for reason in advice.reasons if reason not in stated)


def _sources(advice: Recommendation, question: Question) -> Iterator[str]:
    yield from (f"{name}: {description}" for name, description in cited(advice.reasons))
    device = question.device
    runs = device.utilization.runs
    behind = f"{runs} published trainings" if runs else "a judgement; no published trainings on such a device"
    yield f"time on {device.name}: {behind} (configs/devices.yaml); its figures: {device.source}"
    if device.usd_per_hour is not None:
        yield f"money: {device.usd_per_hour:g} US dollars for a device hour (configs/devices.yaml)"
