"""MLflow's store: is it there, a quiet client for it, and the experiment's id. Foreign errors end here.

Importing this module does not import mlflow; the first client does (1 to 2 s).
"""

from __future__ import annotations

import base64
import logging
import os
import socket
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from orchestrator import locations
from orchestrator.atomic_file import draft_of, locked, read_json, write_json
from orchestrator.credentials import escaped, revealed
from orchestrator.errors import OrchestratorError, SpecError, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

REACH_TIMEOUT_S = 5.0
"""How long a server may take to answer before a run is refused (a guess: far above any healthy round trip)."""
_ANY_EXPERIMENT = "/api/2.0/mlflow/experiments/search?max_results=1"
_USERNAME, _PASSWORD, _TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
"""MLflow's own variables, which its client logs in by."""

ALLOWED_URIS = "http://HOST:PORT, https://..., sqlite:////abs/path.db, or a postgresql, mysql or mssql URI"
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE = "sqlite:///"
_CREDENTIALS = "credentials.json"
"""In the home folder: whole addresses of stores by what is shown of them."""

_ENVIRONMENT = {
    # With MLflow's own defaults (7 retries, 120 s) a dead server holds a caller for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs the traceback of what it raises
    # Usage reports to MLflow's makers are for the user to turn on.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its link to an ended run would repeat the password of the server's address.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set before mlflow is imported, unless the user has set them."""


def absolute(uri: str) -> str:
    """The same store from any working directory: a SQLite path made absolute, everything else unchanged."""
    if not uri.startswith("sqlite:"):
        return uri
    options = uri.partition("?")
    return f"{_SQLITE}{_sqlite_path(uri)}{options[1]}{options[2]}"


def keep_credentials(uri: str) -> None:
    """Keeps what `credentials.hide` has hidden of a store's address, for commands to come, in a file of the home folder
    that only its owner may read. Raises StorageError when it cannot be written."""
    address = revealed(uri)
    if address is None or address == uri:
        return
    file = locations.home() / _CREDENTIALS
    known = read_json(file) or {}
    if known.get(uri) != address:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**known, uri: address}, durable=True, private=True)
        except OSError as exc:
            raise StorageError(
                "the address of the MLflow store cannot be kept",
                got=f"{file}: {exc.strerror}",
                do="set $ORCHESTRATOR_HOME to a place that can be written",
            ) from exc


def connection(uri: str) -> str:
    """The whole address of a store, for connecting only: from this process, the environment, or an earlier command's
    file. Raises SpecError when its credentials are nowhere."""
    locations.default_tracking_uri()  # which remembers the environment's
    address = revealed(uri)
    if address is None:
        address = (read_json(locations.home() / _CREDENTIALS) or {}).get(uri)
    if address is None:
        raise SpecError(
            "the credentials of this MLflow store are not known here",
            got=uri,
            do="set MLFLOW_TRACKING_URI to its whole address, or run the command that began with it again",
        )
    return escaped(str(address))


def check_uri(uri: str) -> None:
    """Refuse a store that can never work, whether it answers now or not.

    Raises SpecError for an address that is none, a kind of store that is not supported or a database driver that is not
    installed, StorageError for a SQLite file in a place that cannot be written.
    """
    scheme = _scheme(uri)
    if scheme == "sqlite":
        _check_sqlite(_sqlite_path(uri))
    elif not _host(uri):
        raise SpecError("the address of the MLflow store names no host", got=uri, allowed=ALLOWED_URIS)
    elif scheme in _DATABASE_PORTS:
        _check_driver(connection(uri))


def check_store(uri: str) -> None:
    """Refuse a store that cannot work now; imports nothing heavy.

    Raises SpecError for a kind of store that is not supported or a driver that is not installed, StorageError for one
    that does not answer or refuses the login.
    """
    scheme = _scheme(uri)
    if scheme == "sqlite":
        _check_sqlite(_sqlite_path(uri))
    elif scheme in _DATABASE_PORTS:
        _check_port(connection(uri), default_port=_DATABASE_PORTS[scheme])
        _check_login(connection(uri))
    else:
        _check_http(connection(uri))


def _scheme(uri: str) -> str:
    """`http`, `https`, `sqlite` or a database; raises SpecError for any other."""
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("", "file"):
        raise SpecError(
            "MLflow no longer takes new results in a folder of files",
            got=uri,
            allowed=ALLOWED_URIS,
            do=f"set tracking.uri to a database file, such as {_SQLITE}{locations.home() / 'mlflow.db'}",
        )
    if scheme not in ("http", "https", "sqlite", *_DATABASE_PORTS):
        raise SpecError("this kind of MLflow store is not supported", got=uri, allowed=ALLOWED_URIS)
    return scheme


