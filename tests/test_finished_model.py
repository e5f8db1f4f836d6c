from pathlib import Path

import pytest

from orchestrator.errors import ModelError
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

    def based_on(run_id: str) -> str | None:
        return with_base_found(spec(CLASSIFY, model__base=f"runs:/{run_id}", tracking__uri=uri)).model.base

    assert based_on(finished) == str(model)
    with pytest.raises(ModelError, match="has no model here"):
        based_on(unfinished)
    with pytest.raises(ModelError, match="not in the MLflow store"):
        based_on("0" * 32)


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
