"""A cluster file as a user runs it, on hosts made of namespaces with an sshd in each: what the plays share.

A play types the commands on top of a file, word for word, in a checkout where only the file's names are filled in, and
prints what it saw as one JSON object. It runs in namespaces of its own (`python -m MODULE DIST ...`, DIST being what
`make wheel` built), and all of it ends with its process. Needs root.

Each host has the repository's environment with a layer of its own on top, so that the file's own installation finds
every package there but the wheel, which it installs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import hosts, processes
from tests.chaos.processes import ROOT, Machine

PLACE = Path("/mnt")
"""Becomes a file system in memory, in the play's own mount namespace."""
LAPTOP = PLACE / "laptop"
"""The home folder of whoever types."""
TEMPORARY = PLACE / "tmp"
"""Where `ray up` remembers what it was given, by the file's text alone."""
AUTHORIZED_KEYS = PLACE / "authorized_keys"
"""Whose owners the hosts let in."""
PLAY_S = 1140.0
"""A whole play: 190 to 280 s on an idle machine, and other tests have its cores too."""
TOO_LONG_S = 360.0
"""For a step: the longest, `ray up`, takes 20 s on an idle machine and 60 s under a load of ten on two cores."""
DASHBOARD = "http://localhost:8265"
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "nsenter", "make")
_COMMAND = re.compile(r"^#     (\S.*?)(?:[ \t]+# .*)?$", re.MULTILINE)
_KINDS = ("make wheel", "cluster check", "ray up", "ray dashboard", "export", "ray job submit", "ray down")


def commands(file: Path) -> dict[str, str]:
    """The commands on top of a cluster file by what they do; the environment they set is under `export`.

    An installation of a package that the tests have anyway is left out.
    """
    lines = _COMMAND.findall(file.read_text(encoding="utf-8").partition("\ncluster_name")[0])
    lines = [line for line in lines if not line.startswith("pip install ")]
    found = {kind: line for kind in _KINDS for line in lines if kind in line}
    assert len(found) == len(lines) == len(_KINDS), lines
    return found


def filled_in(file: Path, names: Mapping[str, str]) -> str:
    """The file with these names, and nothing else, filled in; each stands in it once."""
    text = file.read_text(encoding="utf-8")
    for name, value in names.items():
        assert text.count(name) == 1, name
        text = text.replace(name, value)
    return text


@dataclass
class Play:
    """The hosts, and the machine that commands are typed on."""

    network: hosts.Network
    file: Path
    machines: dict[str, Machine] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def start_host(self, name: str, *, number: int | None = None) -> None:
        """Starts a host with an sshd, a home folder and an environment of its own."""
        machine = self.network.start(name, number=number)
        layer = f"lowerdir={sys.prefix},upperdir=/run/layer/up,workdir=/run/layer/work"
        setup = (
            f"mount -t tmpfs tmpfs /run && mkdir -p /run/sshd /run/layer/up /run/layer/work {home(self.network)}"
            f" && mount -t overlay overlay -o {layer} {sys.prefix} && mount -t tmpfs tmpfs /tmp/ray"
        )
        subprocess.run([*machine.enter, "sh", "-c", setup], check=True)
        daemon = ["/usr/sbin/sshd", "-D", "-e", "-f", str(PLACE / "sshd_config")]
        processes.start([*machine.enter, *daemon], part=f"sshd {name}", log=PLACE / f"{name}.sshd.log")
        self.machines[name] = machine

    def kill_host(self, name: str) -> None:
        """Ends a host with all of its processes."""
        del self.machines[name]
        self.network.kill(name)

    def home(self, name: str) -> Path:
        """The home folder of the account on a host, as the play sees it."""
        return self.network.disk(name) / home(self.network).relative_to(self.network.private)

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

    def logs_of_ray(self) -> Iterator[Path]:
        """Of jobs and of the autoscaler, on all hosts."""
        for machine in self.machines.values():
            folder = Path("/proc", machine.enter[2], "root/tmp/ray")
            for name in ("monitor.log", "job-driver-*.log"):
                yield from folder.glob(f"session_2*/logs/{name}")

    def type_in(self, command: str, *, fails: bool = False) -> str:
        """Runs a command in the checkout, as on the user's machine; gives what it printed."""
        began = time.monotonic()
        script, log = f"{commands(self.file)['export']}\n{command}", PLACE / "typed.log"
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

    def await_true(self, condition: Callable[[], bool], what: str, *, within_s: float = TOO_LONG_S) -> None:
        """Polls, and notes how long it took; raises TimeoutError."""
        began = time.monotonic()
        await_true(condition, what, within_s=within_s)
        self.seconds[what] = round(time.monotonic() - began, 1)


def on_hosts() -> list[str]:
    """Command lines of whatever runs on any host."""
    found = []
    for process in psutil.process_iter():
        try:
            if _space(process.pid) != _space(os.getpid()):
                found.append(" ".join(process.cmdline())[:120])
        except (OSError, psutil.Error):
            continue
    return found


def home(network: hosts.Network) -> Path:
    """The home folder of the account, another one on each host."""
    return network.private / "home"


