"""One case: a command line with the files it is given, run in this process under limits, and what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from orchestrator import cli, console
from orchestrator.errors import CapacityError, OrchestratorError

CASE_CPU_S = 3.0
"""Seconds of this process's own time that a case may take; most take milliseconds. Waiting is not counted."""
CASE_GROWTH_MIB = 600
"""How much memory one case may take that none before it took."""
_INTERVAL = {"low", "mid", "high"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, and the files that are there."""

    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was wrong with a case."""

    what: str
    """Where it happened, the same for the same fault."""
    case: Case
    details: str = ""

    def __str__(self) -> str:
        shown = {name: content[-400:] for name, content in self.case.files.items() if name != "corpus/one.txt"}
        arguments = " ".join(repr(a if len(a) < 200 else a[:200] + "...") for a in self.case.arguments)
        return f"{self.what}\n  {arguments}\n  {shown}\n{self.details}"


class TooLong(BaseException):
    """The limit of a case; no `except Exception` of the code under test takes it."""


_command = typer.main.get_command(cli.app)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a case ended."""

    answered: bool
    """Whether it ended with exit code 0."""
    finding: Finding | None = None
    """None when it was answered or refused as it should be."""


def run_case(case: Case, folder: Path) -> Result:
    """Runs a case in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    out, err, refusals = io.StringIO(), io.StringIO(), list[OrchestratorError]()
    peak_before = _peak_mib()
    before = os.getcwd()
    code: Any = 0
    os.chdir(folder)
    began = time.process_time()
    try:
        with _noted(refusals), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited():
            try:
                _command.main(list(case.arguments), prog_name="orchestrator", standalone_mode=True)
            except SystemExit as end:
                code = end.code
    except (Exception, TooLong) as error:
        return Result(answered=False, finding=Finding(what=_place(error), case=case, details=_last_lines(error)))
    finally:
        os.chdir(before)
    problem = _problem(code, refusals, out.getvalue(), err.getvalue(), as_json="--json" in case.arguments)
    if problem is None and (grown := _peak_mib() - peak_before) > CASE_GROWTH_MIB:
        problem = f"took {grown:.0f} MiB"
    if problem is None:
        return Result(answered=code in (0, None))
    details = f"{time.process_time() - began:.2f} s\n{err.getvalue()[-1500:]}\n{out.getvalue()[-500:]}"
    return Result(answered=False, finding=Finding(what=problem, case=case, details=details))


def _problem(code: Any, refusals: list[OrchestratorError], out: str, err: str, *, as_json: bool) -> str | None:
    """What is wrong with how a command ended, if anything."""
    if code not in (0, 1, 2, None):
        return f"exit code {code}"
    if code == 1 and not all(isinstance(error, CapacityError) for error in refusals):
        return f"exit code 1: {refusals[0].what}"
    if code in (1, 2):
        if "Traceback" in err:
            return "a traceback"
        text = str(refusals[0]) if refusals else err
        if not text.strip():
            return "refused without a word"
        if any(ord(c) < 32 and c not in "\t\n" for c in text):
            return "control characters in a message"
        if len(text) > 6000:
            return f"a message of {len(text)} characters: {text[:60]}"
        return None
    if not as_json:
        return None
    try:
        answer = json.loads(out)
    except ValueError:
        return "--json answered something else"
    holes = sorted(set(_holes(answer)))
    return f"figures that are no numbers: {', '.join(holes)}" if holes else None


def _holes(value: Any, path: str = "") -> Iterator[str]:
    """Paths of intervals whose ends are null, infinite or out of order."""
    if isinstance(value, dict):
        if value.keys() >= _INTERVAL:
            ends = [value["low"], value["mid"], value["high"]]
            whole = all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
            if not whole or not ends[0] <= ends[1] * (1 + 1e-9) <= ends[2] * (1 + 1e-9) ** 2:
                yield path
        for key, item in value.items():
            yield from _holes(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _holes(item, f"{path}[]")


@contextlib.contextmanager
def _noted(refusals: list[OrchestratorError]) -> Iterator[None]:
    original = console.print_error

    def note(error: OrchestratorError) -> None:
        refusals.append(error)
        original(error)

    console.print_error = note
    try:
        yield
    finally:
        console.print_error = original


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise TooLong(f"more than {CASE_CPU_S:g} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _place(error: BaseException) -> str:
    """The kind of an error and the innermost line of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if f"{os.sep}orchestrator{os.sep}" in one.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} at {place}"


def _last_lines(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-500:]
