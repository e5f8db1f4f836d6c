from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import credentials
from orchestrator.credentials import hide
from orchestrator.errors import SpecError, StorageError
from orchestrator.tracking import store
from tests.auth_server import guarded
from tests.mlflow_runs import free_port, new_store


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_a_file_store_is_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(SpecError, match=r"folder of files[\s\S]*sqlite:///"):
        store.check_store(uri)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_store_in_memory_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="needs a file"):
        store.check_store(uri)


def test_an_unknown_kind_of_store_is_refused_without_showing_its_password() -> None:
    with pytest.raises(SpecError) as caught:
        store.check_store("redis://me:secret@host/0")
    assert "secret" not in str(caught.value)
    assert "postgresql" in str(caught.value)


def test_a_server_that_is_not_there_is_refused_quickly() -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"does not answer[\s\S]*tracking.uri"):
        store.check_store(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 6


def test_a_database_that_is_not_there_is_refused_without_showing_its_password() -> None:
    with pytest.raises(StorageError, match="database") as caught:
        store.check_store(f"postgresql://me:secret@127.0.0.1:{free_port()}/mlflow")
    assert "secret" not in str(caught.value)


def test_a_sqlite_store_in_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        store.check_store(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(StorageError, match="it is a folder"):
        store.check_store(f"sqlite:///{tmp_path}")


def test_a_relative_sqlite_path_becomes_absolute_and_keeps_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.absolute("sqlite:///a.db?timeout=5") == f"sqlite:///{tmp_path}/a.db?timeout=5"
    assert store.absolute("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize("check", [store.check_uri, store.check_store])
@pytest.mark.parametrize("uri", ["./mlruns", "sqlite:///", "redis://host/0"])
def test_what_can_never_work_is_refused_whether_or_not_it_is_to_answer_now(check: Any, uri: str) -> None:
    with pytest.raises(SpecError):
        check(uri)


@pytest.mark.parametrize(
    "uri", ["http://", "http:///path", "https://host:port", "http://host:70000", "postgresql:///db"]
)
def test_an_address_without_a_host_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="names no host"):
        store.check_uri(uri)


def test_a_server_that_does_not_answer_yet_is_a_usable_address() -> None:
    store.check_uri(f"http://127.0.0.1:{free_port()}")


def test_a_database_driver_that_is_not_installed_is_refused_with_the_remedy() -> None:
    with pytest.raises(SpecError, match=r"driver pg8000 is not installed[\s\S]*pip install pg8000") as caught:
        store.check_uri("postgresql+pg8000://me:secret@host/mlflow")
    assert "secret" not in str(caught.value)


def test_a_database_dialect_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SpecError, match="not supported"):
        store.check_uri("postgresql+nonsense://host/mlflow")


@pytest.mark.slow
def test_a_deleted_experiment_is_refused_with_the_way_back(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    client = store.client(uri)
    client.delete_experiment(store.experiment_id(client, uri, "exp"))
    with pytest.raises(SpecError, match=r"was deleted[\s\S]*mlflow experiments restore -x"):
        store.experiment_id(client, uri, "exp")


@pytest.mark.slow
def test_an_experiment_that_another_process_creates_first_is_found(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    client = store.client(uri)

    class LateClient:
        """Another process creates the experiment right after this one has looked for it."""

        def get_experiment_by_name(self, name: str) -> Any:
            found = client.get_experiment_by_name(name)
            if found is None:
                client.create_experiment(name)
            return found

        def create_experiment(self, name: str, **options: Any) -> str:
            return str(client.create_experiment(name, **options))

    assert store.experiment_id(LateClient(), uri, "new") == client.get_experiment_by_name("new").experiment_id


CREATE_AT_ONCE = """
import sys, time
from orchestrator.tracking import store
import mlflow
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
print(store.experiment_id(store.client(sys.argv[1]), sys.argv[1], "shared"))
"""


@pytest.mark.slow
def test_processes_that_start_at_once_share_a_fresh_store_and_experiment_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    command = [sys.executable, "-c", CREATE_AT_ONCE, f"sqlite:///{tmp_path}/new/mlflow.db", str(time.time() + 8)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [error for _, error in results] == ["", "", ""]
    assert len({output for output, _ in results}) == 1


CREATE_WITHIN = """
import resource, sys
from orchestrator.errors import StorageError
from orchestrator.tracking import store
import mlflow
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # as a disk that fills up
try:
    store.client(sys.argv[1])
except StorageError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_store_whose_creation_was_cut_short_by_a_full_disk_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", CREATE_WITHIN, uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "the MLflow store cannot be opened" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
    assert store.experiment_id(store.client(uri), uri, "exp")


@pytest.mark.slow
def test_a_store_of_an_older_mlflow_is_named_with_the_command_that_brings_it_up_to_date(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("update alembic_version set version_num = 'cc1f77228345'")
    with pytest.raises(StorageError, match=r"made by another version of MLflow[\s\S]*mlflow db upgrade sqlite:////"):
        store.client(uri)


@pytest.mark.slow
def test_a_locked_store_is_named_for_what_it_is(tmp_path: Path) -> None:
    uri = f"{new_store(tmp_path)}?timeout=0.2"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("begin exclusive")
        with pytest.raises(StorageError, match="another program holds a lock"):
            store.experiment_id(store.client(uri), uri, "exp")


SECRET = "to/open@it"


@pytest.mark.slow
def test_a_server_lets_in_whoever_its_address_names_as_mlflows_own_client_does() -> None:
    with guarded("me", SECRET) as (host, answers):
        address = f"http://me:{SECRET}@{host}"
        store.check_store(hide(address))
        assert answers == [200]
        client = store.client(hide(address))
        assert list(client.search_runs(["1"])) == []
        assert answers == [200, 200]
        with pytest.raises(Exception, match="401"):
            store.client(f"http://me:wrong@{host}").search_runs(["1"])


def test_credentials_of_a_store_are_kept_for_later_commands_in_a_file_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    address = f"postgresql://me:{SECRET}@kept-here/db"
    shown = hide(address)
    store.keep_credentials("sqlite:////nothing/to/keep.db")
    assert list(tmp_path.iterdir()) == []
    store.keep_credentials(shown)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(credentials, "_addresses", {})  # a later command
    assert store.connection(shown) == "postgresql://me:to%2Fopen%40it@kept-here/db"
    store.keep_credentials(hide("postgresql://me:other@elsewhere/db"))
    monkeypatch.setattr(credentials, "_addresses", {})
    assert store.connection(shown) == "postgresql://me:to%2Fopen%40it@kept-here/db"


def test_credentials_come_from_the_environment_too_and_are_asked_for_where_they_are_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    with pytest.raises(SpecError, match="set MLFLOW_TRACKING_URI to its whole address"):
        store.connection("postgresql://***@nowhere-known/db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@nowhere-known/db")
    assert store.connection("postgresql://***@nowhere-known/db") == "postgresql://me:secret@nowhere-known/db"