def make_place() -> hosts.Network:
    """Mounts a place in memory and what Ray and ssh keep below /tmp, and makes the network that hosts will be on."""
    _shell(f"mount -t tmpfs tmpfs {PLACE} && ip link set lo up")
    folder = PLACE / "hosts"
    for made in (LAPTOP / ".ssh", TEMPORARY, folder):
        made.mkdir(parents=True)
    control = Path("/tmp", "ray_ssh_" + hashlib.sha256(getuser().encode()).hexdigest()[:10])
    for temporary in (Path("/tmp/ray"), control):
        temporary.mkdir(exist_ok=True)
        _shell(f"mount -t tmpfs tmpfs {temporary}")
    return hosts.Network(folder)


def lay_out(
    network: hosts.Network,
    *,
    file: Path,
    text: str,
    dist: Path,
    user: str,
    environment: Mapping[str, str] | None = None,
) -> Play:
    """A checkout whose cluster file has this text, and an account whose home is each host's own.

    Every session on a host has `environment`, as a machine's image or its provider would give it.
    """
    given = " ".join(f"{name}={value}" for name, value in (environment or {}).items())
    _shell(f"ssh-keygen -q -t ed25519 -N '' -f {PLACE / 'host_key'}")
    (PLACE / "sshd_config").write_text(
        f"HostKey {PLACE / 'host_key'}\nAuthorizedKeysFile {AUTHORIZED_KEYS}\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n" + (f"SetEnv {given}\n" if given else "")
    )
    accounts = Path("/etc/passwd").read_text().replace(":root:/root:", f":root:{home(network)}:")
    accounts = re.sub("^(root:.*):[^:]*$", r"\1:/bin/bash", accounts, flags=re.MULTILINE)
    if user != "root":
        accounts += f"{user}:x:0:0::{home(network)}:/bin/bash\n"  # the image's user, who may do all by `sudo`
    (PLACE / "passwd").write_text(accounts)
    (PLACE / "filled.yaml").write_text(text)
    (ROOT / "dist").mkdir(exist_ok=True)  # it stays: another play may have its own wheel mounted there
    for source, target in ((PLACE / "passwd", "/etc/passwd"), (PLACE / "filled.yaml", file), (dist, ROOT / "dist")):
        _shell(f"mount --bind {source} {target}")
    own = {"HOME": str(LAPTOP), "TMPDIR": str(TEMPORARY)}
    own |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_", "ORCHESTRATOR_HOME"))]:
        del os.environ[name]
    os.environ.update(own, RAY_USAGE_STATS_ENABLED="0")
    return Play(network=network, file=file)


@contextmanager
def dashboard(play: Play) -> Iterator[None]:
    """The forwarded port, for as long as it is needed."""
    forward = processes.start(
        ["bash", "-c", commands(play.file)["ray dashboard"].removesuffix(" &")],
        part="dashboard",
        log=PLACE / "dashboard.log",
        environment={"HOME": str(LAPTOP), "RAY_AUTH_MODE": "token"},
    )
    try:
        await_true(_answers, "the job server")
        yield
    finally:
        processes.end("dashboard")
        forward.wait()


def _answers() -> bool:
    """Whether the dashboard is there; without a token it refuses, which `type_in` need not find out slowly."""
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


def addresses() -> list[str]:
    """Addresses of the cluster's nodes."""
    nodes = ask("/api/v0/nodes")["data"]["result"]["result"]
    return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")


def await_true(condition: Callable[[], bool], what: str, *, within_s: float = TOO_LONG_S) -> None:
    """Polls; raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within_s} s")
        time.sleep(0.3)


def perform(play: Play, act: Callable[[dict[str, Any]], None]) -> int:
    """Plays it, prints what was seen, and the logs of what failed to standard error."""
    seen = dict[str, Any]()
    began = time.monotonic()
    try:
        act(seen)
    except BaseException:
        for log in [*sorted(PLACE.glob("*.log")), *play.logs_of_ray()]:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        print("\n".join(play.left()), file=sys.stderr)
        raise
    finally:
        play.seconds["all"] = round(time.monotonic() - began, 1)
        seen["seconds"] = play.seconds
        print(json.dumps(seen, indent=2))
    return 0


def why_not() -> str | None:
    """Why no hosts can be played here; None where they can."""
    missing = [name for name in _NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"hosts are played with {', '.join(missing)}: not installed"
    if sys.prefix == sys.base_prefix:
        return "each host has a layer of its own on a virtual environment: use one"
    if not hosts.available():
        return "hosts are played in namespaces with mounts of their own: be root"
    return None


def seen_by(module: str, *, file: Path, folder: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What a play has seen, with a wheel of this checkout; its seconds are printed."""
    build = [
        *commands(file)["make wheel"].split("&&")[0].split(),
        f"DIST={folder / 'dist'}",
        f"PYTHON={sys.executable}",
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", module, str(folder / "dist"), *arguments]
    environment = os.environ | {"PATH": SYSTEM_PATH}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PLAY_S
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-20000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    print(answer["seconds"], file=sys.stderr)
    return answer


def _space(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _shell(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True, capture_output=True)
