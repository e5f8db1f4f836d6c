"""Packing a clone that has grown: environments under names that nobody foresaw, and a folder of data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.submission.upload import find_upload, write_package
from tests.chaos.processes import ROOT

LEAST_BYTES = 5e9


def packed(folder: Path) -> tuple[float, float, int]:
    """(seconds, bytes in the clone, bytes that travel)."""
    clone = folder / "clone"
    subprocess.run(["git", "-c", "advice.detachedHead=false", "clone", "-q", str(ROOT), str(clone)], check=True)
    there = _bytes(clone)
    number = 0
    while there < LEAST_BYTES:
        environment = clone / f"python-{number}"
        shutil.copytree(sys.prefix, environment, symlinks=True, copy_function=_link)
        there += _bytes(environment)
        number += 1
    started = time.perf_counter()
    upload = find_upload(clone)
    write_package(upload, folder / "job.zip")
    return time.perf_counter() - started, there, upload.size


def _link(source: str, target: str) -> None:
    """As large, and no disk is taken where it can be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _bytes(folder: Path) -> int:
    return sum(
        Path(parent, name).lstat().st_size for parent, _, names in os.walk(folder, followlinks=False) for name in names
    )
