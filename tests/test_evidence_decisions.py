from __future__ import annotations

import pytest

from orchestrator.policy.advise import advise
from orchestrator.policy.candidates import candidates
from orchestrator.policy.choice import MATTERS, utility
from tests.evidence.score_decisions import Case, baseline, cases, judge, resized, share_right

CASES = {case.name: case for case in cases()}


@pytest.mark.slow
@pytest.mark.parametrize(("split", "ahead"), [("given", 2.0), ("further", 1.5)])
def test_the_advice_agrees_with_published_decisions(split: str, ahead: float) -> None:
    right = share_right(judge(case) for case in cases(split))
    assert right >= 0.85
    assert right > ahead * max(baseline("peft", split), baseline("full", split))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_the_advice_changes_only_where_the_strategies_are_close(factor: float) -> None:
    jumps = [name for name, case in CASES.items() if not _close(case, factor)]
    assert not jumps


def _close(case: Case, factor: float) -> bool:
    """Whether other sizes keep the advice, or the old advice is still about as good for them as the new."""
    before = advise(case.question)
    question = resized(case.question, factor)
    after = advise(question)
    if after.leading == before.leading:
        return True
    found = {one.strategy: one for one in candidates(question) if one.feasible}
    old, new = (found.get(one.leading) for one in (before, after))
    assert new is not None
    if old is None:
        return True  # memory or money decided
    assert new.expectation is not None
    return utility(old, question) - utility(new, question) <= MATTERS[new.expectation.kind]


def test_a_base_models_name_decides_nothing() -> None:
    case = CASES["dapt-ACL-ARC"]
    assert case.question.base is not None
    assert case.question.base.name is None, "the questions hold sizes only"


def test_sizes_from_scratch_are_near_the_published_ones() -> None:
    for case in CASES.values():
        if case.size is not None:
            assert judge(case).points == 1, case.name
