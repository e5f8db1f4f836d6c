from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.errors import ClusterError, Interrupted, SpecError, TransientError
from orchestrator.planning.plan import make_plan
from orchestrator.quantities import Budget, BudgetUnit
from orchestrator.samples.prepare import encode_here, prepare
from orchestrator.scheduling.launch import launch, look_ahead
from orchestrator.scheduling.run_folder import forget, run_folder_of
from orchestrator.scheduling.run_lifecycle import (
    Prepared,
    RunResult,
    answered_earlier,
    end_run,
    finished_earlier,
    is_spent,
    keep_result,
    say_held_out,
    shipped,
    tracked,
    tracking_uri,
    what_is_tracked,
)
from orchestrator.tracking.outbox import count_waiting
from orchestrator.tracking.run_record import driving, find_runs
from tests.end_to_end.runs import listener
from tests.mlflow_runs import all_runs, free_port, get_run, log, new_store, opened
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.test_commands_run import base_model
from tests.test_contents import replace_last_byte_keeping_time
from tests.training_runs import CLUSTER, corpus, rows

pytestmark = pytest.mark.slow  # the module imports Ray


def budget(amount: float, unit: BudgetUnit = "usd") -> Budget:
    return Budget(amount=amount, unit=unit)


@pytest.mark.parametrize(("now", "spent"), [(budget(5), True), (budget(4), True), (budget(5.1), False), (None, False)])
def test_a_budget_is_spent_until_it_grows_or_is_lifted(now: Budget | None, spent: bool) -> None:
    assert is_spent(now, budget(5)) == spent


def test_a_budget_of_another_unit_is_looked_at_anew() -> None:
    assert not is_spent(budget(1, "hours"), budget(5, "usd"))


def result(folder: Path, status: str) -> RunResult:
    return RunResult(
        status=status,
        mlflow_run_id=None,
        checkpoint="a",
        model_path="b",
        metrics={"eval/loss": 1.0},
        restarts=2,
        run_folder=str(folder),
        notes=("one", "two"),
        best={"trial": "00", "run_folder": str(folder / "trials" / "00"), "mlflow_run_id": None},
    )


@pytest.mark.parametrize("fresh", [False, True])
def test_a_bucket_that_does_not_exist_is_refused_before_ray_starts(s3: Any, fresh: bool) -> None:
    run = spec(PRETRAIN, data__train=str(corpus()), checkpoint__storage="s3://no-such-bucket/runs")
    hears = replace(listener(), connected=lambda: pytest.fail("Ray was started"))
    with pytest.raises(SpecError, match="there is no such bucket"):
        launch(run, hears, fresh=fresh)


def test_what_is_known_here_is_answered_without_a_look_into_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    run = spec(PRETRAIN, checkpoint__storage="s3://away/runs")
    kept = result(tmp_path, "finished")
    keep_result(kept, run)
    assert answered_earlier(tmp_path, run, listener()) == kept


