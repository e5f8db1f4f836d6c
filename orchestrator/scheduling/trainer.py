"""Ray Train's trainer without the helper processes that a run here does not need.

Each of Ray Train's helper actors is a Python process that imports Ray Train, 2.5 to 3 s of a core before the first step
and beside the first steps: on a small machine that is what a user waits for.
"""

from __future__ import annotations

import os
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """A DataParallelTrainer that starts no process for Ray Data, and on a private Ray none that outlives a driver."""

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # data comes from memory-mapped files
        if not os.environ.get("RAY_ADDRESS"):
            unneeded += (PlacementGroupCleanerCallback,)  # a Ray of our own ends with its driver, groups and all
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]