def _host(uri: str) -> str | None:
    """The host of an address; None for a malformed one, such as with letters for a port."""
    try:
        parts = urlsplit(uri)
        return None if parts.port == 0 else parts.hostname
    except ValueError:
        return None


def _check_driver(uri: str) -> None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    with _translated_opening(uri):
        try:
            make_url(uri).get_dialect().import_dbapi()
        except SQLAlchemyError as exc:
            raise SpecError("this kind of MLflow store is not supported", got=uri, allowed=ALLOWED_URIS) from exc


def client(uri: str, *, create: bool = True) -> MlflowClient:
    """A client of the store; a new SQLite store is created first (3 to 5 s, once) where `create` allows it.

    Raises StorageError when the store cannot be opened, SpecError when its database driver is not installed.
    """
    quiet()
    with _translated_opening(uri):
        from mlflow import MlflowClient

        quiet()  # importing mlflow configures its loggers anew
        if not uri.startswith("sqlite:"):
            return MlflowClient(tracking_uri=connection(uri))
        path = _sqlite_path(uri)
        if not create and not path.exists():
            raise StorageError(
                "there is no MLflow store at this place on this machine",
                got=uri,
                do="give the store of an earlier run, or start a run first: orchestrator run SPEC",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that both find no tables both create them, and one fails: one at a time.
        with locked(path.with_name(path.name + ".lock")):
            if not path.exists():
                _create_sqlite(path)
            return MlflowClient(tracking_uri=absolute(uri))


def _create_sqlite(path: Path) -> None:
    """A new SQLite store, there whole or not at all: one whose creation was cut short, by a full disk or a kill, can
    never be opened again (MLflow 3.17.2: "table ... already exists")."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with draft_of(path) as draft:
        made = SqlAlchemyStore(f"{_SQLITE}{draft}", (locations.home() / "artifacts").as_uri())
        made.engine.dispose()
        draft.replace(path)


def experiment_id(mlflow_client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if need be; safe when several processes do so at once.

    Raises SpecError for an experiment that was deleted (its results may have been discarded on purpose).
    """
    from mlflow.exceptions import MlflowException

    with translated(uri, doing=f"find or create the experiment {name!r}"):
        found = mlflow_client.get_experiment_by_name(name)
        if found is None:
            # A server knows where artifacts go; a bare database would put them below the working directory.
            artifacts = None if uri.startswith("http") else (locations.home() / "artifacts").as_uri()
            try:
                return str(mlflow_client.create_experiment(name, artifact_location=artifacts))
            except MlflowException as exc:
                if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = mlflow_client.get_experiment_by_name(name)
    assert found is not None, "MLflow says that the experiment exists"
    if found.lifecycle_stage == "deleted":
        raise SpecError(
            f"the experiment {name!r} was deleted",
            got=f"tracking.experiment: {name}",
            do="use another name, or bring it back: MLFLOW_TRACKING_URI="
            f"{uri} mlflow experiments restore -x {found.experiment_id}",
        )
    return str(found.experiment_id)


@contextmanager
def translated(uri: str, *, doing: str) -> Iterator[None]:
    """MLflow's errors as StorageError: "MLflow could not {doing}"."""
    try:
        yield
    except (OrchestratorError, AssertionError):
        raise
    except Exception as exc:  # MLflow's own, and what artifact stores, networks and database drivers raise through it
        what, do = _explained(exc, uri) or (
            f"MLflow could not {doing}",
            "check that the store is up and takes writes: orchestrator doctor",
        )
        raise StorageError(what, got=f"{uri}: {_first_line(exc)}", do=do) from exc


def quiet() -> None:
    """Keep MLflow's and alembic's notices off the user's terminal; errors still come, as exceptions.

    Called with every client, because importing mlflow and test runners reset loggers and warning filters.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    level = os.environ["MLFLOW_LOGGING_LEVEL"].upper()
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(level)
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)(\.|$)")


@contextmanager
def _translated_opening(uri: str) -> Iterator[None]:
    try:
        yield
    except OrchestratorError:
        raise
    except ModuleNotFoundError as exc:
        raise SpecError(
            f"the database driver {exc.name} is not installed",
            got=uri,
            do=f"pip install {exc.name}",
        ) from exc
    except Exception as exc:  # mlflow, sqlalchemy, alembic and the driver each raise their own here
        what, do = _explained(exc, uri) or ("the MLflow store cannot be opened", "check its address and rights")
        raise StorageError(what, got=f"{uri}: {_first_line(exc)}", do=do) from exc


def _explained(exc: BaseException, uri: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) for what a store says in its error's text alone; None for anything else.

    The texts are those of SQLite, PostgreSQL and MLflow 3.17.2.
    """
    text = str(exc)
    if "database is locked" in text:
        return (
            "another program holds a lock on the MLflow store",
            "end what has the file open (a database shell, a backup, a run that hangs), then do the same again",
        )
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        return (
            "the MLflow store was made by another version of MLflow",
            f"after a backup: mlflow db upgrade {uri}; for a store of a newer one install that version",
        )
    if "disk is full" in text or "No space left on device" in text:
        return "no space is left for the MLflow store", "free space on its disk, or set tracking.uri to another place"
    return None


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _sqlite_path(uri: str) -> Path:
    path = uri.removeprefix(_SQLITE).partition("?")[0]
    if not uri.startswith(_SQLITE) or path in ("", ":memory:"):
        raise SpecError(
            "the SQLite store needs a file, since several processes write to it",
            got=uri,
            allowed="sqlite:///relative.db or sqlite:////absolute/path.db",
        )
    return Path(path).expanduser().absolute()


def _check_sqlite(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(13, "it is not writable")
    except OSError as exc:
        raise StorageError(
            "the MLflow store cannot be written",
            got=f"{_SQLITE}{path}: {exc.strerror}",
            do="set tracking.uri or $ORCHESTRATOR_HOME to a place that can be written",
        ) from exc


def _check_http(uri: str) -> None:
    """Asks for an experiment: MLflow's /health answers whoever asks, whether they may log in or not."""
    try:
        with urllib.request.urlopen(_request(uri, _ANY_EXPERIMENT), timeout=REACH_TIMEOUT_S):
            return
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code in (401, 403):
            raise _locked_out(uri, exc.code) from exc
        # Any other refusal is an answer too: of a proxy, say. Only a server's own failure counts.
        if exc.code < 500:
            return
        cause: object = f"HTTP {exc.code}"
        origin: Exception = exc
    except (OSError, ValueError) as exc:
        cause, origin = getattr(exc, "reason", exc), exc
    raise StorageError(
        "the MLflow server does not answer",
        got=f"{uri}: {cause}",
        allowed=f"an answer within {REACH_TIMEOUT_S:g} s",
        do="start it (mlflow server), correct tracking.uri, or set tracking.enabled=false",
    ) from origin


def _request(uri: str, path: str) -> urllib.request.Request:
    """A question to a server, with the user and password of its address, or of MLflow's own variables, as a header:
    urllib takes them for a part of the host."""
    parts = urlsplit(uri)
    user, found, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl().rstrip("/") + path)
    name, _, password = (unquote(part) for part in user.partition(":"))
    if not found:
        name, password = os.environ.get(_USERNAME, ""), os.environ.get(_PASSWORD, "")
    if name:
        basic = base64.b64encode(f"{name}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {basic}")
    elif token := os.environ.get(_TOKEN):
        request.add_header("Authorization", f"Bearer {token}")
    return request


def _locked_out(uri: str, code: int) -> StorageError:
    in_address = "@" in urlsplit(uri).netloc
    sent = "its address" if in_address else next((name for name in (_USERNAME, _TOKEN) if os.environ.get(name)), None)
    said = "wants a user and a password" if sent is None else f"does not take the login of {sent}"
    return StorageError(
        f"the MLflow server {said}",
        got=f"{uri}: HTTP {code}",
        do=f"export {_USERNAME} and {_PASSWORD} as its administrator gave them, on the nodes too",
    )


def _check_port(uri: str, *, default_port: int) -> None:
    parts = urlsplit(uri)
    try:
        address = (parts.hostname or "localhost", parts.port or default_port)
        with socket.create_connection(address, timeout=REACH_TIMEOUT_S):
            return
    except (OSError, ValueError) as exc:
        raise StorageError(
            "the database of the MLflow store does not answer",
            got=f"{uri}: {exc}",
            allowed=f"a connection within {REACH_TIMEOUT_S:g} s",
            do="start it, or correct tracking.uri",
        ) from exc


def _check_login(uri: str) -> None:
    """Logs in once, as MLflow 3.17.2 goes on trying a wrong password for minutes (`create_sqlalchemy_engine`)."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    with _translated_opening(uri):
        create_engine(uri, poolclass=NullPool).connect().close()
