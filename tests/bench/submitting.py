"""From a command to the first step on the same head: `orchestrator submit` from outside, `orchestrator run` within."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.pace import loss_times, steps_alone
from tests.ray_head import ROOT, Head, ray_head

SPEC = "configs/pretrain/demo.yaml"
STEPS = 3


def run(rounds: int) -> dict[str, float]:
    """Median seconds to the first step of each, taken in turn."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # a token in the home folder would turn authentication on
    # Jobs compile what they import once, as on anybody's nodes; `run` has what the installation has compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    taken: dict[str, list[float]] = {"run": [], "submit": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home, laptop = Path(folder) / "home", Path(folder) / "laptop"
        home.mkdir()
        laptop.mkdir()
        with ray_head(home, laptop) as head:
            _seconds("run", head)  # the data is prepared once, by nobody's account
            for _ in range(rounds):
                for name, seconds in taken.items():
                    seconds.append(_seconds(name, head))
                    print(f"{name:10} first step {seconds[-1]:6.2f} s", file=sys.stderr)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _seconds(name: str, head: Head) -> float:
    within = {**os.environ, "RAY_ADDRESS": head.gcs, "ORCHESTRATOR_HOME": str(head.home)}
    command = [sys.executable, "-m", "orchestrator", name, SPEC, "--fresh", f"name={name}", *steps_alone(STEPS)]
    started = time.time()
    subprocess.run(
        command if name == "run" else [*command, "--yes"],
        cwd=ROOT,
        env=within if name == "run" else head.outside(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (folder,) = (head.home / "runs").glob(f"{name}-*")
    return loss_times(folder / "outbox")[0] - started
