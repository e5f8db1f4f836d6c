"""One scenario under way: its cluster, its command, the files of its run, its tracking server and its disk.

Moments look at a scene and faults change it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.tracking.run_record import OUTBOX
from tests.chaos import processes
from tests.chaos.cluster import HEAD, Cluster
from tests.chaos.servers import Bucket, Server

DRIVER = "driver"
_COMPLETE = re.compile(r"step-\d{8}")


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run writes on the disk that every node sees."""

    runs: Path
    name: str
    bucket: Bucket | None = None
    """Where its checkpoints go instead, if not to the run's folder."""
    lost: Path | None = None
    """Where the suite keeps the points of a disk that the run has lost, to count its steps."""

    @property
    def folder(self) -> Path | None:
        """The run's folder, once it is there."""
        own = re.compile(re.escape(self.name) + "-[0-9a-f]{8}")  # and not that of a longer name
        return next((path for path in self.runs.glob(f"{self.name}-*") if own.fullmatch(path.name)), None)

    def steps(self) -> list[int]:
        """Steps noted by rank 0 in any attempt, a step once for each time that it was taken."""
        return [step for _, step in self.taken()]

    def taken(self) -> list[tuple[str, int]]:
        """Likewise, each with the trial that has taken it; nothing for a training."""
        found = []
        for name, file in self._points():
            for line in file.read_text(errors="replace").splitlines():
                if '"train/loss"' in line and line.endswith("}"):
                    found.append(("/".join(name.split("/")[:-2]), int(json.loads(line)["step"])))
        return found

    @property
    def step(self) -> int:
        """The highest step that was ever taken."""
        return max(self.steps(), default=0)

    def is_saving(self, step: int) -> bool:
        """Whether the checkpoint of a step is being written."""
        if self.bucket is not None:
            return bool(self._objects(step)) and not self.is_saved(step)
        folder = self.folder
        return folder is not None and any((folder / "checkpoints").glob(f"step-{step:08d}*.writing"))

    def is_saved(self, step: int) -> bool:
        """Whether it is complete."""
        if self.bucket is not None:
            return any(key.endswith("/manifest.json") for key in self._objects(step))
        return self.folder is not None and (self.folder / "checkpoints" / f"step-{step:08d}").is_dir()

    def newest_checkpoint(self) -> Path:
        """Folder of the newest complete checkpoint; raises LookupError when there is none."""
        there = [] if self.folder is None else list((self.folder / "checkpoints").glob("step-*"))
        complete = [path for path in there if _COMPLETE.fullmatch(path.name)]
        if not complete:
            raise LookupError("there is no checkpoint yet")
        return max(complete)

    def _points(self) -> list[tuple[str, Path]]:
        """Files of metrics, by their names in the run's folder; checkpoints, which come and go, are not looked into."""
        found = {}
        for place in (self.folder, self.lost):  # of a file in both, the lost one is longer
            if place is None:
                continue
            for parent, folders, names in os.walk(place):
                folders[:] = [name for name in folders if name != "checkpoints"]
                files = [
                    Path(parent, name) for name in names if name.endswith(".jsonl") and Path(parent).name == OUTBOX
                ]
                found.update({str(file.relative_to(place)): file for file in files})
        return sorted(found.items())

    def _objects(self, step: int) -> list[str]:
        assert self.bucket is not None
        return [key for key in self.bucket.names() if f"/step-{step:08d}" in key]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How one command ended."""

    code: int
    said: Mapping[str, Any]
    """The object on its standard output; empty when it was killed before."""
    log: str

    @property
    def ending(self) -> str:
        """`finished`, `killed`, or what the error says."""
        if not self.said:
            return "killed" if self.code < 0 or self.code == 137 else f"exit code {self.code}"
        failure = self.said.get("failure")
        return str(self.said["status"] if failure is None else failure["what"])


class Scene:
    """Everything that a fault can reach."""

    def __init__(self, *, cluster: Cluster, files: RunFiles, spec: Path, folder: Path) -> None:
        self.cluster, self.files = cluster, files
        self.server: Server | None = None
        """The tracking server, when the scenario has one."""
        self.objects: Server | None = None
        """The object store, when it has one."""
        self.storage: Path | None = None
        """A small disk of the scenario's own, when it has one."""
        self.struck_at: list[float] = []
        """When each fault struck, seconds since the epoch."""
        self.notes: list[str] = []
        """What a reader of the table should know."""
        self.runs = 1
        """MLflow runs that there should be."""
        self.problems: list[str] = []
        """What is wrong whatever the outcome is."""
        self._spec, self._folder = spec, folder
        self._stopped: list[psutil.Process] = []
        self._cut: set[str] = set()
        self._blind: set[str] = set()
        self._commands = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start_command(self, *, fresh: bool = False) -> None:
        """`orchestrator run SPEC --json` on the head's machine; `fresh` gives up what was kept."""
        self._commands += 1
        self.runs += fresh
        self._process = processes.start(
            [sys.executable, "-m", "orchestrator", "run", str(self._spec), "--json", *(["--fresh"] if fresh else [])],
            part=DRIVER,
            log=self._log,
            out=self._out,
            machine=self.cluster.machine(HEAD),
            environment={**self.cluster.environment, "RAY_ADDRESS": self.cluster.address},
        )

    def answer(self) -> Answer | None:
        """How the command ended, or None while it runs."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return None
        processes.end(DRIVER)  # what it may have left behind on a host
        before, brace, rest = self._out.read_text().partition("{\n")
        if before:
            self.problems.append(f"on standard output before the JSON object: {before[:100]!r}")
        said = json.loads(brace + rest) if rest else {}
        return Answer(code=code, said=said, log=self._log.read_text()[-3000:])

    def flush(self) -> None:
        """`orchestrator flush` on the run's folder; a failure is a problem."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "flush", str(self.files.folder)],
            cwd=processes.ROOT,
            env={**os.environ, **self.cluster.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            self.problems.append(f"flush ended with {done.returncode}: {done.stderr.strip()[-200:]}")

    def end_command(self) -> None:
        """Kills the command, if it runs."""
        processes.end(DRIVER)
        if self._process is not None:
            self._process.wait()

    # -- what faults do to it ------------------------------------------------------------------------------------

    def leader(self) -> psutil.Process:
        """Rank 0's process: the one that has the metrics file open. Raises LookupError when there is none."""
        for worker in reversed(processes.workers()):
            if any(f"/{self.files.name}-" in file and file.endswith(".jsonl") for file in _open_files(worker)):
                return worker
        raise LookupError("no worker writes metrics")

    def others(self) -> list[psutil.Process]:
        """The other ranks' processes."""
        leader = self.leader()
        kind = processes.title(leader).partition(".")[0]  # a trial with workers of its own is no worker
        same = [worker for worker in processes.workers() if processes.title(worker).startswith(kind)]
        return [worker for worker in same if worker.pid != leader.pid]

    def stop(self, process: psutil.Process) -> None:
        """SIGSTOP; `repair` continues it."""
        self._stopped.append(process)
        process.suspend()

    def slow_down(self, process: psutil.Process) -> None:
        """Lets it run a fifth of the time, for as long as it lives."""
        threading.Thread(target=_brake, args=(process,), name="brake", daemon=True).start()

    def hide_runs(self, node: str) -> None:
        """A host no longer sees the folder of runs, until `repair`."""
        subprocess.run(
            [*self.cluster.machine(node).enter, "mount", "-t", "tmpfs", "tmpfs", self.files.runs], check=True
        )
        self._blind.add(node)

    def cut(self, node: str) -> None:
        """Takes a host off the network until `heal` or `repair`."""
        assert self.cluster.network is not None, "a link can be cut on hosts only"
        self._cut.add(node)
        self.cluster.network.cut(node)

    def heal(self) -> None:
        """Puts all cables back."""
        assert self.cluster.network is not None
        for node in self._cut:
            self.cluster.network.heal(node)
        self._cut.clear()

    def wake(self) -> None:
        """Continues what was stopped."""
        for process in self._stopped:
            if process.is_running():
                process.resume()
        self._stopped.clear()

    def repair(self) -> None:
        """What an operator does before giving the same command again: everything is up and there is room."""
        self.wake()
        for node in self._cut:  # Ray gives a node up that it has lost: it starts anew
            self.cluster.kill(node)
        self._cut.clear()
        for node in self._blind:
            subprocess.run([*self.cluster.machine(node).enter, "umount", self.files.runs], check=True)
        self._blind.clear()
        if self.storage is not None:
            (self.storage / "filler").unlink(missing_ok=True)
        for server in (self.server, self.objects):
            if server is not None:
                server.start()
        self.cluster.repair()

    def left_over(self, *, within_s: float) -> list[str]:
        """Workers that still run some time after the command has ended."""
        deadline = time.monotonic() + within_s
        while (left := processes.workers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [processes.title(worker) for worker in left]

    @property
    def _log(self) -> Path:
        return self._folder / f"command-{self._commands}.log"

    @property
    def _out(self) -> Path:
        return self._folder / f"command-{self._commands}.json"


def _brake(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        while process.is_running():
            process.suspend()
            time.sleep(0.008)
            process.resume()
            time.sleep(0.002)


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:
        return []
