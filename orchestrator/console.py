"""What a person reads: progress and messages on standard error, answers on standard output.

Labels, columns and file names come from outside, so all text passes `shown` on its way to a terminal, and so does what
may hold a password.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from orchestrator import errors
from orchestrator.credentials import public, without_credentials
from orchestrator.errors import ClusterError, Interrupted, OrchestratorError, SpecError, StorageError

_PLAIN_EVERY_S = 5.0
"""In a log, a progress line at most this often, and one for every evaluation."""


def shown(text: str) -> str:
    """A text without credentials and without what commands a terminal."""
    return errors.shown(without_credentials(text))


class ProgressLine:
    """One line that rewrites itself on a terminal, and plain lines in a log."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rewrites = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._open = False
        self._last_s = 0.0
        self._last_evaluation: dict[str, float] = {}
        self._lock = threading.Lock()

    def show(self, progress: Mapping[str, Any]) -> None:
        """Shows a `Progress`; in a log only when enough time has passed or an evaluation is new."""
        metrics = progress["metrics"]
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        with self._lock:
            now = time.monotonic()
            news = evaluation != self._last_evaluation
            last_step = progress["step"] == progress["steps"] and progress["phase"] == "training"
            if not self._rewrites and not news and not last_step and now - self._last_s < _PLAIN_EVERY_S:
                return
            self._last_s, self._last_evaluation = now, evaluation
            from orchestrator.progress_line import describe  # commands that answer at once need none

            text = shown(describe(progress))
            if self._rewrites:
                width = os.get_terminal_size(self._stream.fileno()).columns
                self._stream.write("\r\x1b[K" + text[: max(20, width - 1)])
                self._open = True
            else:
                self._stream.write(text + "\n")
            self._stream.flush()

    def say(self, text: str) -> None:
        """One line that stays."""
        with self._lock:
            self._stream.write(("\r\x1b[K" if self._open else "") + shown(text) + "\n")
            self._stream.flush()
            self._open = False

    def close(self) -> None:
        """Leaves the last progress line standing."""
        with self._lock:
            if self._open:
                self._stream.write("\n")
                self._stream.flush()
                self._open = False


def width() -> int:
    """Columns of the terminal, 100 in a file."""
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100


def print_table(*tables: Any) -> None:
    """Rich renderables on standard output."""
    from rich.console import Console

    console = Console(width=width(), highlight=False, markup=False)  # [/] may stand in any name
    for table in tables:
        console.print(_Shown(table))


class _Shown:
    """A renderable whose text is made printable; what Rich itself sends to the terminal stays."""

    def __init__(self, renderable: Any) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for segment in console.render(self._renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))


def print_lines(*lines: str) -> None:
    """Lines of an answer, unwrapped, on standard output."""
    sys.stdout.write("".join(shown(line) + "\n" for line in lines))
    sys.stdout.flush()


def print_log(text: str, *, to_errors: bool) -> None:
    """A part of a job's log as it comes, on standard output or beside an answer: a line that rewrote itself is left
    as it stood last."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    stream = sys.stderr if to_errors else sys.stdout
    stream.write(shown("\n".join(lines)))
    stream.flush()


def is_answered() -> bool:
    """Whether someone at a terminal can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask(question: str) -> bool:
    """A question on standard error, whose answer is yes or no; no when there is none."""
    sys.stderr.write(f"{shown(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_messages(*lines: str) -> None:
    """Lines beside an answer, on standard error."""
    sys.stderr.write("".join(shown(line) + "\n" for line in lines))
    sys.stderr.flush()


def print_error(error: OrchestratorError) -> None:
    """The message of an error, on standard error."""
    print_messages(f"error: {error}")


def _of_the_system(error: OSError) -> OrchestratorError:
    """A failure of the file system that nobody foresaw, as one of ours."""
    if error.errno == errno.ENAMETOOLONG:  # which no disk is to blame for
        return SpecError("no file can have so long a name", got=error.filename, do="give the path of a file")
    place = f"{error.filename}: " if error.filename else ""
    return StorageError(
        "a file cannot be read or written",
        got=f"{place}{error.strerror or error}",
        do="`orchestrator doctor` looks at disks and rights",
    )


@contextmanager
def reporting_failures(*, as_json: bool, answer: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Ends the process with a message and the exit code of the error; no traceback for what is no bug of ours.

    With `as_json` standard output gets one object all the same: `status` and `error`, after the fields of `answer`.
    """
    try:
        yield
        return
    except OrchestratorError as error:
        failure = error
    except BrokenPipeError:
        raise  # whoever read our output is gone
    except OSError as error:
        failure = _of_the_system(error)
    except MemoryError:
        failure = ClusterError(
            "this process has no memory left",
            do="raise its limit (`ulimit -v`, the container's), or run where there is more memory",
        )
    except KeyboardInterrupt:
        failure = Interrupted("ended at once", do="a run goes on from its newest checkpoint with the same command")
    except Exception as error:  # a bug: the traceback is wanted, and so is the promised object
        if as_json:
            print_json({**(answer or {}), "status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    print_error(failure)
    if as_json:
        print_json({**(answer or {}), "status": "failed", "error": str(failure)})
    sys.exit(failure.exit_code)


def print_json(answer: Mapping[str, Any]) -> None:
    """One JSON object on standard output; not-a-number becomes null, which JSON has."""
    sys.stdout.write(json.dumps(_finite(public(answer)), indent=2) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
