from __future__ import annotations

import pytest

from orchestrator.policy.laws.scaling import REFIT, repeated_loss
from tests.evidence.score_losses import LossScore, main, read_runs, score


@pytest.fixture(scope="module")
def card() -> LossScore:
    return score()


def test_levels_are_predicted_better_than_by_kaplan_or_the_mean(card: LossScore) -> None:
    assert len(card.fresh) >= 30
    assert card.level_error < 0.035
    assert card.level_error < 0.7 * card.kaplan_level_error < card.mean_level_error


def test_harm_by_repetition_is_predicted_better_than_by_ignoring_it(card: LossScore) -> None:
    assert card.hurt_error < 0.035
    assert card.hurt_error < 0.5 * card.hurt_as_fresh_error
    assert card.hurt_error < 0.2 * card.hurt_worthless_error
    assert card.unhurt_error < 0.01


def test_best_sizes_under_scarce_data_are_met_closer_than_without_the_law(card: LossScore) -> None:
    for size in card.sizes:
        assert size.predicted == pytest.approx(size.published, rel=0.15)
        assert abs(size.unconstrained / size.published - 1) > abs(size.predicted / size.published - 1)


def test_intervals_for_an_unknown_corpus_cover(card: LossScore) -> None:
    assert card.coverage >= 0.85


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_no_public_run_is_special(scale: float) -> None:
    for run in read_runs():
        here = repeated_loss(run.parameters, run.tokens, run.unique_tokens)
        nearby = repeated_loss(run.parameters * scale, run.tokens * scale, run.unique_tokens * scale)
        assert nearby == pytest.approx(here, rel=0.05)
        assert (nearby < here) == (scale > 1)


def test_runs_beyond_the_range_of_the_law_do_not_count(card: LossScore) -> None:
    outside = {run.name for run in read_runs() if not run.in_range}
    assert outside >= {"cerebras-13B", "c4-83m-1b5-1b5"}
    assert not outside & {run.name for run in card.fresh}
    assert REFIT.fitted.outside(flops=6 * 13e9 * 260e9)


def test_the_score_card_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    assert "level, from the corpus' other runs" in printed
    assert "cerebras-111M" in printed
