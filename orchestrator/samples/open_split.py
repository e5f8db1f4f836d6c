"""A split of the folder that `prepare` wrote -> its samples, as the training loop asks for them."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.data.splits import Split
from orchestrator.errors import StorageError
from orchestrator.samples.batches import Samples
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.masking import Masking
from orchestrator.tasks.registry import LEARNT


def open_split(path: Path, split: Split, *, masking: Masking | None = None) -> Samples:
    """A split of the folder that `prepare` wrote, without reading its tokens.

    `masking` is for masked language modelling alone; None is the usual one.
    Raises StorageError when the folder or a file of it is gone.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        return form_of(LEARNT[meta["task"]]).open(path, split, meta, masking=masking or Masking())
    except OSError as error:
        raise StorageError(
            f"the prepared data in {path} cannot be read",
            got=error.strerror or str(error),
            do="the folder must be seen by every node: set ORCHESTRATOR_HOME or checkpoint.storage to a shared one",
        ) from error
