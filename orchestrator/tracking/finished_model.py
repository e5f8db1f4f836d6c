"""`model.base: runs:/ID`, or `runs:/EXPERIMENT/NAME` -> where that run's model lies, a folder or a bucket's URI; in a
search's space too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator import locations
from orchestrator.errors import ModelError, StorageError
from orchestrator.object_store import is_remote

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

_PREFIX = "runs:/"
_MODEL_PATH_TAG, _MODEL_URI_TAG = "orchestrator.model_path", "orchestrator.model_uri"


def with_base_found(spec: RunSpec) -> RunSpec:
    """The spec with each run that serves as base replaced by its model's folder or URI; any other spec unchanged.

    Raises ModelError when such a run is not in the store, has left no model, or left it in a folder of another machine.
    """
    uri = spec.tracking.uri
    changes: dict[str, Any] = {}
    if spec.model.base is not None and spec.model.base.startswith(_PREFIX):
        changes["model"] = spec.model.model_copy(update={"base": found_base(spec.model.base, uri=uri)})
    if spec.search is not None and (space := _found_in(spec.search.space, uri)) != spec.search.space:
        changes["search"] = spec.search.model_copy(update={"space": space})
    return spec.model_copy(update=changes) if changes else spec


def _found_in(space: Mapping[str, Any], uri: str | None) -> dict[str, Any]:
    """A search's space with each run that is a value of `model.base` replaced, in spaces that values bring too.

    What is no distribution stays as it is: `search_space` refuses it.
    """

    def value_found(path: str, value: Any) -> Any:
        return found_base(value, uri=uri) if path == "model.base" and isinstance(value, str) else value

    def values_found(path: str, values: Any) -> Any:
        if isinstance(values, list):
            return [value_found(path, value) for value in values]
        if not isinstance(values, Mapping):
            return values
        return {
            value_found(path, value): _found_in(own, uri) if isinstance(own, Mapping) else own
            for value, own in values.items()
        }

    return {
        path: {kind: values_found(path, values) for kind, values in distribution.items()}
        if isinstance(distribution, Mapping)
        else distribution
        for path, distribution in space.items()
    }


def found_base(location: str, *, uri: str | None = None) -> str:
    """Folder or URI of a run's model in a store (the default one) for `runs:/ID`, or for `runs:/EXPERIMENT/NAME`, which
    is the newest of that name that has left one; any other location unchanged.

    Raises what `with_base_found` raises.
    """
    if not location.startswith(_PREFIX):
        return location
    return _model_of_run(uri or locations.default_tracking_uri(), location.removeprefix(_PREFIX))


def _model_of_run(uri: str, run_id: str) -> str:
    """In a bucket, where every node finds it, before a folder that this machine sees."""
    from mlflow.exceptions import MlflowException

    from orchestrator.tracking import store

    store.check_store(uri)
    try:
        client = store.client(uri, create=False)
    except StorageError as error:
        raise ModelError(
            "model.base names a run, and the MLflow store that it would be in is not there",
            got=f"{_PREFIX}{run_id} in {uri} ({error.what})",
            do="set tracking.uri, or MLFLOW_TRACKING_URI, to the store of that run",
        ) from error
    try:
        tags = _newest_named(client, run_id, uri) if "/" in run_id else client.get_run(run_id).data.tags
    except MlflowException as error:
        raise ModelError(
            "the run that model.base names is not in the MLflow store",
            got=f"{_PREFIX}{run_id} in {uri}",
            do="`orchestrator compare --json` lists the ids of runs",
        ) from error
    if is_remote(everywhere := str(tags.get(_MODEL_URI_TAG))):
        return everywhere
    path = tags.get(_MODEL_PATH_TAG)
    folder = None if path is None else _where_it_is_now(Path(path))
    if folder is None:
        raise ModelError(
            "the run that model.base names has no model here",
            got=path or f"run {run_id} has not ended with a model",
            do="give a finished run whose folder this machine sees",
        )
    return str(folder)


def _newest_named(client: Any, name: str, uri: str) -> Mapping[str, str]:
    """The tags of the newest run EXPERIMENT/NAME that has left a model. Raises ModelError without one."""
    from orchestrator.tracking.mlflow_backend import TAG, search_runs

    experiment, _, run_name = name.rpartition("/")
    found = client.get_experiment_by_name(experiment)
    is_name = re.fullmatch(r"[\w.-]+", run_name) is not None  # else no run is called so
    runs = (
        []
        if found is None or not is_name
        else search_runs(client, found.experiment_id, f"tags.`{TAG}name` = '{run_name}'")
    )
    left = [run for run in runs if _MODEL_PATH_TAG in run.data.tags]
    if not left:
        raise ModelError(
            "no run of that name has left a model",
            got=f"{_PREFIX}{name} in {uri}",
            do=f"`orchestrator compare --experiment {experiment}` shows its runs",
        )
    tags: Mapping[str, str] = max(left, key=lambda run: run.info.start_time).data.tags
    return tags


def spec_behind(model: Path) -> dict[str, Any] | None:
    """The spec of the run that left a model in its folder, as a plain mapping; None where no run did, or none that is
    tracked."""
    from orchestrator.tracking import run_record  # 10 ms, which most commands need not wait for

    run = run_record.read(model.parent)
    text = None if run is None else run.artifacts.get("spec.yaml")
    return None if text is None else dict(yaml.safe_load(text))


def _where_it_is_now(model: Path) -> Path | None:
    """A model's folder where it was written, or below the runs of this home, when that was moved; None for neither."""
    if model.is_dir():
        return model
    runs = len(model.parts) - 1 - model.parts[::-1].index("runs") if "runs" in model.parts else len(model.parts)
    moved = locations.home().joinpath("runs", *model.parts[runs + 1 :])
    return moved if model.parts[runs + 1 :] and moved.is_dir() else None
