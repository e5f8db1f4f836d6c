from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from orchestrator.scheduling.search.rungs import decide, rung_steps

pytestmark = pytest.mark.slow  # Ray is imported


@pytest.mark.parametrize(("grace", "interval", "factor"), [(10, 10, 3), (20, 10, 2), (5, 2, 3), (7, 7, 4)])
@pytest.mark.parametrize("seed", range(20))
def test_with_equal_intervals_the_same_trials_are_stopped_as_by_rays_asha(
    grace: int, interval: int, factor: int, seed: int
) -> None:
    """Trials report in any order; each decision is compared until the trial is stopped."""
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.schedulers.async_hyperband import _Bracket

    draws, longest = random.Random(seed), 100
    theirs = _Bracket(grace, longest + 1, factor, 0)
    rungs = rung_steps(grace=grace, intervals=[interval], reduction_factor=factor, longest=longest)
    earlier: dict[int, list[float]] = {step: [] for step in rungs}
    at = dict.fromkeys(range(27), 0)
    stopped = 0
    while at:
        trial = draws.choice(list(at))
        at[trial] += interval
        if at[trial] >= longest:
            del at[trial]
            continue
        step, goodness = at[trial], draws.gauss(trial / 9, 1.0)
        their_word = theirs.on_result(SimpleNamespace(trial_id=str(trial)), step, goodness)
        ours = decide(goodness, earlier[step], reduction_factor=factor).go_on if step in rungs else True
        if step in rungs:
            earlier[step].append(goodness)
        assert ours == (their_word == TrialScheduler.CONTINUE), (trial, step)
        if not ours:
            stopped += 1
            del at[trial]
    assert stopped
