import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec import TrainingSpec
from orchestrator.training.schedule import learning_rate


def training(**more: object) -> TrainingSpec:
    return TrainingSpec(steps=100, global_batch=1, learning_rate=1.0, **more)  # type: ignore[arg-type]


def curve(**more: object) -> list[float]:
    return [learning_rate(training(**more), step=step, steps=100, warmup_steps=10) for step in range(100)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert curve()[:10] == pytest.approx([0.1 * i for i in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_falls_to_the_final_fraction_at_the_last_step(schedule: str) -> None:
    rates = curve(schedule=schedule, final_learning_rate_fraction=0.1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_constant_stays_at_the_peak() -> None:
    assert set(curve(schedule="constant")[10:]) == {1.0}


def test_cosine_is_halfway_in_the_middle() -> None:
    assert curve(schedule="cosine")[54] == pytest.approx(0.5)


@given(st.integers(1, 300), st.integers(0, 299), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_rate_is_never_negative_nor_above_the_peak(steps: int, warmup: int, schedule: str) -> None:
    for step in range(steps):
        rate = learning_rate(training(schedule=schedule), step=step, steps=steps, warmup_steps=min(warmup, steps))
        assert 0.0 <= rate <= 1.0
