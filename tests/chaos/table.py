"""The rows as markdown for the README, and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

import psutil

from tests.chaos.runner import Row

_COLUMNS = ("fault", "outcome", "seconds to the first new step", "steps taken again", "curve", "metrics lost")
_LIBRARIES = ("ray", "torch", "deepspeed", "mlflow")


def markdown(rows: Sequence[Row]) -> str:
    """One line for each row, and the machine and versions below; problems stand in the outcome. Pure but for those."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * 2}{' ---: |' * 2} --- | ---: |"]
    for row in rows:
        outcome = "; ".join((row.outcome, *(f"**{problem}**" for problem in row.problems)))
        cells = (row.fault, outcome, f"{row.pause_s:.1f}", row.steps_again, curve(row), row.metrics_lost)
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join([*lines, "", machine()])


def curve(row: Row) -> str:
    """`identical`, or how far apart."""
    return "identical" if row.apart == 0 else f"within {row.apart:.0e}"


def as_json(rows: Sequence[Row]) -> str:
    """One object: rows and machine."""
    return json.dumps({"rows": [asdict(row) for row in rows], "machine": machine()}, indent=1)


def machine() -> str:
    """Hardware and versions in one line."""
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    gib = psutil.virtual_memory().total / 2**30
    cores = psutil.cpu_count()
    return f"{cores} cores ({platform.machine()}), {gib:.0f} GiB, Python {platform.python_version()}, {libraries}."