def test_a_run_whose_folder_was_moved_answers_with_its_new_paths(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    kept = replace(
        result(before, "finished"),
        checkpoint=str(before / "checkpoints" / "step-00000006"),
        model_path="s3://bucket/model",
        best={"trial": "00", "run_folder": str(before / "trials" / "00"), "mlflow_run_id": None},
    )
    keep_result(kept, spec(PRETRAIN))
    before.rename(after)
    answer = finished_earlier(after, spec(PRETRAIN), listener())
    assert answer is not None
    assert (answer.run_folder, answer.checkpoint) == (str(after), str(after / "checkpoints" / "step-00000006"))
    assert answer.model_path == "s3://bucket/model"
    assert answer.best is not None
    assert answer.best["run_folder"] == str(after / "trials" / "00")


def test_a_torn_result_counts_as_a_run_that_is_not_over(tmp_path: Path) -> None:
    keep_result(result(tmp_path, "finished"), spec(PRETRAIN))
    file = tmp_path / "result.json"
    file.write_bytes(file.read_bytes()[:40])
    assert finished_earlier(tmp_path, spec(PRETRAIN), listener()) is None


def test_a_second_command_of_a_running_run_is_refused_before_ray_starts() -> None:
    run = spec(PRETRAIN, name="driven", data__train=str(corpus()))
    data = prepare(run, cache=locations.home() / "cache" / "data", encode=encode_here)
    hears = replace(listener(), connecting=lambda: pytest.fail("Ray was about to start"))
    with driving(run_folder_of(run, data)):
        for fresh in (False, True):
            with pytest.raises(ClusterError, match=r"(?s)another command drives this run.*process [0-9]+ on "):
                launch(run, hears, fresh=fresh)


def test_a_finished_run_answers_until_its_base_has_other_weights_under_the_same_name_and_time(tmp_path: Path) -> None:
    base = Path(base_model(tmp_path))
    run = spec(CLASSIFY, model__base=str(base), data__train=str(rows()), tracking__enabled=False)
    prepare(run, cache=locations.home() / "cache" / "data", encode=encode_here)
    folder = look_ahead(run).run_folder
    assert folder is not None
    folder.mkdir(parents=True)
    keep_result(result(folder, "finished"), run)
    without_ray = replace(listener(), connecting=lambda: pytest.fail("Ray was about to start"))
    assert launch(run, without_ray).status == "finished"
    replace_last_byte_keeping_time(base / "model.safetensors")
    assert look_ahead(run).run_folder not in (None, folder)
    with pytest.raises(pytest.fail.Exception, match="Ray was about to start"):
        launch(run, without_ray)


def test_a_search_is_another_one_when_the_base_of_a_trial_has_other_weights(tmp_path: Path) -> None:
    bases = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bases.append(Path(base_model(tmp_path / name)))
    search = {"space": {"model.base": {"grid": [str(base) for base in bases]}}, "scheduler": "none"}
    run = spec(CLASSIFY, model__base=str(bases[0]), data__train=str(rows()), search=search)
    prepare(run, cache=locations.home() / "cache" / "data", encode=encode_here)
    folder = look_ahead(run).run_folder
    assert folder is not None
    replace_last_byte_keeping_time(bases[1] / "model.safetensors")
    assert look_ahead(run).run_folder not in (None, folder)


@pytest.mark.parametrize("status", ["finished", "stopped_by_budget"])
def test_what_was_kept_is_answered_again(tmp_path: Path, status: str) -> None:
    limited, said = spec(PRETRAIN, budget="5usd"), []
    assert finished_earlier(tmp_path, limited, listener(said=said)) is None
    kept = result(tmp_path, status)
    keep_result(kept, limited)
    assert finished_earlier(tmp_path, limited, listener(said=said)) == kept
    assert len(said) == 1


def prepared(folder: Path, **changes: Any) -> Prepared:
    """A tracked training whose data needs no reading."""
    given = spec(PRETRAIN, data__train=str(corpus()), **changes)
    data = prepare(given, cache=locations.home() / "cache", encode=encode_here)
    return Prepared(spec=given, plan=make_plan(given, CLUSTER, counts=data.counts), data=data, run_folder=folder)


def test_a_run_says_and_logs_what_it_is_measured_on(tmp_path: Path) -> None:
    new_store(tmp_path)
    one = prepared(tmp_path / "run", data__validation_fraction=0.1)
    said: list[str] = []
    say_held_out(one.data, replace(listener(), say=said.append))
    assert one.data.held_out.sentence() in said
    tags, params = what_is_tracked(one).tags, what_is_tracked(one).params
    assert tags["orchestrator.held_out_fingerprint"] == one.data.held_out_fingerprint
    assert float(params["held_out.share"]) == one.data.held_out.share == pytest.approx(0.1, abs=0.01)


def fail(one: Prepared, error: BaseException) -> None:
    """A training that ends with an error."""
    with tracked(one, listener()) as tracker:
        assert get_run(tracking_uri(one.spec), tracker.run_id).info.status == "RUNNING"
        raise error


@pytest.mark.parametrize(
    ("error", "status", "tag"),
    [
        (Interrupted("stopped"), "KILLED", ("orchestrator.stop_reason", "interrupted")),
        (TransientError("a worker died"), "FAILED", ("orchestrator.error", "a worker died")),
        (KeyboardInterrupt(), "KILLED", ("orchestrator.error", "the driver was ended")),
    ],
)
def test_the_mlflow_run_says_how_its_training_ended(
    tmp_path: Path, error: BaseException, status: str, tag: tuple[str, str]
) -> None:
    uri = new_store(tmp_path)
    with pytest.raises(type(error)):
        fail(prepared(tmp_path / "run", tracking__uri=uri), error)
    (run,) = all_runs(uri, "default")
    assert run.info.status == status
    assert run.data.tags[tag[0]] == tag[1]
    assert run.data.params["plan.workers"] == "1"


def test_a_training_begins_and_ends_without_the_server_and_says_what_sends_its_results(tmp_path: Path) -> None:
    away, folder, said = f"http://127.0.0.1:{free_port()}", tmp_path / "run", []
    one = prepared(folder, tracking__uri=away)
    with tracked(one, listener(said=said)) as tracker:
        answer = result(folder, "finished")
        end_run(tracker, replace(answer, best=None))
        keep_result(answer, one.spec)
    answer = shipped(answer, tracker)
    assert answer.mlflow_run_id is None
    assert f"orchestrator flush {folder}" in answer.notes[-1]
    assert any("does not answer" in line for line in said)
    again = finished_earlier(folder, one.spec, listener(said=said))
    assert again is not None
    assert again.mlflow_run_id is None
    assert f"orchestrator flush {folder}" in said[-1]


def test_a_second_command_for_a_run_that_goes_on_is_refused(tmp_path: Path) -> None:
    one = prepared(tmp_path / "run", tracking__enabled=False)
    with tracked(one, listener()):
        with pytest.raises(ClusterError, match="another command drives this run"):
            tracked(one, listener()).__enter__()
        with pytest.raises(ClusterError, match="another command drives this run"):
            forget(one.spec, one.run_folder)
    assert (tmp_path / "run").is_dir()


def test_a_run_that_a_killed_driver_had_not_told_mlflow_of_is_told_by_the_next_command(tmp_path: Path) -> None:
    uri, folder = new_store(tmp_path), tmp_path / "run"
    tracker, limited = opened(uri, folder), spec(PRETRAIN, budget="5usd")
    ended = replace(result(folder, "stopped_by_budget"), best=None)
    tracker.ship()
    end_run(tracker, ended)
    keep_result(ended, limited)
    assert get_run(uri, tracker.run_id).info.status == "RUNNING"

    answer = finished_earlier(folder, limited, listener())
    assert answer is not None
    assert answer.mlflow_run_id == tracker.run_id
    run = get_run(uri, tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["orchestrator.stop_reason"] == "budget"
    assert run.data.tags["orchestrator.restarts"] == "2"
    assert run.data.tags["orchestrator.model_path"] == "b"
    finished_earlier(folder, limited, listener())
    assert get_run(uri, tracker.run_id).info.end_time == run.info.end_time


def test_a_run_that_is_forgotten_leaves_behind_only_what_mlflow_has_not_taken(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    for name, uri in (("told", new_store(tmp_path)), ("untold", f"http://127.0.0.1:{free_port()}")):
        log(opened(uri, storage / name), storage / name, {"train/loss": 2.0})
        (storage / name / "model").mkdir()
        forget(spec(PRETRAIN), storage / name)
        assert not (storage / name).exists()
    (told,) = all_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert told.info.status == "KILLED"
    (aside,) = find_runs(storage)
    assert aside.name.startswith("untold.unsent-")
    assert not (aside / "model").exists()
    assert count_waiting(aside / "outbox") == 1


def test_only_a_run_that_its_budget_stopped_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    for status, goes_on in (("finished", False), ("stopped_by_budget", True)):
        keep_result(result(tmp_path, status), spec(PRETRAIN, budget="5usd"))
        for larger in (spec(PRETRAIN, budget="6usd"), spec(PRETRAIN)):
            assert (finished_earlier(tmp_path, larger, listener()) is None) == goes_on
