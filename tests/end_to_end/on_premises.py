"""`cluster/on-premises.yaml` as a user runs it, on three played hosts.

python -m tests.end_to_end.on_premises DIST CORPUS
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.spec import RunSpec
from tests.chaos import hosts
from tests.chaos.processes import ROOT
from tests.chaos.scene import RunFiles
from tests.end_to_end import played_hosts, runs
from tests.end_to_end.played_hosts import AUTHORIZED_KEYS, LAPTOP, PLACE, Play, addresses, ask, await_true, commands

FILE = ROOT / "cluster" / "on-premises.yaml"
HEAD, *WORKERS = NAMES = ("head", "worker1", "worker2")
SHARED = PLACE / "shared"
KEY = LAPTOP / ".ssh" / "id_ed25519"
FILLED = {
    "EDIT_HEAD_ADDRESS": "10.77.0.2",
    "EDIT_WORKER_ADDRESS_1": "10.77.0.3",
    "EDIT_WORKER_ADDRESS_2": "10.77.0.4",
    "EDIT_USER": "root",
    "~/.ssh/id_ed25519": str(KEY),
    "EDIT_SHARED_FOLDER": str(SHARED),
    "VENV=$HOME/orchestrator-venv": f"VENV={sys.prefix}",
}


def prepare(dist: Path, names: Mapping[str, str] = FILLED) -> Play:
    """The hosts' network, a folder that all of them see, a key of whoever types, and the checkout with these names."""
    network = played_hosts.make_place()
    SHARED.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(KEY)], check=True)
    AUTHORIZED_KEYS.write_bytes(KEY.with_suffix(".pub").read_bytes())
    text = played_hosts.filled_in(FILE, names)
    return played_hosts.lay_out(network, file=FILE, text=text, dist=dist, user="root")


def play(corpus: Path, stage: Play, seen: dict[str, Any]) -> None:
    """Up, a training, stopped, taken up again, down. Writes what it sees into `seen` as it goes."""
    typed = commands(FILE)
    for name in NAMES:
        stage.start_host(name)
    stage.type_in(typed["make wheel"].partition("&& ")[2])
    seen["check"] = stage.type_in(typed["cluster check"])
    stage.type_in(typed["ray up"])
    seen["shells"] = {shell: stage.type_in(f"{_ssh(stage, HEAD)} {shell}") for shell in SHELLS}
    with played_hosts.dashboard(stage):
        spec = runs.pretraining(corpus, "on-premises", training__steps=STEPS, checkpoint__every_steps=None)
        submit = typed["ray job submit"].replace("configs/pretrain/demo.yaml", str(write(spec)))
        files = RunFiles(runs=SHARED / "orchestrator" / "runs", name=spec.name)
        stage.type_in(submit.replace("submit", "submit --no-wait --submission-id first", 1))
        await_true(lambda: files.step >= 20, "the first steps")  # the workers were not there yet
        seen["said"] = ask("/api/jobs/first/logs")["logs"]
        seen["nodes"] = addresses()
        seen["ranks"] = sorted(line.partition(":")[0] for line in stage.left() if "RayTrainWorker" in line)
        ask("/api/jobs/first/stop", method="POST")  # `ray job stop` takes seconds to start, and the training goes on
        await_true(lambda: ask("/api/jobs/first")["status"] != "RUNNING", "the job's end")
        seen["stopped"] = ask("/api/jobs/first")["status"]
        before = len(files.steps())
        seen["resumed"] = stage.type_in(submit)[-3000:]
        seen["steps"] = {"before": before, "first_after": files.steps()[before], "last": files.step}
        seen["taken"] = len(files.steps())
    seen["running"] = len(stage.left())
    seen["down"] = stage.type_in(typed["ray down"])[-1000:]
    began = time.monotonic()
    while stage.left() and time.monotonic() < began + 40:
        time.sleep(0.5)
    stage.seconds["processes end after ray down"] = round(time.monotonic() - began, 1)
    seen["left"] = stage.left()


STEPS = 400
"""Ten seconds and more, so that a stop at step 20 comes in time on a fast machine too."""
SHELLS = ("command -v ray", "'bash --login -c \"command -v ray\"'", "'bash -i -c \"command -v ray\"'")
"""A plain command over ssh, a login shell, and an interactive one."""


def _ssh(stage: Play, name: str) -> str:
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh {options} -i {KEY} root@{stage.machines[name].address}"


def write(spec: RunSpec) -> Path:
    """The spec as a file that every host sees, each worker with both cores of a host."""
    raw = spec.model_dump(mode="json", exclude={"deepspeed"}) | {"deepspeed": {"zero_stage": 2}}
    raw["resources"]["cpus_per_worker"] = psutil.cpu_count()
    path = SHARED / "spec.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def main(dist: Path, corpus: Path) -> int:
    """Plays it; see `played_hosts.perform`."""
    if not hosts.inside():
        hosts.enter("tests.end_to_end.on_premises", [str(dist), str(corpus)])
    stage = prepare(dist)
    return played_hosts.perform(stage, lambda seen: play(corpus, stage, seen))


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).absolute() for argument in sys.argv[1:])))
