"""Secrets planted in every place of a real run on a real database, then looked for in all that it leaves and says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from orchestrator import cli, credentials
from orchestrator.errors import StorageError
from orchestrator.tracking.store import check_store
from tests.end_to_end.commands import Place
from tests.postgres import Postgres, postgres, programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason="apt-get install postgresql"),
]

PASSWORD = "pass/w@rd-of-the-store"
TOKEN = "hf_tokenInTheEnvironment0123"
KEY = "key-of-another-service"
QUERY = "query-of-an-address"
SECRETS = (PASSWORD, "pass%2Fw%40rd-of-the-store", TOKEN, KEY, QUERY)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres(PASSWORD) as server:
        yield server


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(f"/tmp/ray-secrets-{os.getpid()}")  # pytest's own are too long for Ray's sockets
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def files_with_secrets(folder: Path) -> list[Path]:
    contents = ((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path, content in contents if any(secret.encode() in content for secret in SECRETS)]


def test_no_secret_is_in_the_store_the_folders_or_any_answer(
    tmp_path: Path,
    database: Postgres,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    user = tmp_path / "user"
    user.mkdir()
    ray = {"RAY_TMPDIR": str(ray_folder), "RAY_AUTH_MODE": "token", "HOME": str(user)}
    place = Place(folder=tmp_path, environment={"HF_TOKEN": TOKEN, **ray})
    spec = place.write(
        training__steps=2,
        model__overrides={"n_layer": 1, "n_embd": 16, "n_head": 1},
        tracking={"uri": database.uri, "experiment": "secrets"},
        resources={"workers": 1},
    )
    ran = place.run("run", str(spec), "--json")
    assert ran.code == 0, ran.err
    run_id = ran.answer["mlflow_run_id"]
    assert run_id, "the password opened the store"
    # Ray 2.60.0 writes a token there when it starts, and then every later `ray start` demands it of its clients.
    assert not (user / ".ray" / "auth_token").exists()

    monkeypatch.setenv("ORCHESTRATOR_HOME", str(place.home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(credentials, "_addresses", {})  # as in a process of its own
    monkeypatch.setattr("sys.argv", ["orchestrator", "advise", "--history", database.uri])
    space = f"search={{space: {{training.seed: {{grid: [1, {{password: {KEY}}}]}}}}, scheduler: none}}"
    plan, advise = ("plan", str(spec)), ("advise", "--examples", "2000", "--base-params", "125M")
    said = {"run": ran.out + ran.err}
    for code, *arguments in (
        (0, "flush", "--json"),
        (0, *plan, "--json", f"tracking.uri=https://u:{QUERY}@host"),
        (2, *plan, f"checkpoint.storage=s3://bucket/x?secret_key={QUERY}"),
        (2, *plan, "--json", f"deepspeed={{zero_stage: 1, comet: {{api_key: {KEY}}}}}"),
        (2, *plan, "--json", f"model.base=https://{KEY}@hub/model"),
        (2, *plan, space),
        (0, "compare", "--experiment", "secrets", "--tracking-uri", database.uri, "--json"),
        (2, "compare", "--experiment", "none", "--tracking-uri", database.uri),
        (0, *advise, "--history", database.uri, "--json"),
        (None, "doctor", "--json"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", database.uri if arguments[0] == "doctor" else "sqlite:////none.db")
        with pytest.raises(SystemExit) as end:
            typer.main.get_command(cli.app).main([*arguments], prog_name="orchestrator")
        captured = capsys.readouterr()
        said[" ".join(arguments[:5])] = captured.out + captured.err
        assert code is None or end.value.code == code, captured.err + captured.out
    assert run_id in said["compare --experiment secrets --tracking-uri " + database.uri]
    assert {name: text for name, text in said.items() if any(secret in text for secret in SECRETS)} == {}

    dump = database.dump().decode()
    assert run_id in dump
    assert "postgresql+psycopg2://***@127.0.0.1" in dump, "the store is named, without what opens it"
    assert [secret for secret in SECRETS if secret in dump] == []
    private = place.home / "credentials.json"
    assert files_with_secrets(place.home) == [private]
    assert private.stat().st_mode & 0o077 == 0
    assert files_with_secrets(ray_folder) == []


def test_a_wrong_password_is_refused_before_anything_starts_and_not_shown(database: Postgres) -> None:
    check_store(database.uri)
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        check_store(database.uri.replace(PASSWORD, "not-the-one"))
    assert "not-the-one" not in str(caught.value)
