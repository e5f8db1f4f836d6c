"""What fsspec opens, behind pyarrow's interface: with times of change, folders made as needed, and OSErrors alone.

pyarrow's own handler leaves the time of change out for most protocols, which name it differently, trusts listings that
fsspec keeps, and lets through what the protocol's library raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

import fsspec
from pyarrow import PythonFile
from pyarrow.fs import FileInfo, FSSpecHandler, PyFileSystem

from orchestrator.errors import one_line

_TIMES = ("mtime", "last_modified", "LastModified", "modified", "updated", "created")
"""Keys under which fsspec's file systems tell when a file was changed."""
_ABOUT_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_ABOUT_ACCESS = ("auth", "credential", "permission", "forbidden")
"""In the names of errors that waiting does not mend."""

P = ParamSpec("P")
T = TypeVar("T")


def open_fsspec(uri: str) -> tuple[Any, str]:
    """A `pyarrow.fs.FileSystem` for a URI, and the path in it.

    Raises OSError, ValueError for a scheme that fsspec does not know, and ImportError where its package is missing.
    """
    fsspec.get_filesystem_class(uri.partition("://")[0])
    # No instance that others share: its listings would be as old as their first look.
    files, path = _raising_oserrors(fsspec.core.url_to_fs)(uri, skip_instance_cache=True, use_listings_cache=False)
    return PyFileSystem(_Handler(files)), path


def _raising_oserrors(method: Callable[P, T]) -> Callable[P, T]:
    """The function, whose errors are OSErrors: with an errno those about a path or a right, without one the rest, which
    may be over soon."""

    @functools.wraps(method)
    def raising(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (*_ABOUT_PATHS, ImportError):
            raise
        except Exception as error:  # each protocol has kinds of its own
            kind, text = type(error).__name__, one_line(error, most=300)
            if any(word in f"{kind} {text}".lower() for word in _ABOUT_ACCESS):
                raise PermissionError(f"{kind}: {text}") from error
            raise OSError(f"{kind}: {text}") from error

    return raising


class _Handler(FSSpecHandler):  # type: ignore[misc]
    @staticmethod
    def _create_file_info(path: str, info: dict[str, Any]) -> FileInfo:
        made = FSSpecHandler._create_file_info(path, {**info, "mtime": None})
        changed = next((info[key] for key in _TIMES if info.get(key) is not None), None)
        if isinstance(changed, str):
            changed = datetime.fromisoformat(changed)
        if isinstance(changed, datetime) and changed.tzinfo is None:
            changed = changed.replace(tzinfo=UTC)
        return FileInfo(path, made.type, size=made.size, mtime=changed)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        folder = path.rpartition("/")[0]
        if folder:
            self.fs.makedirs(folder, exist_ok=True)
        return PythonFile(_Stream(self.fs.open(path, mode="wb")), mode="w")

    def open_input_stream(self, path: str) -> Any:
        return PythonFile(_Stream(self.fs.open(path, mode="rb")), mode="r")


for _name in (
    *("get_file_info", "get_file_info_selector", "create_dir", "delete_dir", "delete_dir_contents", "delete_file"),
    *("open_output_stream", "open_input_stream"),
):
    setattr(_Handler, _name, _raising_oserrors(getattr(_Handler, _name)))


class _Stream:
    """A file of fsspec whose errors are OSErrors; written bytes arrive, or fail to, when it is closed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    @_raising_oserrors
    def read(self, size: int = -1) -> Any:
        return self._file.read(size)

    @_raising_oserrors
    def write(self, data: Any) -> Any:
        return self._file.write(data)

    @_raising_oserrors
    def flush(self) -> None:
        """Nothing: what an object store holds is whole or not there at all."""

    @_raising_oserrors
    def close(self) -> None:
        self._file.close()
