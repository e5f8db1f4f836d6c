"""What ranks that hang or drag were doing: their Python stacks, taken on their own nodes; and their end.

py-spy, which comes with Ray, also reads a process that is stopped or deadlocked. Where the kernel does not let it
(Yama, a container without SYS_PTRACE), a process that called `answer_stack_signal` writes its own stacks on SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from orchestrator.errors import one_line
from orchestrator.scheduling.decisions.liveness import Place
from orchestrator.scheduling.nodes import ask_nodes

_DEADLINE_S = 15.0
"""For all dumps together: a node that is frozen never answers. Ray's process and py-spy take 2 to 3 s (measured)."""
_PY_SPY_S = 5.0
_TRIES = 3
"""py-spy reads a process that runs on meanwhile, and may find it in the middle of a change."""
_SIGNAL_S = 2.0
"""A process that runs answers the signal at once, one that is stopped never does."""
_OWN_STACKS = "orchestrator-stacks"


def keep_stacks(
    folder: Path,
    places: Sequence[Place],
    *,
    kind: Literal["hang", "straggler"] = "hang",
    reason: str,
    deadline_s: float = _DEADLINE_S,
) -> str:
    """Writes the stacks of these ranks to a new file in `folder`; says in one sentence where, or why not. Never raises.

    Called by the driver before it ends their processes; takes `deadline_s` seconds at most.
    """
    text = f"{reason}\n\n{dump_stacks(places, deadline_s=deadline_s)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + sum(1 for _ in folder.glob(f"{kind}-*.txt"))
        file = folder / f"{kind}-{number}.txt"
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"their stacks could not be kept ({error})"
    return f"their stacks are in {file}"


def dump_stacks(places: Sequence[Place], *, deadline_s: float = _DEADLINE_S) -> str:
    """The stacks of these ranks as text, with a line for each that did not answer within `deadline_s`. Never raises."""
    answers = ask_nodes(stacks_of, places, deadline_s=deadline_s)
    return "\n".join(f"== {place}\n{answers[place.rank].strip()}\n" for place in places)


def end_ranks(places: Sequence[Place], *, deadline_s: float = _DEADLINE_S) -> dict[int, str]:
    """Kills these ranks' processes on their nodes; says of each whether that was done. Never raises.

    Ray asks a process to end itself, which one that is stopped does not do.
    """
    return ask_nodes(_kill, places, deadline_s=deadline_s)


def answer_stack_signal() -> None:
    """From now on this process writes its stacks on SIGUSR1, also where a thread holds the interpreter for good.

    They go to a file in memory that only this process's entry in /proc shows, so nothing is left behind; systems
    without such files (all but Linux) have py-spy only.
    """
    if hasattr(os, "memfd_create"):
        faulthandler.register(signal.SIGUSR1, file=os.memfd_create(_OWN_STACKS), all_threads=True)


def stacks_of(pid: int) -> str:
    """The stacks of a process on this machine, and its state; why there are none where that is so. Never raises."""
    try:
        state = psutil.Process(pid).status()
    except psutil.Error:
        return "its process is gone"
    text = _py_spy(pid)
    if text.startswith("Process "):
        return f"State: {state}\n{text}"
    return f"State: {state}\n{_own_stacks(pid) or 'no stacks of its own'}\n(py-spy: {text})"


def _kill(pid: int) -> str:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as error:
        return f"not killed ({error.strerror})"
    return "killed"


def _py_spy(pid: int) -> str:
    """Its dump, which begins with `Process`, or what it said instead. It does not stop the process, which may be
    stopped already, or be needed by others."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "not installed"
    said = ""
    for _ in range(_TRIES):
        try:
            done = subprocess.run(
                [program, "dump", "--nonblocking", "--pid", str(pid)],
                capture_output=True,
                text=True,
                timeout=_PY_SPY_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return one_line(error)
        if done.returncode == 0:
            return done.stdout
        said = done.stderr.partition("Stack backtrace:")[0]
    return " ".join(said.split())[:300]


def _own_stacks(pid: int) -> str:
    """What a process writes of itself when it is asked by signal; empty if it does not answer, or never offered to."""
    file = _stacks_file(pid)
    if file is None:  # the signal would end a process that does not expect it
        return ""
    try:
        before = size = file.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + _SIGNAL_S
        while time.monotonic() < deadline and not before < file.stat().st_size == size:
            size = file.stat().st_size
            time.sleep(0.1)
        with file.open("rb") as stream:
            stream.seek(before)
            return stream.read().decode(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def _stacks_file(pid: int) -> Path | None:
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if _OWN_STACKS in os.readlink(entry):
                return entry
    except OSError:
        return None
    return None
