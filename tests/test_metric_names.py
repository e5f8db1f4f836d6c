from __future__ import annotations

import pytest

from orchestrator.errors import SpecError
from orchestrator.samples.metric_names import check_goal, logged_metrics
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.test_measured_rows import EVALUATE


def searched(base: dict, metric: str | None) -> dict:
    return {**base, "search": {"space": {"training.seed": {"grid": [1, 2]}}, "scheduler": "none", "metric": metric}}


def test_what_ranks_a_task_is_among_the_metrics_it_logs() -> None:
    assert logged_metrics(spec(EVALUATE))[:4] == ("eval/loss", "eval/accuracy", "eval/macro_f1", "eval/weighted_f1")
    for base, changes in ((PRETRAIN, {}), (CLASSIFY, {}), (PRETRAIN, {"task": "masked-lm", "model__config": "bert"})):
        one = spec(base, **changes, **({"model__overrides": {}} if changes else {}))
        assert one.goal.metric in logged_metrics(one)


def test_a_search_by_a_metric_that_its_task_has_not_is_refused_with_those_it_has() -> None:
    check_goal(spec(PRETRAIN))
    for metric in (None, "eval/loss", "train/tokens_per_second"):
        check_goal(spec(searched(CLASSIFY, metric)))
    for base, metric in ((PRETRAIN, "eval/accuracy"), (CLASSIFY, "eval/bits_per_byte"), (CLASSIFY, "accuracy")):
        with pytest.raises(SpecError, match=r"no such metric at an evaluation[\s\S]*eval/loss") as error:
            check_goal(spec(searched(base, metric)))
        assert metric in str(error.value)
