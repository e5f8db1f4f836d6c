"""Why would a run fail on this machine? A list of findings, each with what to do about it.

Called by `orchestrator doctor`. Nothing is changed, Ray is not started, torch is not imported here. What can hang (GPU
driver, Ray cluster, MLflow store) is asked in the background: all together take under 8 s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import locations
from orchestrator.credentials import hide
from orchestrator.doctor import machine_checks
from orchestrator.doctor.machine_checks import Finding, fail, ok, warn
from orchestrator.doctor.ray_address import check_ray_address
from orchestrator.errors import OrchestratorError, one_line

if TYPE_CHECKING:
    from rich.table import Table

PROBE_TIMEOUT_S = 6.0
"""For outside programs and connections; guess: importing torch takes 1 to 4 s, nvidia-smi up to 3 s."""
DEADLINE_S = 7.0
"""For what may hang: above PROBE_TIMEOUT_S, and above the 5 s in which the store's own check gives up with a reason."""


def diagnose(
    *,
    tracking_uri: str | None = None,
    check_store: Callable[[str], None] | None = None,
    constraints: Path | None = None,
) -> list[Finding]:
    """All findings about this machine, in the order in which to fix them; raises nothing.

    `check_store` raises when the MLflow store at a URI cannot be used; without it that check is left out.
    """
    uri = tracking_uri or locations.default_tracking_uri()
    slow = [
        _in_background("gpus", check_gpus),
        _in_background("ray address", lambda: check_ray_address(os.environ.get("RAY_ADDRESS", ""))),
    ]
    if check_store is not None:
        slow.append(_in_background("mlflow", lambda: check_mlflow(uri, check_store)))
    return [*machine_checks.all_findings(constraints), *(finding for finish in slow for finding in finish())]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 when any check failed, else 0; warnings do not count."""
    return int(any(finding.status == "fail" for finding in findings))


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as one JSON object."""
    return {"ok": exit_code(findings) == 0, "findings": [asdict(finding) for finding in findings]}


def render(findings: Sequence[Finding]) -> Table:
    """The findings as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("check", "status", "what was seen", box=None, pad_edge=False)
    for finding in findings:
        seen = finding.detail if finding.remedy is None else f"{finding.detail}\n-> {finding.remedy}"
        table.add_row(finding.check, Text(finding.status, style=styles[finding.status]), Text(seen))
    return table


def check_gpus() -> Finding:
    """Does the driver show GPUs, and can torch use them?"""
    if shutil.which("nvidia-smi") is None:
        return ok("gpus", "none (no nvidia-smi); runs use the CPU")
    # Other processes, so that a diagnosis neither holds GPU memory nor waits for a driver that hangs.
    listed, probed = _outputs(
        ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        (sys.executable, "-c", "import torch; print(torch.version.cuda, torch.cuda.device_count())"),
    )
    if not listed:
        remedy = "run `nvidia-smi` and follow what it says; after a driver update a reboot is needed"
        return warn("gpus", "nvidia-smi is there but lists no GPU", remedy)
    gpus = listed.splitlines()
    detail = f"{len(gpus)} x {gpus[0]}"
    if not probed:
        remedy = "`python -c 'import torch; print(torch.cuda.is_available())'` shows why"
        return warn("gpus", f"{detail}; torch did not answer in {PROBE_TIMEOUT_S:g} s", remedy)
    cuda, _, count = probed.rpartition(" ")
    if count == "0":
        built = "is a build without CUDA" if cuda == "None" else f"(CUDA {cuda}) sees none of them"
        remedy = "install torch's CUDA build, or a driver new enough for it; unset CUDA_VISIBLE_DEVICES"
        return fail("gpus", f"{detail}; torch {built}", remedy)
    return ok("gpus", f"{detail}; torch with CUDA {cuda} sees {count}")


def _outputs(*commands: Sequence[str]) -> list[str]:
    """What programs that run side by side printed; empty for one that failed or outlasted PROBE_TIMEOUT_S."""
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for c in commands]
    outputs = []
    for process in started:
        with process:
            try:
                output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                output = ""
        outputs.append(output.strip() if process.returncode == 0 else "")
    return outputs


_OR_LOCAL = "start that server, or unset MLFLOW_TRACKING_URI to record in a local file"


def check_mlflow(uri: str, check_store: Callable[[str], None]) -> Finding:
    """Can the MLflow store be used? `check_store` raises when not."""
    try:
        check_store(uri)
    # Whatever went wrong in there is the finding.
    except Exception as error:
        text, remedy = one_line(error, most=None) or type(error).__name__, _OR_LOCAL
        if isinstance(error, OrchestratorError):
            text, remedy = f"{error.what} ({error.got})" if error.got else error.what, error.do or _OR_LOCAL
        return fail("mlflow", text, remedy)
    return ok("mlflow", f"{hide(uri)} can be used")


def _in_background(name: str, check: Callable[[], Finding | None]) -> Callable[[], list[Finding]]:
    """Starts a check beside the others; what is returned waits for it, up to DEADLINE_S from now.

    As a daemon, a thread that some library holds up keeps nobody from leaving.
    """
    answers: list[Finding | None] = []
    deadline = time.monotonic() + DEADLINE_S
    thread = threading.Thread(target=lambda: answers.append(check()), name=f"doctor-{name}", daemon=True)
    thread.start()

    def finish() -> list[Finding]:
        thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if not answers:
            return [fail(name, f"no answer in {DEADLINE_S:g} s", "whatever it asks hangs: see that it runs")]
        return [answer for answer in answers if answer is not None]

    return finish
