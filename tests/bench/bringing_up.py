"""From machines with nothing but Python to a training's first step: `ray up` of three hosts, with packages at hand.

python -m tests.bench.bringing_up DIST PACKAGES    within namespaces of its own; needs root

The hosts' shared folder holds the wheels already, as after an earlier cluster; each host installs them into an
environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.pace import loss_times
from tests.chaos import hosts
from tests.chaos.processes import ROOT
from tests.chaos.scene import RunFiles
from tests.end_to_end import played_hosts
from tests.end_to_end.on_premises import FILE, FILLED, NAMES, SHARED, prepare
from tests.end_to_end.played_hosts import Play, addresses, await_true, commands

_PYTHON = {"PYTHON=python3": f"PYTHON={sys.base_prefix}/bin/python3"}
_NAMES = {name: value for name, value in FILLED.items() if not name.startswith("VENV=")} | _PYTHON


def first_step_s(folder: Path) -> dict[str, float]:
    """Seconds from `ray up` until it ended, until all nodes were there, and until the first step."""
    packages = folder / "packages"
    _collect(packages)
    seen = played_hosts.seen_by("tests.bench.bringing_up", file=FILE, folder=folder, arguments=[str(packages)])
    return {what: seen[what] for what in ("ray up", "nodes", "first step")}


def _collect(packages: Path) -> None:
    """All packages as wheels, by nobody's account."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(packages)]
    subprocess.run([*pip, "--constraint", "constraints.txt", "."], cwd=ROOT, check=True, capture_output=True)
    for own in packages.glob("orchestrator-*.whl"):
        own.unlink()  # `ray up` brings it


def play(stage: Play, packages: Path, seen: dict[str, Any]) -> None:
    """Up, one training, and its first step."""
    typed = commands(FILE)
    (SHARED / "orchestrator-packages").symlink_to(packages)
    for name in NAMES:
        stage.start_host(name)
    stage.type_in(typed["make wheel"].partition("&& ")[2])
    began = time.time()
    stage.type_in(typed["ray up"])
    seen["ray up"] = time.time() - began
    with played_hosts.dashboard(stage):
        await_true(lambda: len(addresses()) == len(NAMES), "the workers")
        seen["nodes"] = time.time() - began
        job = typed["ray job submit"].replace("submit", "submit --no-wait", 1)
        stage.type_in(f"{job} resources.workers=2 resources.cpus_per_worker=2 name=first")
        files = RunFiles(runs=SHARED / "orchestrator" / "runs", name="first")
        await_true(lambda: files.step >= 1, "the first step")
        assert files.folder is not None
        seen["first step"] = loss_times(files.folder / "outbox")[0] - began


def main(dist: Path, packages: Path) -> int:
    """Plays it; see `played_hosts.perform`."""
    if not hosts.inside():
        hosts.enter("tests.bench.bringing_up", [str(dist), str(packages)])
    stage = prepare(dist, _NAMES)
    return played_hosts.perform(stage, lambda seen: play(stage, packages, seen))


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).absolute() for argument in sys.argv[1:])))
