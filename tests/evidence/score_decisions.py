"""Advice against published decisions: `python -m tests.evidence.score_decisions` prints every case and the score.

A case is the command line that its paper's situation amounts to. Right is an accepted strategy; where a paper found a
tie, either of the tied, or `uncertain`. An `uncertain` that names an accepted strategy among its rivals is half right
where the paper was certain. For models from scratch the size must come within a factor 1.6 too.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.commands.advise import Options, read_options
from orchestrator.policy.advise import Recommendation, advise
from orchestrator.policy.question import Question, ask

PATH = Path(__file__).with_name("decisions.csv")
SIZE_FACTOR = 1.6


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    options: str
    accepted: tuple[str, ...]
    size: float | None
    """Published parameters of a model from scratch."""
    published: str
    split: str
    """`given`, or `further`: written down when the advisor stood, from memory."""

    @property
    def question(self) -> Question:
        return ask(read_options(options_of(self.options))[0])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    case: Case
    advice: Recommendation
    points: float
    """1, 0.5 or 0."""


def cases(split: str | None = None) -> list[Case]:
    """The decisions of a split, or all, that the options can state."""
    with PATH.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["options"] and split in (None, row["split"])]
    found = []
    for row in rows:
        accepted, _, size = row["accepted"].partition(":")
        found.append(
            Case(
                name=row["case"],
                options=row["options"],
                accepted=tuple(accepted.split("|")),
                size=float(size) if size else None,
                published=row["published"],
                split=row["split"],
            )
        )
    return found


def options_of(line: str) -> Options:
    """The options of `advise` on a command line."""
    words = shlex.split(line)
    typed: dict[str, Any] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            following = words[number + 1] if number + 1 < len(words) else "--"
            typed[word[2:].replace("-", "_")] = True if following.startswith("--") else following
    if "gpus" in typed:
        typed["gpus"] = int(typed["gpus"])
    empty = dict.fromkeys(one.name for one in fields(Options)) | {"no_base_model": False, "goal": "quality"}
    return Options(**{**empty, **typed})


def judge(case: Case) -> Verdict:
    advice = advise(case.question)
    right = advice.strategy in case.accepted
    if right and case.size is not None:
        right = 1 / SIZE_FACTOR <= advice.candidates[0].parameters / case.size <= SIZE_FACTOR
    points = 1.0 if right else 0.0
    if advice.strategy == "uncertain":
        named = set(advice.rivals) & set(case.accepted)
        points = 1.0 if "uncertain" in case.accepted or (named and len(case.accepted) > 1) else 0.5 if named else 0.0
    return Verdict(case=case, advice=advice, points=points)


def share_right(verdicts: Iterable[Verdict]) -> float:
    points = [one.points for one in verdicts]
    return sum(points) / len(points)


def baseline(strategy: str, split: str | None = None) -> float:
    """Share right of always answering the same."""
    every = cases(split)
    return sum(strategy in case.accepted for case in every) / len(every)


def resized(question: Question, factor: float) -> Question:
    """The question with all its sizes changed."""
    base = question.base
    if base is not None:
        base = replace(base, parameters=round(base.parameters * factor), tokens=base.tokens * factor)
    return replace(question.resized(factor), base=base, unlabeled_tokens=question.unlabeled_tokens * factor)


def main() -> None:
    verdicts = [judge(case) for case in cases()]
    for one in verdicts:
        mark = {1.0: "right", 0.5: "half", 0.0: "WRONG"}[one.points]
        accepted = "|".join(one.case.accepted)
        rivals = f" ({' or '.join(one.advice.rivals)})" if one.advice.rivals else ""
        print(f"{mark:6} {one.case.name:28} {one.advice.strategy + rivals:30} accepted {accepted}")
    for split in ("given", "further"):
        of_it = [one for one in verdicts if one.case.split == split]
        always = ", ".join(f"always {name} {baseline(name, split):.0%}" for name in ("peft", "full", "prompt"))
        print(f"decisions {split}: {share_right(of_it):.0%} of {len(of_it)} right (target 85 %); {always}")


if __name__ == "__main__":
    main()
