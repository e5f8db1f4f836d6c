"""Reaching a store of files by its URI: which ones there are, opening, copying, and patience with one that is away.

pyarrow opens `s3://`, `gs://`, `abfs://` and `hdfs://` itself; what fsspec has beyond them (`az://`, `sftp://`, `hf://`
and dozens more, some from packages of their own) stands behind pyarrow's interface too (`fsspec_store`). Credentials
come from the environment or the cloud's own chain of files and roles; a URI that holds some is refused.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from orchestrator.credentials import hide
from orchestrator.errors import SpecError, StorageError, one_line

CHUNK_BYTES = 4 << 20
"""Of a file, read at a time."""
PATIENCE_S = 300.0
"""How long a training bears a bucket that is away, mostly behind its steps (a guess: outages of minutes happen)."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
"""In the messages of pyarrow's S3 errors: the names of those that waiting does not mend."""
_ABOUT_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

_HERE = {"package", "sysconfig"}
"""Schemes of `locations` that name folders of this machine."""
_IN_PYARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_AZURE = ("abfs", "abfss")
_AZURE_KEYS = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN")
"""What adlfs takes from the environment and pyarrow does not."""
_WITH_PORTS = ("http", "https", "hdfs", "webhdfs", "viewfs", "ftp", "sftp", "ssh", "smb")
"""Schemes whose URIs begin with HOST or HOST:PORT; the names of others may hold colons, as ARNs in S3 do."""
_NOWHERE = {
    "memory": "each process has a memory of its own",
    "data": "the text would stand in the address",
}
_UNWRITABLE = {
    **_NOWHERE,
    "package": "it names an installed package",
    "sysconfig": "it names Python's own folders",
    **dict.fromkeys(("http", "https", "data"), "nothing can be written there"),
}
_EXAMPLES = "s3://BUCKET/PATH, gs://BUCKET/PATH, abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, hdfs://HOST/PATH"

T = TypeVar("T")


def is_remote(location: str) -> bool:
    """Whether a location names a store that is reached by URI, and no path and no installed package."""
    scheme, found, _ = location.partition("://")
    return bool(found) and scheme not in _HERE


def _check_scheme(uri: str, *, what: str, unfit: Mapping[str, str], unknown: str) -> tuple[str, str]:
    """(scheme, the rest). Raises ValueError for credentials, which logs, job lists and every worker would be shown, for
    a path's scheme, for those that are unfit, by their reasons, and with `unknown` for those that nobody knows."""
    if hide(uri) != uri:
        raise ValueError(
            f"{what} holds credentials ({hide(uri)}), which every worker would be sent: remove them, and give each "
            "node the variables of its cloud (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), a credentials file or a role"
        )
    scheme, _, rest = uri.partition("://")
    if scheme in ("file", "local"):
        raise ValueError(f"give the path, {rest or '/'}; got {uri}")
    if scheme in _WITH_PORTS:
        _check_port(uri, what=what)
    if scheme in unfit:
        raise ValueError(f"{what} cannot be {scheme}://, as {unfit[scheme]}: use one such as {_EXAMPLES}")
    if scheme not in (*_IN_PYARROW, "az") and scheme not in _fsspec_protocols():
        raise ValueError(unknown)
    return scheme, rest


def _check_port(uri: str, *, what: str) -> None:
    try:
        _ = urlsplit(uri).port
    except ValueError as error:
        raise ValueError(f"{what} is no URI ({one_line(error)}): use one such as HOST:PORT/PATH; got {uri}") from error


def check_readable_uri(uri: str, *, what: str) -> None:
    """Raises ValueError for a URI that nothing can be read from; nothing is asked of the network."""
    unknown = f"{what} is of no scheme that pyarrow or fsspec knows: use one such as {_EXAMPLES}; got {uri}"
    _check_scheme(uri, what=what, unfit=_NOWHERE, unknown=unknown)


