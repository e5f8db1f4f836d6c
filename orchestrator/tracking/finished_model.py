"""`model.base: runs:/ID` -> the folder that run's model lies in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import locations
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

_PREFIX = "runs:/"
_MODEL_PATH_TAG = "orchestrator.model_path"


def with_base_found(spec: RunSpec) -> RunSpec:
    """The spec with a run as base replaced by its model's folder; any other spec unchanged.

    Raises ModelError when the run is not in the store, has left no model, or its folder is not on this machine.
    """
    base = spec.model.base
    if base is None or not base.startswith(_PREFIX):
        return spec
    folder = found_base(base, uri=spec.tracking.uri)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"base": folder})})


def found_base(location: str, *, uri: str | None = None) -> str:
    """The folder of a run's model for `runs:/ID` in a store (the default one); any other location unchanged.

    Raises what `with_base_found` raises.
    """
    if not location.startswith(_PREFIX):
        return location
    return str(_model_folder(uri or locations.default_tracking_uri(), location.removeprefix(_PREFIX)))


def _model_folder(uri: str, run_id: str) -> Path:
    from mlflow.exceptions import MlflowException

    from orchestrator.tracking import store

    store.check_store(uri)
    client = store.client(uri, create=False)
    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException as error:
        raise ModelError(
            "the run that model.base names is not in the MLflow store",
            got=f"{_PREFIX}{run_id} in {uri}",
            do="`orchestrator compare --json` lists the ids of runs",
        ) from error
    path = tags.get(_MODEL_PATH_TAG)
    folder = None if path is None else _where_it_is_now(Path(path))
    if folder is None:
        raise ModelError(
            "the run that model.base names has no model here",
            got=path or f"run {run_id} has not ended with a model",
            do="give a finished run whose folder this machine sees",
        )
    return folder


def _where_it_is_now(model: Path) -> Path | None:
    """A model's folder where it was written, or below the runs of this home, when that was moved; None for neither."""
    if model.is_dir():
        return model
    runs = len(model.parts) - 1 - model.parts[::-1].index("runs") if "runs" in model.parts else len(model.parts)
    moved = locations.home().joinpath("runs", *model.parts[runs + 1 :])
    return moved if model.parts[runs + 1 :] and moved.is_dir() else None
