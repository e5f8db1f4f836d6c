import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec import TrainingSpec
from orchestrator.spec_methods import LayerwiseSpec
from orchestrator.worker.lr_schedule import layer_scale, learning_rate
from orchestrator.worker.models import ParameterGroups


def training(**more: object) -> TrainingSpec:
    return TrainingSpec(steps=100, global_batch=1, learning_rate=1.0, **more)  # type: ignore[arg-type]


def curve(*, steps: int = 100, warmup_steps: int = 10, **more: object) -> list[float]:
    return [learning_rate(training(**more), step=step, steps=steps, warmup_steps=warmup_steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "floor", "warmup_steps", "expected"),
    [
        ("linear", 0.0, 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.0, 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0.2, 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", 0.0, 2, [1 / 2, 1, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
        ("cosine", 0.1, 5, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 0.775, 0.325]),
        ("constant", 0.0, 3, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("cosine", 0.0, 7, [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1, 1]),
    ],
)
def test_the_whole_schedule_is_as_written_out(
    schedule: str, floor: float, warmup_steps: int, expected: list[float]
) -> None:
    """Eight steps each. Decay is that of transformers' `get_linear_schedule_with_warmup` and its cosine sister; warm-up
    begins at a first share instead of theirs at zero, which would be a step without effect."""
    rates = curve(steps=8, warmup_steps=warmup_steps, schedule=schedule, final_learning_rate_fraction=floor)
    assert rates == pytest.approx(expected, abs=1e-6)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert curve()[:10] == pytest.approx([0.1 * i for i in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_falls_at_every_step_towards_the_final_fraction(schedule: str) -> None:
    rates = curve(schedule=schedule, final_learning_rate_fraction=0.1)
    assert rates[10] == 1.0
    assert 0.1 < rates[-1] < 0.1 + 0.9 * 1.5 / 90
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@given(
    st.integers(1, 300), st.integers(0, 299), st.sampled_from(["cosine", "linear", "constant"]), st.sampled_from([0, 1])
)
def test_no_step_trains_at_rate_zero_and_none_above_the_peak(
    steps: int, warmup: int, schedule: str, floor: int
) -> None:
    rates = curve(
        steps=steps, warmup_steps=min(warmup, steps), schedule=schedule, final_learning_rate_fraction=float(floor)
    )
    assert all(0.0 < rate <= 1.0 for rate in rates)


def test_the_rate_falls_from_layer_to_layer_and_the_lower_ones_join_later() -> None:
    def scales(step: int) -> list[float]:
        layerwise = LayerwiseSpec(decay=0.5, unfreeze_fraction=0.3)
        return [layer_scale(layerwise, below_head=part, layers=2, step=step, steps=100) for part in range(4)]

    assert scales(0) == [1, 0, 0, 0]
    assert scales(10) == scales(19) == [1, 0.5, 0, 0]
    assert scales(20) == [1, 0.5, 0.25, 0]
    assert scales(30) == scales(99) == [1, 0.5, 0.25, 0.125]


def test_all_parts_learn_alike_unless_told_otherwise() -> None:
    assert {layer_scale(LayerwiseSpec(), below_head=part, layers=6, step=0, steps=9) for part in range(8)} == {1.0}


def test_each_group_learns_at_the_scale_of_its_part() -> None:
    groups = ParameterGroups(groups=[{}, {}, {}], below_head=[0, 0, 2], layers=1, is_pretrained=[False] * 3)
    layerwise = LayerwiseSpec(decay=0.5, unfreeze_fraction=0.5)
    assert groups.scales(layerwise, step=4, steps=10) == [1.0, 1.0, 0.0]
    assert groups.scales(layerwise, step=5, steps=10) == [1.0, 1.0, 0.25]
