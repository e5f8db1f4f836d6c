"""A recommendation for a person and for a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.intervals import Interval
from orchestrator.policy.advise import Recommendation
from orchestrator.policy.candidates import Candidate
from orchestrator.policy.strategies import STRATEGIES
from orchestrator.quantities import human_count, human_duration


def advice_answer(advice: Recommendation, *, next_command: str) -> dict[str, Any]:
    """The JSON of `advise`, under names that do not change."""
    return {
        "strategy": advice.strategy,
        "leading": advice.leading,
        "confidence": round(advice.confidence, 3),
        "candidates": [_candidate_answer(one) for one in advice.candidates],
        "flips": [asdict(flip) for flip in advice.flips],
        "next": next_command,
        "reasons": list(advice.reasons),
        "pilot": list(advice.rivals),
        "changed_by_history": list(advice.changed_by_history),
    }


def _candidate_answer(one: Candidate) -> dict[str, Any]:
    price, given = one.price, one.expectation

    def figures(interval: Interval | None) -> dict[str, float] | None:
        return None if interval is None else asdict(interval)

    return {
        "strategy": one.strategy,
        "feasible": one.feasible,
        "why": one.why,
        "usd": figures(price.usd if price else None),
        "gpu_hours": figures(price.gpu_hours if price else None),
        "hours": figures(price.hours if price else None),
        "peak_gib": figures(price.peak_gib if price else None),
        "loss": figures(given.loss if given else None),
        "score": figures(given.score if given else None),
        "forgetting": given.forgetting if given else None,
        "method": one.method if price else None,
        "parameters": one.parameters or None,
        "tokens": one.tokens if price else None,
        "flops": price.flops if price else None,
        "budget_share": one.share,
        "on_front": one.on_front,
        "reasons": list(given.reasons) if given else [],
    }


def advice_table(advice: Recommendation) -> Group:
    """The answer, the candidates, why, and where it would change; the next command is printed apart, unwrapped."""
    title = STRATEGIES[advice.leading].title
    if advice.strategy == "uncertain":
        rivals = " or ".join(advice.rivals)
        answer = f"uncertain: {rivals} cannot be told apart ({advice.confidence:.0%} for {advice.leading})"
    else:
        answer = f"{title} ({advice.leading}; confidence {advice.confidence:.0%})"
    return Group(
        Text(answer, style="bold"),
        Text(""),
        _figures(advice),
        Text("90 % intervals; * marks the front of quality, money, hours and memory", style="dim"),
        *_section("why", advice.reasons),
        *_section("not feasible", [f"{one.strategy}: {one.why}" for one in advice.candidates if not one.feasible]),
        *_section("it would change", [f"{flip.when}: {flip.then}" for flip in advice.flips]),
        *_section("changed by history", advice.changed_by_history),
    )


def _figures(advice: Recommendation) -> Table:
    feasible = [one for one in advice.candidates if one.feasible]
    priced = all(one.price is not None and one.price.usd is not None for one in feasible)
    kinds = {one.expectation.kind for one in feasible if one.expectation is not None}
    quality = "accuracy" if kinds == {"error"} else "loss"
    digits = 3 if quality == "loss" else _accuracy_digits(feasible)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("", "strategy", quality, "USD" if priced else "device hours", "wall time", "devices", "peak GiB"):
        table.add_column(heading, justify="left" if heading in ("", "strategy") else "right", no_wrap=True)
    for one in feasible:
        assert one.price is not None
        assert one.expectation is not None
        expected = one.expectation.score or one.expectation.loss
        assert expected is not None
        table.add_row(
            "*" if one.on_front else "",
            one.label,
            range_text(expected, digits=digits),
            range_text(one.price.usd if priced and one.price.usd else one.price.gpu_hours),
            human_duration(3600 * one.price.hours.mid),
            str(one.price.gpus) + ("" if one.price.offload == "none" else ", offload"),
            range_text(one.price.peak_gib),
        )
    return table


def _accuracy_digits(feasible: Sequence[Candidate]) -> int:
    """Two, and more where the best has more nines: 0.9993 is no 1."""
    scores = [one.expectation.score for one in feasible if one.expectation is not None]
    least_error = min((1 - score.mid for score in scores if score is not None), default=1.0)
    return max(2, math.ceil(-math.log10(max(least_error, 1e-6))))


def _section(title: str, lines: Sequence[str]) -> list[Text]:
    if not lines:
        return []
    return [Text(f"\n{title}", style="bold"), Text("\n".join(f"- {line}" for line in lines))]


def range_text(interval: Interval, *, digits: int = 2) -> str:
    """`0.82 (0.59 to 0.92)`: the middle and the ends, large figures with a suffix."""
    low, mid, high = (_figure(value, digits) for value in (interval.low, interval.mid, interval.high))
    return f"{mid} ({low} to {high})"


def _figure(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    return human_count(rounded) if abs(value) >= 1000 else f"{rounded:g}"
