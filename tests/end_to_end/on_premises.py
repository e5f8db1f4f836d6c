"""`cluster/on-premises.yaml` as a user runs it, on three hosts made of namespaces, with an sshd in each.

    python -m tests.end_to_end.on_premises DIST CORPUS

The commands are those on top of the file, word for word, in a checkout where only its names are filled in; DIST is what
`make wheel` built. What was seen is printed as one JSON object. Needs root; all of it ends with this process.

Each host has the repository's environment with a layer of its own on top, so that the file's own installation finds
every package there but the wheel, which it installs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.spec import RunSpec
from tests.chaos import hosts, processes
from tests.chaos.processes import ROOT, Machine
from tests.chaos.scene import RunFiles
from tests.end_to_end import runs

FILE = ROOT / "cluster" / "on-premises.yaml"
HEAD, *WORKERS = NAMES = ("head", "worker1", "worker2")
PLACE = Path("/mnt")
"""Becomes a file system in memory, in this process's own mount namespace."""
SHARED, LAPTOP = PLACE / "shared", PLACE / "laptop"
TOO_LONG_S = 240.0
"""For a step: the longest, `ray up`, takes 20 s on an idle machine and 60 s under a load of ten on two cores."""
DASHBOARD = "http://localhost:8265"
_COMMAND = re.compile(r"^#     (\S.*?)(?:[ \t]+# .*)?$", re.MULTILINE)


def commands() -> dict[str, str]:
    """The commands on top of the file by what they do; the environment they set is under `export`."""
    lines = _COMMAND.findall(FILE.read_text(encoding="utf-8").partition("\ncluster_name")[0])
    kinds = ("make wheel", "cluster check", "ray up", "ray dashboard", "export", "ray job submit", "ray down")
    found = {kind: line for kind in kinds for line in lines if kind in line}
    assert len(found) == len(lines) == len(kinds), lines
    return found


