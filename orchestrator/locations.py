"""Where things are: the project's own folder of state, and paths that name installed packages.

A location in a spec may be a plain path or glob, or one of

    package://NAME/path       inside the folder of an installed Python package (which is not imported)
    sysconfig://stdlib/path   below a path of `sysconfig`, such as the standard library's source

so that a shipped spec finds real data and models on any machine, or a URI of a store, such as `s3://BUCKET/path`, of
which this machine keeps a copy (`local_copy`).
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path

from orchestrator.credentials import hide
from orchestrator.errors import SpecError
from orchestrator.object_store import is_remote


def home() -> Path:
    """The folder for runs, caches and the default MLflow store: `$ORCHESTRATOR_HOME` or `~/.orchestrator`.

    It is not the working directory, because a submitted Ray job runs in a temporary copy of that.
    """
    return Path(os.environ.get("ORCHESTRATOR_HOME") or Path.home() / ".orchestrator").expanduser().absolute()


def data_cache() -> Path:
    """The folder of encoded data, which all runs on this machine share."""
    return home() / "cache" / "data"


def default_tracking_uri() -> str:
    """`$MLFLOW_TRACKING_URI` when set, as it may be shown, else a local SQLite store that needs no server."""
    return hide(os.environ.get("MLFLOW_TRACKING_URI", "")) or f"sqlite:///{home() / 'mlflow.db'}"


def resolve(location: str) -> str:
    """A location with its scheme replaced by the folder it stands for; plain paths pass unchanged. What lies in a store
    is copied to this machine first.

    Raises SpecError when the package is not installed or `sysconfig` has no such path, and what `local_copy` raises.
    """
    if is_remote(location):
        from orchestrator.local_copy import local_copy

        return local_copy(location, home() / "cache" / "stores")
    scheme, found, rest = location.partition("://")
    if not found or scheme not in ("package", "sysconfig"):
        return str(Path(location).expanduser()) if location.startswith("~") else location
    name, _, inside = rest.partition("/")
    folder = _package_folder(name, location) if scheme == "package" else _sysconfig_folder(name, location)
    return os.path.join(folder, inside) if inside else folder


def _package_folder(name: str, location: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise SpecError(
            f"the package {name!r} is not installed, so {location} cannot be found",
            got=location,
            do=f"pip install {name.replace('_', '-')}  (`make install` installs what the shipped specs use)",
        )
    return str(next(iter(found.submodule_search_locations)))


def _sysconfig_folder(name: str, location: str) -> str:
    if name not in sysconfig.get_path_names():
        raise SpecError(
            f"sysconfig has no path named {name!r}",
            got=location,
            allowed=", ".join(sysconfig.get_path_names()),
        )
    return sysconfig.get_path(name)
