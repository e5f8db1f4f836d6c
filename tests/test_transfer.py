from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.laws.transfer import MIXED_TO_PYTHON, TEXT_TO_PYTHON, TransferLaw, forgetting_left

CHARACTERS = st.floats(1e3, 1e10)
PARAMETERS = st.floats(1e6, 1e11)
GROWTH = st.floats(1.01, 100.0)


def worth(law: TransferLaw, characters: float, parameters: float) -> float:
    """How many times its size the target text is worth."""
    return 1 + law.transferred_characters(characters, parameters) / characters


def test_little_python_is_worth_about_a_thousand_times_itself() -> None:
    # Hernandez 2021, figure 1: 40M parameters, 300k characters; the two kinds of pretraining lie around it.
    assert 300 < worth(TEXT_TO_PYTHON, 3e5, 4e7) < 1000 < worth(MIXED_TO_PYTHON, 3e5, 4e7) < 3000


@given(characters=CHARACTERS, parameters=PARAMETERS, growth=GROWTH)
def test_transfer_grows_with_size_and_data_and_its_worth_falls_with_data(
    characters: float, parameters: float, growth: float
) -> None:
    law = TEXT_TO_PYTHON
    here = law.transferred_characters(characters, parameters)
    assert law.transferred_characters(characters * growth, parameters) > here
    assert law.transferred_characters(characters, parameters * growth) > here
    assert 1 <= worth(law, characters * growth, parameters) < worth(law, characters, parameters)


@given(characters=st.floats(1e3, 1e8), parameters=PARAMETERS)
def test_nearer_text_transfers_more(characters: float, parameters: float) -> None:
    near, far = (law.transferred_characters(characters, parameters) for law in (MIXED_TO_PYTHON, TEXT_TO_PYTHON))
    assert near > far


def test_replay_keeps_what_was_measured() -> None:
    # Ibrahim 2024: the loss on the Pile rises from 2.17 to 3.56 without old data, to 2.33 with a quarter of it.
    assert forgetting_left(0.0) == 1.0
    assert forgetting_left(0.25) == pytest.approx((2.33 - 2.17) / (3.56 - 2.17))


@given(replayed=st.floats(0.0, 1.0), more=st.floats(0.0, 1.0))
def test_more_replay_forgets_less(replayed: float, more: float) -> None:
    assert 0 < forgetting_left(replayed + more) <= forgetting_left(replayed) <= 1