@dataclass
class Play:
    """The three hosts, and the machine that commands are typed on."""

    network: hosts.Network
    machines: dict[str, Machine] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def start_hosts(self) -> None:
        """Each with an sshd, a home folder and an environment of its own."""
        for name in NAMES:
            machine = self.machines[name] = self.network.start(name)
            layer = f"lowerdir={sys.prefix},upperdir=/run/layer/up,workdir=/run/layer/work"
            setup = (
                f"mount -t tmpfs tmpfs /run && mkdir -p /run/sshd /run/layer/up /run/layer/work {home(self.network)}"
                f" && mount -t overlay overlay -o {layer} {sys.prefix} && mount -t tmpfs tmpfs /tmp/ray"
            )
            subprocess.run([*machine.enter, "sh", "-c", setup], check=True)
            daemon = ["/usr/sbin/sshd", "-D", "-e", "-f", str(PLACE / "sshd_config")]
            processes.start([*machine.enter, *daemon], part=f"sshd {name}", log=PLACE / f"{name}.sshd.log")

    def left(self) -> list[str]:
        """What runs on the hosts but their first process and their sshd, by command line."""
        spaces = {name: _space(int(machine.enter[2])) for name, machine in self.machines.items()}
        found = []
        for process in psutil.process_iter():
            try:
                where = next((name for name, space in spaces.items() if space == _space(process.pid)), None)
                line = " ".join(process.cmdline())
            except (OSError, psutil.Error):
                continue
            if where and line and not re.match(r"sh -c hostname|sleep |sshd|/usr/sbin/sshd", line):
                found.append(f"{where}: {line[:120]}")
        return found

    def type_in(self, command: str, *, fails: bool = False) -> str:
        """Runs a command in the checkout, as on the user's machine; gives what it printed."""
        began = time.monotonic()
        script, log = f"{commands()['export']}\n{command}", PLACE / "typed.log"
        with log.open("wb") as out:  # no pipe: ssh's master process would keep it open
            process = subprocess.Popen(
                ["bash", "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
            try:
                code = process.wait(TOO_LONG_S)
            except subprocess.TimeoutExpired:
                code = 124
        self.seconds[command[:50]] = round(time.monotonic() - began, 1)
        printed = log.read_text(errors="replace")
        if code != 0 and not fails:
            raise RuntimeError(f"{command}: exit code {code}\n{printed[-9000:]}")
        return printed


def home(network: hosts.Network) -> Path:
    """The home folder of the account, another one on each host."""
    return network.private / "home"


def prepare(dist: Path) -> hosts.Network:
    """Mounts: a place in memory, a checkout with the names filled in, an account whose home is each host's own."""
    _shell(f"mount -t tmpfs tmpfs {PLACE} && ip link set lo up")
    folder = PLACE / "hosts"
    for made in (SHARED, LAPTOP / ".ssh", folder):
        made.mkdir(parents=True)
    control = Path("/tmp", "ray_ssh_" + hashlib.sha256(getuser().encode()).hexdigest()[:10])
    for temporary in (Path("/tmp/ray"), control):
        temporary.mkdir(exist_ok=True)
        _shell(f"mount -t tmpfs tmpfs {temporary}")
    network = hosts.Network(folder)
    key = LAPTOP / ".ssh" / "id_ed25519"
    _shell(f"ssh-keygen -q -t ed25519 -N '' -f {key} && ssh-keygen -q -t ed25519 -N '' -f {PLACE / 'host_key'}")
    (PLACE / "sshd_config").write_text(
        f"HostKey {PLACE / 'host_key'}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    accounts = Path("/etc/passwd").read_text().replace(":root:/root:", f":root:{home(network)}:")
    (PLACE / "passwd").write_text(re.sub("^(root:.*):[^:]*$", r"\1:/bin/bash", accounts, flags=re.MULTILINE))
    (PLACE / "filled.yaml").write_text(filled_in())
    (ROOT / "dist").mkdir(exist_ok=True)
    for source, target in ((PLACE / "passwd", "/etc/passwd"), (PLACE / "filled.yaml", FILE), (dist, ROOT / "dist")):
        _shell(f"mount --bind {source} {target}")
    environment = {"HOME": str(LAPTOP), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_", "ORCHESTRATOR_HOME"))]:
        del os.environ[name]
    os.environ.update(environment, RAY_USAGE_STATS_ENABLED="0")
    return network


def filled_in() -> str:
    """The file with its names, and nothing else, filled in."""
    text = FILE.read_text(encoding="utf-8")
    names = {
        "EDIT_HEAD_ADDRESS": "10.77.0.2",
        "EDIT_WORKER_ADDRESS_1": "10.77.0.3",
        "EDIT_WORKER_ADDRESS_2": "10.77.0.4",
        "EDIT_USER": "root",
        "~/.ssh/id_ed25519": f"{LAPTOP}/.ssh/id_ed25519",
        "EDIT_SHARED_FOLDER": str(SHARED),
        "VENV=$HOME/orchestrator-venv": f"VENV={sys.prefix}",
    }
    for name, value in names.items():
        assert text.count(name) == 1, name
        text = text.replace(name, value)
    return text


def play(corpus: Path, stage: Play, seen: dict[str, Any]) -> None:
    """Up, a training, stopped, taken up again, down. Writes what it sees into `seen` as it goes."""
    typed = commands()
    stage.start_hosts()
    stage.type_in(typed["make wheel"].partition("&& ")[2])
    seen["check"] = stage.type_in(typed["cluster check"])
    stage.type_in(typed["ray up"])
    seen["shells"] = {shell: stage.type_in(f"{_ssh(stage, HEAD)} {shell}") for shell in SHELLS}
    with dashboard(stage, typed["ray dashboard"]):
        seen["nodes"] = wait_for_nodes()
        spec = runs.pretraining(corpus, "on-premises", training__steps=STEPS, checkpoint__every_steps=None)
        submit = typed["ray job submit"].replace("configs/pretrain/demo.yaml", str(write(spec)))
        files = RunFiles(runs=SHARED / "orchestrator" / "runs", name=spec.name)
        stage.type_in(submit.replace("submit", "submit --no-wait --submission-id first", 1))
        await_true(lambda: files.step >= 20, "the first steps")
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
    return f"ssh {options} -i {LAPTOP}/.ssh/id_ed25519 root@{stage.machines[name].address}"


@contextmanager
def dashboard(stage: Play, command: str) -> Iterator[None]:
    """The forwarded port, for as long as it is needed."""
    log = PLACE / "dashboard.log"
    forward = processes.start(
        ["bash", "-c", command.removesuffix(" &")],
        part="dashboard",
        log=log,
        environment={"HOME": str(LAPTOP), "RAY_AUTH_MODE": "token"},
    )
    try:
        await_true(answers, "the job server")
        yield
    finally:
        processes.end("dashboard")
        forward.wait()


def answers() -> bool:
    """Whether the dashboard is there; without a token it refuses, which `stage.type_in` need not find out slowly."""
    try:
        urllib.request.urlopen(f"{DASHBOARD}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED
    except OSError:
        return False
    raise AssertionError("the dashboard answers without a token")


def ask(path: str, *, method: str = "GET") -> Any:
    """What the dashboard answers to the token."""
    token = (LAPTOP / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(f"{DASHBOARD}{path}", headers={"Authorization": f"Bearer {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def wait_for_nodes() -> list[str]:
    """Addresses of the cluster's nodes, once all are there."""

    def addresses() -> list[str]:
        nodes = ask("/api/v0/nodes")["data"]["result"]["result"]
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")

    await_true(lambda: len(addresses()) == len(NAMES), "the workers")
    return addresses()


def write(spec: RunSpec) -> Path:
    """The spec as a file that every host sees, each worker with both cores of a host."""
    raw = spec.model_dump(mode="json", exclude={"deepspeed"}) | {"deepspeed": {"zero_stage": 2}}
    raw["resources"]["cpus_per_worker"] = psutil.cpu_count()
    path = SHARED / "spec.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def await_true(condition: Callable[[], bool], what: str, *, within_s: float = TOO_LONG_S) -> None:
    """Polls; raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within_s} s")
        time.sleep(0.3)


def _space(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _shell(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True, capture_output=True)


def main(dist: Path, corpus: Path) -> int:
    """Plays it, prints what was seen, and the logs of what failed to standard error."""
    if not hosts.inside():
        hosts.enter("tests.end_to_end.on_premises", [str(dist), str(corpus)])
    stage, seen = Play(network=prepare(dist)), dict[str, Any]()
    began = time.monotonic()
    try:
        play(corpus, stage, seen)
    except BaseException:
        for log in sorted(PLACE.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        print("\n".join(stage.left()), file=sys.stderr)
        raise
    finally:
        stage.seconds["all"] = round(time.monotonic() - began, 1)
        seen["seconds"] = stage.seconds
        print(json.dumps(seen, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).absolute() for argument in sys.argv[1:])))
