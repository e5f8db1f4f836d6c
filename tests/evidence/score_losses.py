"""Losses of the laws against published ones: `python -m tests.evidence.score_losses` prints every row and the score.

A corpus and its vocabulary shift all losses, so a law is scored on what it can know: the level of a run from the other
runs on its corpus (one factor per corpus, the run itself left out), and how much worse repeated data makes it.
`losses.csv` holds the Cerebras-GPT models, and of Muennighoff's notebook every single-seed run of at least 1.5B
tokens, at least 400M of them unique, with a run on fresh data beside it.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.intervals import Interval
from orchestrator.policy.language_quality import language_expectation
from orchestrator.policy.laws.scaling import REFIT, repeated_loss
from orchestrator.policy.laws.sizing import data_constrained_optimal
from orchestrator.policy.question import Given, ask

EVIDENCE = Path(__file__).with_name("losses.csv")
HURT, OVERFITTED = 1.02, 1.25
"""A repeated run so many times worse than on fresh data was hurt, or overfitted, which no law of the advisor covers."""
BEST_SIZES = (
    ("6.34B rather than 8.67B on 25B unique tokens", 9.2e21, 25e9, 6.34e9),
    ("619M the best on 1.5B unique tokens", 8.17e19, 1.5e9, 6.187e8),
    ("146M the best on 100M unique tokens", 5.19e18, 1e8, 1.465e8),
)
"""(name, FLOPs, unique tokens, parameters) by Muennighoff 2023, README and notebook; measured, not predicted."""

Predictor = Callable[[float, float], float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published pretraining."""

    name: str
    corpus: str
    parameters: float
    tokens: float
    unique_tokens: float
    loss: float

    @property
    def in_range(self) -> bool:
        """Whether the default law was fitted on such sizes."""
        flops = 6 * self.parameters * self.tokens
        return not REFIT.fitted.outside(parameters=self.parameters, tokens=self.tokens, flops=flops)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The best measured size for compute and unique tokens, beside the law's."""

    name: str
    published: float
    predicted: float
    unconstrained: float
    """Of the same law when every token counts as fresh."""


@dataclass(frozen=True, kw_only=True)
class LossScore:
    """Median absolute errors in the logarithm of the loss, that is, relative ones."""

    level_error: float
    """Of runs on fresh data, given the other runs on the same corpus."""
    kaplan_level_error: float
    mean_level_error: float
    """Of saying that every run on a corpus ends where the others do on average."""
    hurt_error: float
    """Of what repeating does to the loss, over runs that it made 2 to 25 % worse."""
    hurt_as_fresh_error: float
    """Of counting a repeated token like a fresh one, over the same runs."""
    hurt_worthless_error: float
    """Of counting unique tokens only."""
    unhurt_error: float
    """Of the law, over runs that repeating made at most 2 % worse; there counting as fresh is right to 2 %."""
    overfitted: int
    """Repeated runs beyond what any law here covers, left out of the figures above."""
    coverage: float
    """Share of fresh runs within the 90 % interval that `advise` gives, which knows nothing of the corpus."""
    fresh: tuple[Run, ...]
    repeated: tuple[tuple[Run, float, float], ...]
    """(run, published ratio to fresh, predicted ratio)."""
    sizes: tuple[Size, ...]


def read_runs() -> list[Run]:
    """All rows of the evidence."""
    with EVIDENCE.open(newline="", encoding="utf-8") as stream:
        return [
            Run(
                name=raw["name"],
                corpus=raw["corpus"],
                parameters=float(raw["params"]),
                tokens=float(raw["tokens"]),
                unique_tokens=float(raw["unique_tokens"]),
                loss=float(raw["loss"]),
            )
            for raw in csv.DictReader(stream)
        ]


def kaplan_loss(parameters: float, tokens: float) -> float:
    """L(N, D) of Kaplan 2020, arXiv 2001.08361, equation 1.5; the first law that people reach for."""
    return float(((8.8e13 / parameters) ** (0.076 / 0.095) + 5.4e13 / tokens) ** 0.095)


def level_errors(runs: Sequence[Run], predict: Predictor) -> list[float]:
    """Absolute log error of each run, when the corpus' factor is learnt from its other runs."""
    residual = {run.name: math.log(run.loss / predict(run.parameters, run.tokens)) for run in runs}
    return [
        abs(residual[run.name] - statistics.mean(others))
        for run in runs
        if (others := [residual[o.name] for o in runs if o.corpus == run.corpus and o is not run])
    ]


