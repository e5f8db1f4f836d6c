"""What of a folder travels to the cluster with a job: decided first, then packed into one file.

Ray's own packing reads `.gitignore` and `.rayignore`, in every folder. Here the same rules hold, and beyond them: no
virtual environment travels, whatever its name, nor a store, a cache or a `.env`; the files that the spec names by
relative paths do, whatever the rules say.
"""

from __future__ import annotations

import glob
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from orchestrator.errors import SpecError

LIMIT_BYTES = 100 * 1024**2
"""Of a package: what the job server of Ray 2.60 takes in one request (its DASHBOARD_CLIENT_MAX_SIZE); more is answered
by 413 (measured)."""
_IGNORE_FILES = (".gitignore", ".rayignore")
_NEVER = GitIgnoreSpec.from_lines(
    [
        *(".git", "__pycache__", ".venv", "venv", "node_modules", "*.egg-info", ".ipynb_checkpoints"),
        *(".*_cache", ".hypothesis", ".env", ".env.*", "mlruns", "mlartifacts", "*.db", "*.db-wal", "*.db-shm"),
    ]
)
"""Names that no training reads: versions, environments, caches, secrets, MLflow's stores."""
_ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
"""What a virtual environment has in its folder: venv, virtualenv and uv the one, conda the other."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date of a zip file. A package is known by its content, so an unchanged one is not sent again."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What travels."""

    files: tuple[tuple[str, Path], ...]
    """(path in the job's folder, file here), sorted."""
    size: int
    """Bytes of the files."""

    def largest(self, most: int = 3) -> list[tuple[str, int]]:
        """The folders that weigh most, two levels deep at the most, with their bytes."""
        weights: Counter[str] = Counter()
        for name, file in self.files:
            weights["/".join(PurePosixPath(name).parts[:-1][:2]) or name] += file.stat().st_size
        return weights.most_common(most)


def find_upload(folder: Path, *, needed: Iterable[tuple[str, Path]] = ()) -> Upload:
    """What of a folder travels, and `needed` files as (path in the job's folder, file here) in any case.

    Raises SpecError when it is more than a job server takes, with the folders that weigh most.
    """
    files = dict(_travelling(folder, folder, ()))
    files |= dict(needed)
    upload = Upload(files=tuple(sorted(files.items())), size=sum(file.stat().st_size for file in files.values()))
    if upload.size > LIMIT_BYTES:
        heavy = ", ".join(f"{name} {size / 1024**2:.0f} MiB" for name, size in upload.largest())
        raise SpecError(
            "the working directory is too large for a job",
            got=f"{upload.size / 1024**2:.0f} MiB in {folder}; the largest: {heavy}",
            allowed=f"{LIMIT_BYTES / 1024**2:.0f} MiB in one upload to Ray's job server",
            do="name what the job does not need in .rayignore, and put data where the nodes read it: a shared folder "
            "or a bucket",
        )
    return upload


def write_package(upload: Upload, file: Path) -> None:
    """Packs what travels; the same files make the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for name, source in upload.files:
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (source.stat().st_mode & 0o777) << 16
            package.writestr(entry, source.read_bytes())


def files_at(location: str, folder: Path) -> list[tuple[str, Path]]:
    """The files that a relative path, or glob, of a spec stands for below a folder; empty for any other location."""
    if "://" in location or location.startswith(("/", "~")):
        return []
    path = folder / location
    found = [path] if path.exists() else [Path(one) for one in glob.glob(str(path), recursive=True)]
    files = [file for one in found for file in (_all_files(one) if one.is_dir() else [one])]
    inside = [(os.path.normpath(os.path.relpath(file, folder)), file) for file in files]
    return [(PurePosixPath(name).as_posix(), file) for name, file in inside if not name.startswith("..")]


def _all_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _travelling(root: Path, folder: Path, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> Iterator[tuple[str, Path]]:
    own = [(folder, spec) for name in _IGNORE_FILES if (spec := _rules_in(folder / name)) is not None]
    rules = (*rules, *own)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        is_folder = entry.is_dir(follow_symlinks=False)
        if _is_left_out(entry.name + "/" * is_folder, path, rules) or (is_folder and _is_environment(path)):
            continue
        if is_folder:
            yield from _travelling(root, path, rules)
        elif entry.is_file():  # a link to a folder may lead anywhere, also in a circle
            yield path.relative_to(root).as_posix(), path


def _rules_in(file: Path) -> GitIgnoreSpec | None:
    return (
        GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8", errors="replace").splitlines())
        if file.is_file()
        else None
    )


def _is_left_out(name: str, path: Path, rules: Sequence[tuple[Path, GitIgnoreSpec]]) -> bool:
    """`name` is the path's last part, with a slash behind that of a folder."""
    parents = [(path.parent.relative_to(of).as_posix(), spec) for of, spec in rules]
    return _NEVER.match_file(name) or any(spec.match_file(f"{parent}/{name}") for parent, spec in parents)


def _is_environment(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in _ENVIRONMENT_MARKS)
