"""`run` as a person meets it: signals, progress and the result; shared by the command line and the jobs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from orchestrator import console
from orchestrator.errors import SpecError
from orchestrator.spec import RunSpec
from orchestrator.spec_file import load_spec

_NO_ANSWER: Mapping[str, Any] = {
    "mlflow_run_id": None,
    "checkpoint": None,
    "model_path": None,
    "metrics": {},
    "restarts": 0,
}
"""The fields of `run --json` when it failed."""


def run_command(path: str, overrides: Sequence[str] = (), *, fresh: bool = False, as_json: bool = False) -> None:
    """Loads a spec, runs it, shows the result; a failure ends the process with its exit code."""
    with console.reporting_failures(as_json=as_json, answer=_NO_ANSWER):
        run_spec(load_spec(path, overrides), fresh=fresh, as_json=as_json)


def run_spec(spec: RunSpec, *, fresh: bool, as_json: bool) -> None:
    """Runs a spec with Ctrl-C and SIGTERM ending it cleanly. Raises what `launch` raises."""
    line = console.ProgressLine()
    stop = threading.Event()
    with signals_stop(stop, line) as install_handlers:
        # Only now: a mistake in the spec should not wait for Ray's import.
        from orchestrator.scheduling.launch import Listener, launch
        from orchestrator.scheduling.train_run import Watcher

        watcher = Watcher(on_progress=line.show, on_retry=line.say, stop=stop)
        try:
            result = launch(spec, Listener(watcher=watcher, say=line.say, connected=install_handlers), fresh=fresh)
        finally:
            line.close()
    if as_json:
        console.print_json(result.to_dict())
        return
    for note in result.notes:
        line.say(f"note: {note}")
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if name.startswith("eval/"))
    line.say(f"{result.status}  {figures}")
    if result.best is not None:
        line.say(f"best trial {result.best['trial']}: {result.best['overrides']}")
    for label, value in (
        ("model", result.model_path),
        ("run folder", result.run_folder),
        ("MLflow run", result.mlflow_run_id),
    ):
        if value:
            line.say(f"{label + ':':<12}{value}")


@contextmanager
def signals_stop(stop: threading.Event, line: console.ProgressLine) -> Iterator[Callable[[], None]]:
    """The first SIGINT or SIGTERM sets the event, a second one ends the process at once.

    Gives a function that installs the handlers again, for after Ray has replaced them.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # From a thread: this handler may have interrupted the very write that it would wait for.
        threading.Thread(target=line.say, args=("stopping: saving a checkpoint (again to end at once)",)).start()

    def install() -> None:
        for number in before:
            signal.signal(number, handle)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_of_job(arguments: Sequence[str], *, kinds: Sequence[str], search: bool, prog: str) -> None:
    """The body of every module in `jobs/`: `--config FILE [key=value ...]`, refusing a spec of another kind."""
    import argparse

    job = prog.removeprefix("jobs.")
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=f"Runs a {'search over specs' if search else 'spec'} of kind {' or '.join(kinds)}.",
        epilog=f"Example: ray job submit --working-dir . -- python -m {prog} --config configs/{job}/demo.yaml",
    )
    parser.add_argument("--config", required=True, help=f"spec file, such as configs/{job}/demo.yaml")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run of this spec")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sets a field of the spec")
    options = parser.parse_intermixed_args(list(arguments))
    with console.reporting_failures(as_json=options.json, answer=_NO_ANSWER):
        spec = load_spec(options.config, options.overrides)
        check_kind(spec, kinds=kinds, search=search, prog=prog)
        run_spec(spec, fresh=options.fresh, as_json=options.json)


def check_kind(spec: RunSpec, *, kinds: Sequence[str], search: bool, prog: str) -> None:
    """Raises SpecError when a job is given a spec meant for another job."""
    job = "jobs.tune" if spec.search is not None else f"jobs.{spec.kind}"
    if spec.kind not in kinds or (spec.search is not None) != search:
        raise SpecError(
            f"{prog} does not run this spec",
            got=f"kind: {spec.kind}" + (" with search" if spec.search else ""),
            do=f"use python -m {job}",
        )
