from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ModelError
from orchestrator.search_space import trials
from orchestrator.tracking.finished_model import with_base_found
from tests.mlflow_runs import closed, new_store, opened
from tests.specs import CLASSIFY, spec


def test_any_other_base_is_left_alone() -> None:
    original = spec(CLASSIFY)
    assert with_base_found(original) is original


@pytest.mark.slow
def test_a_run_as_base_is_its_model_folder(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    finished = closed(opened(uri, tmp_path / "a"), tags={"orchestrator.model_path": str(model)})
    unfinished = closed(opened(uri, tmp_path / "b"), status="killed")
    elsewhere = {"orchestrator.model_path": str(model), "orchestrator.model_uri": "s3://bucket/runs/c/model"}
    in_a_bucket = closed(opened(uri, tmp_path / "c"), tags=elsewhere)

    def based_on(run_id: str) -> str | None:
        return with_base_found(spec(CLASSIFY, model__base=f"runs:/{run_id}", tracking__uri=uri)).model.base

    assert based_on(finished) == str(model)
    assert based_on(in_a_bucket) == "s3://bucket/runs/c/model", "where every node finds it"
    with pytest.raises(ModelError, match="has no model here"):
        based_on(unfinished)
    with pytest.raises(ModelError, match="not in the MLflow store"):
        based_on("0" * 32)


@pytest.mark.slow
def test_a_run_is_found_by_experiment_and_name_the_newest_that_has_left_a_model(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    for number, left in enumerate((True, True, False)):
        (model := tmp_path / f"model-{number}").mkdir()
        tags = {"orchestrator.model_path": str(model)} if left else {}
        closed(opened(uri, tmp_path / str(number), tags={"orchestrator.name": "tiny"}), tags=tags)

    def based_on(name: str) -> str | None:
        return with_base_found(spec(CLASSIFY, model__base=f"runs:/{name}", tracking__uri=uri)).model.base

    assert based_on("exp/tiny") == str(tmp_path / "model-1")
    for absent in ("exp/other", "other/tiny", "exp/it's"):
        with pytest.raises(ModelError, match="no run of that name has left a model"):
            based_on(absent)


def test_a_run_as_base_without_its_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(ModelError, match="the MLflow store that it would be in is not there") as refused:
        with_base_found(spec(CLASSIFY, model__base="runs:/1234", tracking__uri=nowhere))
    assert "set tracking.uri" in str(refused.value)


@pytest.mark.parametrize("own", [None, [], "x", {"training.seed": [1, 2]}, {"training.seed": None}])
def test_what_is_no_distribution_is_left_to_be_refused_by_its_name(own: Any) -> None:
    searching = spec(CLASSIFY, search={"space": {"method": {"grid": {"full": own}}}, "scheduler": "none"})
    assert with_base_found(searching) == searching


@pytest.mark.slow
def test_runs_among_the_bases_of_a_search_are_their_model_folders(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    run_id = closed(opened(uri, tmp_path / "a"), tags={"orchestrator.model_path": str(model)})
    by_method = {"full": {"model.base": {"choice": [f"runs:/{run_id}"]}}, "head": None}
    searches: dict[str, dict[str, Any]] = {
        "a list": {"model.base": {"grid": [f"runs:/{run_id}", "other"]}},
        "with spaces of their own": {"model.base": {"grid": {f"runs:/{run_id}": None, "other": {}}}},
        "below another value": {"method": {"grid": by_method}},
    }

    def bases_of(space: dict[str, Any]) -> list[str | None]:
        searching = spec(CLASSIFY, tracking__uri=uri, search={"space": space, "scheduler": "none"})
        return [trial.spec.model.base for trial in trials(with_base_found(searching))]

    bases = {name: bases_of(space) for name, space in searches.items()}
    given = spec(CLASSIFY).model.base
    assert bases == {
        "a list": [str(model), "other"],
        "with spaces of their own": [str(model), "other"],
        "below another value": [str(model), given],
    }


@pytest.mark.slow
def test_the_model_of_a_run_is_found_where_its_home_was_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, new_home = new_store(tmp_path), tmp_path / "new"
    model = tmp_path / "old" / "runs" / "search-0123abcd" / "trials" / "00" / "model"
    run_id = closed(opened(uri, tmp_path / "a"), tags={"orchestrator.model_path": str(model)})
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(new_home))
    moved = new_home / "runs" / "search-0123abcd" / "trials" / "00" / "model"
    with pytest.raises(ModelError, match="has no model here"):
        with_base_found(spec(CLASSIFY, model__base=f"runs:/{run_id}", tracking__uri=uri))
    moved.mkdir(parents=True)
    assert with_base_found(spec(CLASSIFY, model__base=f"runs:/{run_id}", tracking__uri=uri)).model.base == str(moved)
