"""The folder of a run, and what of it lies in a bucket: a real S3 server's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.flush import flush_command
from orchestrator.errors import ClusterError, SpecError
from orchestrator.runs.file_exchange import BucketExchange, CommonFolder, exchange_at
from orchestrator.runs.job import bucket_of, checkpoints_of
from orchestrator.scheduling.run_folder import check_bucket_of, forget, model_for_all, shared, take_up
from orchestrator.spec import RunSpec
from orchestrator.tracking.run_record import driving
from orchestrator.tracking.tracker import MetricLog
from tests.mlflow_runs import curve, new_store, opened
from tests.s3 import BUCKET, READER, STRANGER, as_user
from tests.specs import PRETRAIN, spec

RUNS = f"s3://{BUCKET}/runs"
SEARCH = {"space": {"training.learning_rate": {"grid": [1e-3, 1e-4]}}, "scheduler": "none"}


def in_bucket(tmp_path: Path) -> RunSpec:
    return spec(PRETRAIN, checkpoint__storage=f"{RUNS}/{tmp_path.name}")


def test_runs_and_the_trials_of_different_searches_never_share_a_place_in_a_bucket() -> None:
    one = spec(PRETRAIN, checkpoint__storage=f"{RUNS}/")
    assert bucket_of(one, Path("/home/runs/tiny-1234")) == f"{RUNS}/tiny-1234"
    trials = [Path(f"/home/runs/{search}/trials/00-scratch") for search in ("search-1", "search-2")]
    places = [checkpoints_of(one, trial) for trial in trials]
    assert places == [f"{RUNS}/{search}/trials/00-scratch/checkpoints" for search in ("search-1", "search-2")]
    assert bucket_of(spec(PRETRAIN), trials[0]) is None
    assert checkpoints_of(spec(PRETRAIN), trials[0]) == trials[0] / "checkpoints"


def test_only_runs_in_a_bucket_exchange_files(tmp_path: Path) -> None:
    assert bucket_of(in_bucket(tmp_path), tmp_path) == f"{RUNS}/{tmp_path.name}/{tmp_path.name}"
    assert bucket_of(spec(PRETRAIN), tmp_path) is None
    assert bucket_of(spec(PRETRAIN, checkpoint__storage=RUNS, search=SEARCH), tmp_path) == f"{RUNS}/{tmp_path.name}"
    assert isinstance(exchange_at(tmp_path, None), CommonFolder)


def test_a_model_is_found_by_all_in_the_bucket_that_its_machines_met_in(tmp_path: Path) -> None:
    run, trial = tmp_path / "run", tmp_path / "run" / "trials" / "00-full"
    trial.mkdir(parents=True)
    assert model_for_all("/here/model", run) == "/here/model"
    (run / "bucket.json").write_text('{"uri": "s3://b/runs/run"}')
    assert model_for_all("/here/model", run) == "s3://b/runs/run/model"
    assert model_for_all("/here/trials/00-full/model", trial) == "s3://b/runs/run/trials/00-full/model"


@pytest.mark.slow
@pytest.mark.parametrize("search", [None, SEARCH])
def test_a_bucket_that_does_not_exist_is_refused_before_anything_starts(
    s3: Any, tmp_path: Path, search: dict[str, Any] | None
) -> None:
    run = spec(PRETRAIN, checkpoint__storage=f"s3://no-such-{BUCKET}/runs", search=search)
    with pytest.raises(SpecError, match=f"(?s)there is no such bucket.*no-such-{BUCKET}.*create it"):
        check_bucket_of(run)
    check_bucket_of(in_bucket(tmp_path))
    check_bucket_of(spec(PRETRAIN))
    left = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"runs/{tmp_path.name}")["Contents"]
    assert [each["Key"] for each in left] == [f"runs/{tmp_path.name}/"], "pyarrow marks the folder it deletes from"


@pytest.mark.slow
@pytest.mark.parametrize(("user", "reason"), [(READER, "ACCESS_DENIED"), (STRANGER, "INVALID_ACCESS_KEY_ID")])
def test_a_bucket_that_may_not_be_written_to_is_refused_before_anything_starts(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, reason: str
) -> None:
    for name, value in as_user(user).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=f"(?s)may not write to checkpoint.storage.*{reason}") as caught:
        check_bucket_of(in_bucket(tmp_path))
    assert "may read, write, list and delete there" in str(caught.value)
    assert f"{user}-secret" not in str(caught.value)


@pytest.mark.slow
def test_another_machine_takes_up_a_run_with_its_mlflow_run_its_points_and_its_model(s3: Any, tmp_path: Path) -> None:
    uri, run = new_store(tmp_path), in_bucket(tmp_path)
    first, second = tmp_path / "one" / "run", tmp_path / "two" / "run"
    tracker = opened(uri, first)
    points = first / "outbox" / "a0001.00-from-00000000.jsonl"
    points.write_text('{"key": "train/loss", "value": 2.0, "step": 1, "timestamp_ms": 1}\n')
    (first / "model").mkdir()
    (first / "model" / "config.json").write_text("{}")
    exchange_at(first, bucket_of(run, first)).send("outbox/handle.json", "outbox/a*.jsonl", "model")
    tracker.ship()

    take_up(run, second)
    assert (second / "model" / "config.json").read_text() == "{}"
    again = opened(uri, second)
    assert again.run_id == tracker.run_id
    again.end_run("finished")
    again.ship()
    assert curve(uri, tracker.run_id, "train/loss") == [(1, 2.0)]
    secret = "".join(path.read_text() for path in second.rglob("handle.json"))
    assert uri not in secret


@pytest.mark.slow
def test_a_forgotten_run_is_forgotten_in_its_bucket_too_unless_it_is_driven(s3: Any, tmp_path: Path) -> None:
    run, folder = in_bucket(tmp_path), tmp_path / "run"
    key = f"runs/{tmp_path.name}/run/checkpoints/step-00000010.a1/manifest.json"
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    with driving(folder), pytest.raises(ClusterError, match="drives this run"):
        forget(run, folder)
    assert s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"] == 1
    forget(run, folder)
    assert s3.list_objects_v2(Bucket=BUCKET, Prefix=key)["KeyCount"] == 0
    assert not folder.exists()


@pytest.mark.slow
def test_flush_ships_what_workers_elsewhere_left_in_the_bucket_of_a_dead_run(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = new_store(tmp_path), in_bucket(tmp_path)
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    tracker = opened(uri, folder)
    tracker.ship()
    shared(run, folder)
    (elsewhere / "outbox").mkdir(parents=True)
    points = elsewhere / "outbox" / "a0001.00-from-00000000.jsonl"
    points.write_text('{"key": "train/loss", "value": 2.0, "step": 1, "timestamp_ms": 1}\n')
    bucket = bucket_of(run, folder)
    assert bucket is not None
    BucketExchange(elsewhere, bucket).send("outbox")
    assert flush_command(folder, everything=False, as_json=True) == 0
    assert '"sent": 1' in capsys.readouterr().out
    assert curve(uri, tracker.run_id, "train/loss") == [(1, 2.0)]


@pytest.mark.slow
def test_steps_that_a_lost_machine_had_shipped_and_another_takes_again_are_in_mlflow_once(
    s3: Any, tmp_path: Path
) -> None:
    """The driver shipped what it saw before the bucket had it; the run goes on from a checkpoint before."""
    uri, run = new_store(tmp_path), in_bucket(tmp_path)
    first, second = tmp_path / "one" / "run", tmp_path / "two" / "run"
    tracker = opened(uri, first)
    points = MetricLog(first)
    points.log(1, {"train/loss": 2.0})
    exchange_at(first, bucket_of(run, first)).send("outbox/handle.json", "outbox/a*.jsonl")
    points.log(2, {"train/loss": 1.5})
    tracker.ship()

    take_up(run, second)
    again = opened(uri, second)
    resumed = MetricLog(second, attempt=2, resumed_from=1)
    for step, loss in ((2, 1.5), (3, 1.2)):
        resumed.log(step, {"train/loss": loss})
    again.ship()
    assert curve(uri, tracker.run_id, "train/loss") == [(1, 2.0), (2, 1.5), (3, 1.2)]
