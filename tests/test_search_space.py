import pytest

from orchestrator.errors import SpecError
from orchestrator.search_space import trials
from tests.specs import CLASSIFY, spec


def search(space: dict, **more: object) -> dict:
    return {"space": space, "scheduler": "none", **more}


def test_grid_values_multiply_and_samples_repeat_the_grid() -> None:
    space = {"training.seed": {"grid": [1, 2, 3]}, "method": {"grid": ["full", "head"]}}
    found = trials(spec(CLASSIFY, search=search(space, samples=2)))
    assert len(found) == 12
    assert [trial.index for trial in found] == list(range(12))
    assert {(t.spec.method, t.spec.training.seed) for t in found} == {
        (m, s) for m in ("full", "head") for s in (1, 2, 3)
    }


def test_a_value_brings_a_space_of_its_own() -> None:
    space = {
        "method": {
            "grid": {
                "full": {"training.learning_rate": {"loguniform": [1e-5, 1e-4]}},
                "head": {"training.seed": {"grid": [5, 6]}},
            }
        }
    }
    found = trials(spec(CLASSIFY, search=search(space)))
    assert [t.spec.method for t in found] == ["full", "head", "head"]
    assert 1e-5 <= found[0].spec.training.learning_rate <= 1e-4
    assert found[1].spec.training.learning_rate == spec(CLASSIFY).training.learning_rate


def test_the_same_seed_draws_the_same_trials_and_another_seed_others() -> None:
    space = {
        "training.learning_rate": {"loguniform": [1e-5, 1e-1]},
        "training.warmup_fraction": {"uniform": [0.0, 0.5]},
    }

    def drawn(seed: int) -> list[dict]:
        return [t.overrides for t in trials(spec(CLASSIFY, search=search(space, samples=4, seed=seed)))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_every_trial_is_checked_before_any_is_started() -> None:
    with pytest.raises(SpecError, match=r"trial 1 .*training.global_batch=5"):
        trials(spec(CLASSIFY, resources__workers=2, search=search({"training.global_batch": {"grid": [8, 5]}})))


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"training.learning_rate": {"loguniform": [0, 1]}}, "above 0"),
        ({"training.learning_rate": {"uniform": [2, 1]}}, "low < high"),
        ({"training.learning_rate": {"gaussian": [0, 1]}}, "no distribution"),
        ({"training.learning_rate": {"grid": []}}, "needs a list"),
        ({"training.lr": {"grid": [1]}}, "unknown key training.lr"),
        ({"name": {"grid": ["a"]}}, "cannot be searched"),
    ],
)
def test_a_space_that_cannot_be_read_is_refused(space: dict, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        trials(spec(CLASSIFY, search=search(space)))


def test_a_search_of_too_many_trials_is_refused_before_they_are_made() -> None:
    wide = {
        f"training.{name}": {"grid": list(range(1, 300))} for name in ("seed", "eval_every_steps", "steps", "x", "y")
    }
    for search in ({"space": wide}, {"space": {"training.seed": {"int_uniform": [0, 9]}}, "samples": 10**6}):
        with pytest.raises(SpecError, match="more than 1,000 trials") as caught:
            trials(spec(CLASSIFY, search={**search, "scheduler": "none"}))
        assert "lower search.samples" in str(caught.value)


@pytest.mark.parametrize(
    "distribution",
    [
        {"uniform": [float("-inf"), 1.0]},
        {"uniform": [0, float("nan")]},
        {"int_uniform": [0, 10**400]},
        {"uniform": [False, True]},
        {"grid": {"full": 3}},
        {"grid": {"full": {1: {"grid": [1]}}}},
        {"choice": []},
    ],
)
def test_what_cannot_be_drawn_from_is_refused(distribution: dict) -> None:
    with pytest.raises(SpecError, match=r"search\.space\.training\.learning_rate"):
        trials(spec(CLASSIFY, search={"space": {"training.learning_rate": distribution}, "scheduler": "none"}))
