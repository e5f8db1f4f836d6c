"""The real command in a process of its own: with its own state folder, by which all it starts can be found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests import specs

ROOT = Path(__file__).parents[2]
GONE_S = 10.0
"""How long processes may take to go after the command has ended."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def answer(self) -> dict[str, Any]:
        """Standard output as the one JSON object that `--json` promises."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass(kw_only=True)
class Place:
    """A working place: spec, data and state of the runs of one test."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def spec(self) -> Path:
        return self.folder / "spec.yaml"

    def write(self, base: Mapping[str, Any] = specs.PRETRAIN, **changes: Any) -> Path:
        """The spec of this place: `specs.raw` with a corpus of its own."""
        raw = specs.raw(dict(base), **changes)
        if raw["data"]["train"] == "corpus":
            raw["data"]["train"] = str(specs.write_corpus(self.folder / "corpus"))
        self.spec.write_text(yaml.safe_dump(raw))
        return self.spec

    def run(self, *arguments: str, timeout: float = 300, **environment: str) -> Done:
        """Runs `orchestrator ...` to its end."""
        with self.start(*arguments, **environment) as running:
            return running.finish(timeout)

    @contextmanager
    def start(self, *arguments: str, terminal: int | None = None, **environment: str) -> Iterator[Running]:
        """Starts `orchestrator ...`, with standard error on `terminal` where one is given; ends what is left of it."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *arguments],
                cwd=ROOT,
                env={**os.environ, "ORCHESTRATOR_HOME": str(self.home), **self.environment, **environment},
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=stdout,
                stderr=stderr if terminal is None else terminal,
                start_new_session=True,
                # On a terminal Ctrl-C goes to every process of the foreground group, so make this one that.
                preexec_fn=None if terminal is None else lambda: _take_terminal(terminal),
            )
        running = Running(process=process, place=self, out=out, err=err, started=time.monotonic())
        try:
            yield running
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for left in self.processes():
                left.kill()

    def processes(self) -> list[psutil.Process]:
        """All live processes that have this place's state folder in their environment: the command and Ray's."""
        return [process for process in psutil.process_iter() if _has_home(process, str(self.home))]

    def left_over(self) -> list[str]:
        """What still runs some seconds after the command has ended."""
        deadline = time.monotonic() + GONE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.cmdline())[:100] for process in left if process.is_running()]


@dataclass(frozen=True, kw_only=True)
class Running:
    """A command under way."""

    process: subprocess.Popen[bytes]
    place: Place
    out: Path
    err: Path
    started: float

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Returns once standard error holds `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.err.read_text():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.err.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.err.read_text()}"
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        self.process.send_signal(number)

    def finish(self, timeout: float = 300) -> Done:
        """Waits for the end."""
        code = self.process.wait(timeout)
        return Done(
            code=code, out=self.out.read_text(), err=self.err.read_text(), seconds=time.monotonic() - self.started
        )


def _take_terminal(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def _has_home(process: psutil.Process, home: str) -> bool:
    try:
        return process.environ().get("ORCHESTRATOR_HOME") == home and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
