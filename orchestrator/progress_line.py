"""The line that tells where a run stands, as a driver prints it and as it is read again from a job's log. Pure.

    step 40/200  loss 3.2100  12.3k tokens/s  ETA 1m05s  spent 0.12usd of 5usd  eval/loss 3.3000  saving

and for a search, whenever a trial has ended,

    trials 3/12  ETA 31m02s  spent 0.12usd of 5usd

`console` prints it, on a terminal over itself and in a log on a line of its own; `orchestrator jobs` knows no more of a
run than this. A driver that waits for the cluster says so in a line that begins with `waiting for room`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.quantities import human_count, human_duration

_ON_THE_LINE = ("eval/loss", "eval/accuracy", "eval/macro_f1")
_ALIKE = 0.02  # of accuracy and macro-F1: classes of one size differ by less. A guess.
_NUMBER = r"[0-9][0-9.e+-]*"
_STEP = re.compile(r"(step|trials) ([0-9]+)/([0-9]+)(?:  |$)")
_LOSS = re.compile(r"  loss (\S+)")
_SPEED = re.compile(rf"  ({_NUMBER})([kMBT]?) tokens/s")
_ETA = re.compile(r"  ETA (?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
_SPENT = re.compile(rf"  spent ({_NUMBER})([a-z-]+)(?: of ({_NUMBER})([a-z-]+))?")
_EVALUATION = re.compile(r"  (eval/\w+) (\S+)")
_PHASE = re.compile(r"  ([a-z]+)$")
_TRIAL = re.compile(r"trial (\S+) step ([0-9]+): ")
_WAITING = "waiting for room"
_PLACE = re.compile(r"\bplace ([0-9]+) in the queue")
_SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def describe(progress: Mapping[str, Any]) -> str:
    """The line of a `Progress` as a mapping."""
    metrics = progress["metrics"]
    parts = [f"step {progress['step']}/{progress['steps']}"]
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.4f}")
        parts.append(f"{human_count(progress['tokens_per_second'])} tokens/s")
    if progress["phase"] == "training" and round(progress["eta_s"]):
        parts.append(f"ETA {human_duration(progress['eta_s'])}")
    if progress.get("spent"):
        budget = progress.get("budget")
        parts.append(f"spent {progress['spent']:.3g}{progress['unit']}" + (f" of {budget}" if budget else ""))
    parts += [f"{name} {value:.4f}" for name, value in telling(metrics).items() if name in _ON_THE_LINE]
    if progress["phase"] != "training":
        parts.append(progress["phase"])
    return "  ".join(parts)


def describe_search(ended: int, trials: int, *, eta_s: float, spent: float, unit: str, budget: str | None) -> str:
    """The line of a search: how many of its trials have ended, seconds to its end, and what all have cost so far."""
    parts = [f"trials {ended}/{trials}"]
    if round(eta_s):
        parts.append(f"ETA {human_duration(eta_s)}")
    if spent:
        parts.append(f"spent {spent:.3g}{unit}" + (f" of {budget}" if budget else ""))
    return "  ".join(parts)


def telling(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation; F1 only where it says other than the accuracy, as with unequal classes."""
    found = {name: value for name, value in metrics.items() if name.startswith(("eval/", "test/"))}
    for of in ("eval", "test"):
        for name in (f"{of}/macro_f1", f"{of}/weighted_f1"):
            both = found.get(name), found.get(f"{of}/accuracy")
            if both[0] is not None and both[1] is not None and abs(both[0] - both[1]) < _ALIKE:
                del found[name]
    return found


def parse(line: str) -> dict[str, Any] | None:
    """The `Progress` that a line tells of, to the digits that it shows; None for any other line."""
    step = _STEP.match(line)
    if step is None or step[1] != "step":
        return None
    return {**_costs(line), **_of_training(line), "step": int(step[2]), "steps": int(step[3])}


def parse_search(line: str) -> dict[str, Any] | None:
    """What the line of a search tells: `ended` of so many `trials`, `eta_s`, `spent`, `unit` and `budget`; None for any
    other line."""
    trials = _STEP.match(line)
    if trials is None or trials[1] != "trials":
        return None
    return {**_costs(line), "ended": int(trials[2]), "trials": int(trials[3])}


def _of_training(line: str) -> dict[str, Any]:
    loss, speed = (form.search(line) for form in (_LOSS, _SPEED))
    metrics = {name: _number(value) for name, value in _EVALUATION.findall(line)}
    if loss is not None:
        metrics = {"train/loss": _number(loss[1]), **metrics}
    phase = _PHASE.search(line)
    return {
        "tokens_per_second": 0.0 if speed is None else float(speed[1]) * _SCALES[speed[2]],
        "metrics": metrics,
        "phase": "training" if phase is None else phase[1],
    }


def _costs(line: str) -> dict[str, Any]:
    eta, spent = (form.search(line) for form in (_ETA, _SPENT))
    hours, minutes, seconds = (int(part or 0) for part in (eta.groups() if eta else (0, 0, 0)))
    return {
        "eta_s": float(3600 * hours + 60 * minutes + seconds),
        "spent": 0.0 if spent is None else float(spent[1]),
        "unit": "usd" if spent is None else spent[2],
        "budget": f"{spent[3]}{spent[4]}" if spent is not None and spent[3] is not None else None,
    }


def _number(text: str) -> float:
    """A figure of the line; not a number where it is none, as in a line that was torn."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a driver's output says of where its run stands; None and empty for what it does not say."""

    progress: Mapping[str, Any] | None = None
    """The newest, as `parse` gives it."""
    search: Mapping[str, Any] | None = None
    """Of a search: the newest, as `parse_search` gives it."""
    trial: str | None = None
    """Of a search: the trial that reported last, with its step."""
    waits: bool = False
    """Whether the last thing said is that it waits for the cluster to have room."""
    place: int | None = None
    """In the queue for that room."""
    doing: str = ""
    """What was said since the newest of these figures."""


def standing(lines: Iterable[str]) -> Standing:
    """Where a run stands, from the lines of its output in order."""
    progress: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    trial: str | None = None
    waiting: str | None = None
    doing = ""
    for line in lines:
        if (found := parse(line)) is not None:
            progress, waiting, doing = found, None, ""
        elif (told := parse_search(line)) is not None:
            search, waiting, doing = told, None, ""
        elif (reported := _TRIAL.match(line)) is not None:
            trial, waiting, doing = f"{reported[1]} step {reported[2]}", None, ""
        elif line.startswith(_WAITING):
            waiting = line
        elif line.strip() and not line.startswith((" ", "note:")):
            doing, waiting = line, None
    place = None if waiting is None else _PLACE.search(waiting)
    return Standing(
        progress=progress,
        search=search,
        trial=trial,
        waits=waiting is not None,
        place=None if place is None else int(place[1]),
        doing=waiting or doing,
    )
