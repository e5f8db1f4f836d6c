"""`run` as a person meets it: signals, progress and the result; shared by the command line and the jobs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from orchestrator import console
from orchestrator.commands.measured import measured_lines
from orchestrator.doctor.ray_address import check_drives
from orchestrator.errors import OrchestratorError, SpecError, StorageError
from orchestrator.load_stages import load_any
from orchestrator.method_names import EVALUATE
from orchestrator.methods.as_is import EVALUATION
from orchestrator.planning.hardware import check_address_space
from orchestrator.progress_line import telling
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import StagedSpec

if TYPE_CHECKING:
    from orchestrator.scheduling.run_lifecycle import Listener

_NO_ANSWER: Mapping[str, Any] = {
    "mlflow_run_id": None,
    "checkpoint": None,
    "model_path": None,
    "metrics": {},
    "restarts": 0,
    "run_folder": None,
    "failure": None,
    "evaluation": None,
    "stages": None,
}
"""The fields of `run --json` when it failed before any of them was known."""


def run_command(path: str, overrides: Sequence[str] = (), *, fresh: bool = False, as_json: bool = False) -> None:
    """Loads a spec, runs it, shows the result; a failure ends the process with its exit code."""
    with answering_failures(as_json=as_json) as known:
        run_spec(load_any(path, overrides), fresh=fresh, as_json=as_json, known=known)


@contextmanager
def answering_failures(*, as_json: bool) -> Iterator[dict[str, Any]]:
    """Ends the process as `console.reporting_failures`; its answer says all that is known of the failed run by then.

    Gives the mapping to put that into; `failure` holds the error's message in its parts.
    """
    known = dict(_NO_ANSWER)
    with console.reporting_failures(as_json=as_json, answer=known):
        try:
            yield known
        except OrchestratorError as error:
            known["failure"] = {"what": error.what, "got": error.got, "allowed": error.allowed, "do": error.do}
            raise


def _newest_checkpoint(spec: RunSpec, run_folder: Path) -> str | None:
    """Where the newest complete one is; None without one, and where the storage does not answer."""
    from orchestrator.checkpoints import catalog
    from orchestrator.runs.attempts import Attempts
    from orchestrator.runs.job import checkpoints_of

    with suppress(OSError, StorageError):  # what ended the run is told, not this
        return catalog.newest_location(checkpoints_of(spec, run_folder), void=Attempts(run_folder).is_void)
    return None


def run_spec(spec: RunSpec | StagedSpec, *, fresh: bool, as_json: bool, known: dict[str, Any]) -> None:
    """Runs a spec with Ctrl-C and SIGTERM ending it cleanly. Raises what `launch` or `run_stages` raises.

    What is known before the end, the run's folder, its MLflow run and newest checkpoint, is put into `known`.
    """
    line = console.ProgressLine()
    with listening(line) as listener:
        from orchestrator.runs.job import bucket_of
        from orchestrator.scheduling.launch import launch
        from orchestrator.scheduling.run_stages import newest_begun, run_stages
        from orchestrator.tracking.tracker import TEST_FILE

        def opened(run_folder: Path, mlflow_run_id: str | None) -> None:
            known.update(run_folder=str(run_folder), mlflow_run_id=mlflow_run_id)

        try:
            if isinstance(spec, StagedSpec):
                result = run_stages(spec, replace(listener, opened=opened), fresh=fresh)
            else:
                result = launch(spec, replace(listener, opened=opened), fresh=fresh)
        except BaseException:
            if known["run_folder"] is not None:
                folder = Path(known["run_folder"])
                training = newest_begun(spec, folder) if isinstance(spec, StagedSpec) else (spec, folder)
                known["checkpoint"] = None if training is None else _newest_checkpoint(*training)
            raise
    if as_json:
        console.print_json(result.to_dict())
        return
    for note in result.notes:
        line.say(f"note: {note}")
    for stage in result.stages or ():
        line.say(f"stage {stage['name']}: {_figures(stage['metrics'])}")
    line.say(f"{result.status}  {_figures(result.metrics)}")
    if result.best is not None:
        line.say(f"best trial {result.best['trial']}: {result.best['overrides']}")
    if result.evaluation is not None:
        name = EVALUATION if isinstance(spec, RunSpec) and spec.kind == EVALUATE else TEST_FILE
        for row in measured_lines(result.evaluation, file=str(Path(result.run_folder) / name)):
            line.say(row)
    for label, value in (
        ("model", result.model_path),
        ("run folder", result.run_folder),
        ("kept in", None if isinstance(spec, StagedSpec) else bucket_of(spec, Path(result.run_folder))),
        ("MLflow run", result.mlflow_run_id),
    ):
        if value:
            line.say(f"{label + ':':<12}{value}")


def _figures(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in telling(metrics).items())


@contextmanager
def listening(line: console.ProgressLine) -> Iterator[Listener]:
    """Shows what happens on a line, which is closed at the end; Ctrl-C and SIGTERM are a wish to stop."""
    address = os.environ.get("RAY_ADDRESS")
    check_drives(address)
    if not address:
        check_address_space()
    stop = threading.Event()
    with signals_stop(stop, line) as signals:
        # Only now: a mistake in the spec should not wait for Ray's import.
        from orchestrator.scheduling.attempt import Watcher
        from orchestrator.scheduling.run_lifecycle import Listener

        watcher = Watcher(on_progress=line.show, on_retry=line.say, stop=stop)
        try:
            with redirect_stdout(sys.stderr):  # where Ray writes what it knows of a death; ours is for the answer
                yield Listener(
                    watcher=watcher, say=line.say, connecting=signals.ask_for_a_stop, connected=signals.install
                )
        finally:
            line.close()


class StopSignals:
    """What SIGINT and SIGTERM do: end the process at once while there is nothing to save, else ask for a clean stop."""

    def __init__(self, stop: threading.Event, line: console.ProgressLine) -> None:
        self._stop, self._line = stop, line
        self._ends_at_once = True
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask_for_a_stop(self) -> None:
        """From now on the first signal sets the event, and only a second one ends the process at once."""
        self._ends_at_once = False

    def install(self) -> None:
        """Puts the handlers in place, also again, for after Ray has replaced them."""
        for number in self._before:
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Puts back the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends_at_once or self._stop.is_set():
            raise KeyboardInterrupt
        self._stop.set()
        # From a thread: this handler may have interrupted the very write that it would wait for.
        note = "stopping: saving a checkpoint (again to end at once)"
        threading.Thread(target=self._line.say, args=(note,)).start()


@contextmanager
def signals_stop(stop: threading.Event, line: console.ProgressLine) -> Iterator[StopSignals]:
    """Handles SIGINT and SIGTERM within the block, as `StopSignals` says."""
    signals = StopSignals(stop, line)
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()


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
    parser.add_argument("--fresh", action="store_true", help="delete the saved state of an earlier run and start over")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sets a field of the spec")
    options = parser.parse_intermixed_args(list(arguments))
    with answering_failures(as_json=options.json) as known:
        spec = load_any(options.config, options.overrides)
        check_kind(spec, kinds=kinds, search=search, prog=prog)
        run_spec(spec, fresh=options.fresh, as_json=options.json, known=known)


def check_kind(spec: RunSpec | StagedSpec, *, kinds: Sequence[str], search: bool, prog: str) -> None:
    """Raises SpecError when a job is given a spec meant for another job; stages may be given to that of any of them."""
    trainings = [stage.spec for stage in spec.stages] if isinstance(spec, StagedSpec) else [spec]
    if any(one.kind in kinds and (one.search is not None) == search for one in trainings):
        return
    first = trainings[0]
    job = "jobs.tune" if first.search is not None else f"jobs.{first.kind}"
    raise SpecError(
        f"{prog} does not run this spec",
        got="stages" if len(trainings) > 1 else f"kind: {first.kind}" + (" with search" if first.search else ""),
        do=f"use python -m {job}",
    )
