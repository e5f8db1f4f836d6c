"""`make evidence`: the advisor and the planner against published figures, beside the trivial answers.

python -m tests.evidence.score    prints the card as a Markdown table; each score_*.py prints its rows
"""

from __future__ import annotations

from tests.evidence import score_decisions, score_losses, score_measured, score_memory, score_runs


def card() -> list[tuple[str, str, str, str, str]]:
    """(what, ours, target, inside the 90 % interval, trivial answers)."""
    runs = score_runs.score()
    memory = {
        "sizes known, rows it was made on": score_memory.score(split="given"),
        "sizes known, further rows": score_memory.score(split="held_out"),
        "parameters alone, rows it was made on": score_memory.score(split="given", sizes_known=False),
        "parameters alone, further rows": score_memory.score(split="held_out", sizes_known=False),
    }
    own = score_measured.scores()
    losses = score_losses.score()
    return [
        (
            f"GPU-hours, median error ({len(runs.rows)} runs)",
            f"{runs.median_error:.1%}; each left out of the fit {runs.left_out_error:.1%}",
            "<= 18 %",
            f"{runs.coverage:.0%}",
            f"6ND at 40 % of peak {runs.baseline_error:.1%}",
        ),
        (
            f"GPU-hours of runs never fitted ({len(runs.unseen)})",
            f"{runs.unseen_error:.1%}",
            "<= 18 %",
            f"{runs.unseen_coverage:.0%}",
            "",
        ),
        *(
            (
                f"peak memory, median error ({what}: {len(one.rows)})",
                f"{one.median_error:.1%}; {one.wrong_fits} wrong `fits`",
                "<= 20 %; 0",
                f"{one.coverage:.0%}",
                f"usual multipliers {one.baseline_error:.0%}",
            )
            for what, one in memory.items()
        ),
        *(
            (
                f"peak memory of `run` on {device}, median error ({len(one.rows)})",
                f"{one.shipped_error:.1%}; after a fit on half of them {one.fitted_error:.1%}",
                "",
                f"{one.coverage:.0%}",
                "",
            )
            for device, one in own.items()
        ),
        *(_decisions(split, what) for split, what in (("given", "cases"), ("further", "further cases"))),
        (
            f"loss on a known corpus ({len(losses.fresh)} runs)",
            f"{losses.level_error:.1%}",
            "",
            f"{losses.coverage:.0%}",
            f"Kaplan {losses.kaplan_level_error:.1%}, the corpus' mean {losses.mean_level_error:.1%}",
        ),
        (
            "loss of repeated data",
            f"{losses.hurt_error:.1%}",
            "",
            "",
            f"as fresh {losses.hurt_as_fresh_error:.1%}, as worthless {losses.hurt_worthless_error:.1%}",
        ),
    ]


def _decisions(split: str, what: str) -> tuple[str, str, str, str, str]:
    verdicts = [score_decisions.judge(case) for case in score_decisions.cases(split)]
    always = ", ".join(f"always {name} {score_decisions.baseline(name, split):.0%}" for name in ("peft", "full"))
    right = f"{score_decisions.share_right(verdicts):.0%}"
    return f"decisions right ({len(verdicts)} {what})", right, ">= 85 %", "", always


def main() -> None:
    print("| what | ours | target | inside 90 % | trivial answers |\n| --- | --- | --- | --: | --- |")
    for row in card():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