def repeated_ratios(runs: Sequence[Run]) -> list[tuple[Run, float, float]]:
    """(run, published ratio, predicted ratio) of each run on repeated data to its fresh counterpart."""
    fresh = {(run.corpus, run.parameters, run.tokens): run.loss for run in runs if run.unique_tokens >= run.tokens}
    return [
        (
            run,
            run.loss / fresh[run.corpus, run.parameters, run.tokens],
            repeated_loss(run.parameters, run.tokens, run.unique_tokens) / _on_fresh(run),
        )
        for run in runs
        if run.unique_tokens < run.tokens
    ]


def _on_fresh(run: Run) -> float:
    return repeated_loss(run.parameters, run.tokens, run.tokens)


def best_sizes() -> tuple[Size, ...]:
    """The measured optima under scarce data."""
    return tuple(
        Size(
            name=name,
            published=published,
            predicted=data_constrained_optimal(flops, unique).parameters,
            unconstrained=REFIT.optimal(flops).parameters,
        )
        for name, flops, unique, published in BEST_SIZES
    )


def advised_loss(run: Run) -> Interval:
    """What `advise` says of new weights of a run's size, trained on its tokens."""
    question = ask(Given(task="causal-lm", tokens=run.unique_tokens, no_base=True))
    found = language_expectation("scratch", question, parameters=round(run.parameters), tokens=run.tokens).loss
    assert found is not None, "raw text has a loss"
    return found


def score() -> LossScore:
    """Scores the laws on all rows."""
    runs = read_runs()
    fresh = [run for run in runs if run.unique_tokens >= run.tokens and run.in_range]
    repeated = repeated_ratios(runs)
    hurt = [(run, published, predicted) for run, published, predicted in repeated if HURT < published < OVERFITTED]
    unhurt = [(published, predicted) for _, published, predicted in repeated if published <= HURT]
    intervals = [advised_loss(run) for run in fresh]
    worthless = [
        repeated_loss(run.parameters, run.unique_tokens, run.unique_tokens) / _on_fresh(run) / published
        for run, published, _ in hurt
    ]
    return LossScore(
        level_error=statistics.median(level_errors(fresh, REFIT.loss)),
        kaplan_level_error=statistics.median(level_errors(fresh, kaplan_loss)),
        mean_level_error=statistics.median(level_errors(fresh, lambda parameters, tokens: 1.0)),
        hurt_error=statistics.median(abs(math.log(predicted / published)) for _, published, predicted in hurt),
        hurt_as_fresh_error=statistics.median(math.log(published) for _, published, _ in hurt),
        hurt_worthless_error=statistics.median(abs(math.log(ratio)) for ratio in worthless),
        unhurt_error=statistics.median(abs(math.log(predicted / published)) for published, predicted in unhurt),
        overfitted=len(repeated) - len(hurt) - len(unhurt),
        coverage=statistics.mean(
            interval.low <= run.loss <= interval.high for interval, run in zip(intervals, fresh, strict=True)
        ),
        fresh=tuple(fresh),
        repeated=tuple(repeated),
        sizes=best_sizes(),
    )


def main() -> None:
    """Prints the rows and the score."""
    result = score()
    print(f"{'fresh data':<26}{'published':>10}{'law':>8}{'log ratio':>11}")
    for run in result.fresh:
        law = REFIT.loss(run.parameters, run.tokens)
        print(f"{run.name:<26}{run.loss:>10.3f}{law:>8.3f}{math.log(run.loss / law):>+11.3f}")
    print(f"\n{'repeated data':<26}{'epochs':>10}{'published':>10}{'law':>8}  times the loss on fresh data")
    for run, published, predicted in result.repeated:
        print(f"{run.name:<26}{run.tokens / run.unique_tokens:>10.1f}{published:>10.3f}{predicted:>8.3f}")
    print(f"\n{'best size under scarce data':<48}{'published':>10}{'law':>8}{'fresh':>8}")
    for size in result.sizes:
        figures = (size.published, size.predicted, size.unconstrained)
        print(f"{size.name:<48}{figures[0]:>10.2e}{figures[1]:>8.1e}{figures[2]:>8.1e}")
    print(
        f"\nlevel, from the corpus' other runs: {result.level_error:.1%} "
        f"(Kaplan {result.kaplan_level_error:.1%}, their mean {result.mean_level_error:.1%}; {len(result.fresh)} runs)"
        f"\nrepetition that hurts: {result.hurt_error:.1%} (counted as fresh {result.hurt_as_fresh_error:.1%}, "
        f"as worthless {result.hurt_worthless_error:.1%}); that does not: {result.unhurt_error:.1%}; "
        f"{result.overfitted} of {len(result.repeated)} runs overfitted"
        f"\nunknown corpus, inside the 90 % interval: {result.coverage:.0%}"
    )


if __name__ == "__main__":
    main()