def check_writable_uri(uri: str, *, what: str) -> None:
    """Raises ValueError for a URI that no run can be kept at; nothing is asked of the network."""
    unknown = f"{what} must be a folder that every node sees, or a URI such as {_EXAMPLES}; got {uri}"
    scheme, rest = _check_scheme(uri, what=what, unfit=_UNWRITABLE, unknown=unknown)
    if not rest.partition("/")[0].strip():
        raise ValueError(f"{what} names no bucket: use {scheme}://BUCKET/PATH; got {uri}")
    if {".", ".."} & set(rest.split("/")):
        raise ValueError(f"{what} leads out of its path: a bucket knows no . and no ..; got {uri}")


def open_bucket(uri: str) -> tuple[Any, str]:
    """A `pyarrow.fs.FileSystem` for a URI, and the path in it.

    Raises StorageError when it names nothing that can be opened.
    """
    scheme = uri.partition("://")[0]
    try:
        if scheme in _IN_PYARROW and not (scheme in _AZURE and any(os.environ.get(name) for name in _AZURE_KEYS)):
            from pyarrow.fs import FileSystem

            files, prefix = FileSystem.from_uri(uri)
        else:
            from orchestrator.fsspec_store import open_fsspec

            files, prefix = open_fsspec(uri)
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(
            "the object store cannot be opened",
            got=f"{uri} ({one_line(error, most=200)})",
            allowed=f"a folder, {_EXAMPLES}, or another URI of pyarrow.fs or fsspec",
            do=f"pip install {_package(error)} on every node"
            if isinstance(error, ImportError)
            else "check the URI and the credentials of every node",
        ) from error
    return files, prefix.rstrip("/")


def check_bucket(uri: str) -> None:
    """Refuses a bucket that is not there, or that this machine may not write to: it writes an empty object and removes
    it. One that is away is found out by whoever writes to it, with patience.

    Raises SpecError, and StorageError when the URI names nothing that can be opened.
    """
    from pyarrow.fs import FileType

    files, prefix = open_bucket(uri)
    bucket, key = prefix.partition("/")[0], f"{prefix}/.may-write-{uuid.uuid4().hex}"
    with suppress(OSError):
        if bucket and files.get_file_info(bucket).type == FileType.NotFound:
            raise SpecError(
                "there is no such bucket",
                got=f"{bucket}, in {uri}",
                do="create it, or set checkpoint.storage to one that every node can write",
            )
    try:
        with files.open_output_stream(key):
            pass
        with suppress(OSError):  # a role may add and not remove: then old checkpoints stay
            files.delete_file(key)
    except OSError as error:
        if is_lasting(error):
            raise SpecError(
                "this machine may not write to checkpoint.storage",
                got=f"{uri} ({one_line(error, most=200)})",
                do="give every node credentials that may read, write, list and delete there: the cloud's variables in "
                "its environment, a credentials file, or a role of the instance",
            ) from error


def upload(files: Any, source: Path, key: str) -> None:
    """Puts a file of this machine into a bucket; raises OSError."""
    with source.open("rb") as stream, files.open_output_stream(key) as target:
        shutil.copyfileobj(stream, target, CHUNK_BYTES)


def download(files: Any, key: str, target: Path) -> None:
    """Puts an object into a file of this machine, in a folder that exists; raises OSError."""
    with files.open_input_stream(key) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, CHUNK_BYTES)


def patiently(action: Callable[[], T], *, patience_s: float) -> T:
    """Does something with a bucket, again and again for some seconds where the bucket is away.

    Raises the OSError that it met last, and at once what waiting does not mend: no access, no such file, a full disk.
    """
    pause_s, deadline = _FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return action()
        except OSError as error:
            if is_lasting(error) or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def is_lasting(error: OSError) -> bool:
    """Whether waiting does not mend what a bucket, or this machine's disk, has raised."""
    is_local = error.errno is not None  # a bucket's own errors have none
    return is_local or isinstance(error, _ABOUT_PATHS) or any(word in str(error) for word in _LASTING)


def _fsspec_protocols() -> list[str]:
    import fsspec

    return list(fsspec.available_protocols())


def _package(error: ImportError) -> str:
    """The package that fsspec says is missing, else the module that is."""
    words = str(error).split()
    return words[words.index("Install") + 1] if "Install" in words[:-1] else error.name or "the package of this scheme"
