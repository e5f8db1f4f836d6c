from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.transfer_laws import (
    FORGETTING_LAWS,
    MIXED_TO_PYTHON,
    OPENORCA_FORGETTING,
    OSSIFIED_CHARACTERS,
    OSSIFIED_PARAMETERS,
    REPLAY_RUNS,
    TEXT_TO_PYTHON,
    critical_mixture_share,
    forgetting_left,
    in_low_data_regime,
    replay_for,
    sufficient_characters,
)

CHARACTERS = st.floats(1e3, 1e10)
PARAMETERS = st.floats(1e6, 1e11)
GROWTH = st.floats(1.01, 100.0)


def test_little_python_is_worth_about_a_thousand_times_itself() -> None:
    # Hernandez 2021, figure 1: 40M parameters, 300k characters; the two kinds of pretraining lie around it.
    assert 300 < TEXT_TO_PYTHON.multiplier(3e5, 4e7) < 1000 < MIXED_TO_PYTHON.multiplier(3e5, 4e7) < 3000


@given(characters=CHARACTERS, parameters=PARAMETERS, growth=GROWTH)
def test_transfer_grows_with_size_and_data_and_its_multiplier_falls_with_data(
    characters: float, parameters: float, growth: float
) -> None:
    law = TEXT_TO_PYTHON
    here = law.transferred_characters(characters, parameters)
    assert law.transferred_characters(characters * growth, parameters) > here
    assert law.transferred_characters(characters, parameters * growth) > here
    assert 1 <= law.multiplier(characters * growth, parameters) < law.multiplier(characters, parameters)
    assert law.effective_characters(characters, parameters) == pytest.approx(characters + here)


@given(characters=st.floats(1e3, 1e8), parameters=PARAMETERS)
def test_nearer_text_transfers_more(characters: float, parameters: float) -> None:
    near, far = (law.transferred_characters(characters, parameters) for law in (MIXED_TO_PYTHON, TEXT_TO_PYTHON))
    assert near > far


def test_larger_models_stay_longer_in_the_low_data_regime() -> None:
    assert sufficient_characters(1e9) > sufficient_characters(1e7)
    assert in_low_data_regime(3e5, 4e7)
    assert not in_low_data_regime(1e10, 4e7)


def test_the_ossified_case_lies_outside_the_low_data_regime() -> None:
    assert not in_low_data_regime(OSSIFIED_CHARACTERS, OSSIFIED_PARAMETERS)


@given(loss=st.floats(0.1, 1.0), learnt=st.floats(0.0, 0.1))
def test_what_is_learnt_is_forgotten_in_proportion(loss: float, learnt: float) -> None:
    for law in FORGETTING_LAWS:
        assert law.loss(loss - learnt) - law.loss(loss) == pytest.approx(law.forgotten(learnt=learnt), abs=1e-9)
        assert learnt <= law.forgotten(learnt=learnt) <= 2 * learnt


def test_forgetting_never_becomes_remembering() -> None:
    assert OPENORCA_FORGETTING.loss(5.0) == 0.0
    assert OPENORCA_FORGETTING.forgotten(learnt=-1.0) == 0.0


def test_replay_keeps_what_was_measured() -> None:
    none, quarter = REPLAY_RUNS
    measured = (quarter.old_loss - quarter.old_loss_before) / (none.old_loss - none.old_loss_before)
    assert forgetting_left(none.replayed) == 1.0
    assert forgetting_left(quarter.replayed) == pytest.approx(measured)


@given(left=st.floats(0.02, 1.0))
def test_the_replay_for_a_goal_reaches_it(left: float) -> None:
    assert forgetting_left(replay_for(left)) == pytest.approx(left)
    assert 0 <= replay_for(left) <= 0.5


@pytest.mark.parametrize(("parameters", "share"), [(460e6, 0.298), (940e6, 0.349), (1.6e9, 0.414), (3.1e9, 0.478)])
def test_critical_mixture_gives_its_papers_shares(parameters: float, share: float) -> None:
    assert critical_mixture_share(parameters, 20e9) == pytest.approx(share, abs=0.001)


@given(parameters=st.floats(1e7, 1e11), tokens=st.floats(2e9, 2e10), growth=GROWTH)
def test_larger_models_bear_a_larger_share_of_new_text(parameters: float, tokens: float, growth: float) -> None:
    here = critical_mixture_share(parameters, tokens)
    assert 0 <= here <= 1
    assert critical_mixture_share(parameters * growth, 20e9) >= critical_mixture_share(parameters, 20e9)
