from __future__ import annotations

import typing
from pathlib import Path

from orchestrator.ranking import Goal
from orchestrator.tasks import registry
from orchestrator.tasks.names import TASKS, Task, TrainedTask
from orchestrator.tasks.registry import LEARNT, advised_task, task_of

NAMES = typing.get_args(TrainedTask)


def test_every_name_of_a_spec_has_one_object_in_a_file_of_its_name() -> None:
    assert [task_of(name).name for name in NAMES] == list(NAMES) == list(LEARNT)
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    assert files == {*(name.replace("-", "_") for name in TASKS), "__init__", "base", "names", "registry"}


def test_the_advisor_answers_for_every_task_that_is_trained() -> None:
    assert set(NAMES) <= set(TASKS) == set(typing.get_args(Task))
    assert [advised_task(name).name for name in TASKS] == list(TASKS)


def test_a_task_is_ranked_by_a_metric_that_it_logs_and_whose_direction_is_known() -> None:
    for task in LEARNT.values():
        assert task.ranked_by in task.metrics
        assert Goal.of(task.ranked_by).higher_is_better == (task.ranked_by == "eval/accuracy")


def test_transformers_has_the_class_and_the_table_of_every_task() -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    for task in LEARNT.values():
        assert hasattr(transformers, task.auto_class)
        assert hasattr(modeling_auto, task.model_table)
