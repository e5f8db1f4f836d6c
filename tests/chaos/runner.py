"""Plays a scenario: starts the command, strikes, gives the command again where it ended, and judges what came out."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests import specs
from tests.chaos import processes
from tests.chaos.cluster import HEAD, Cluster
from tests.chaos.curves import COMPARED, LOSSES, Tracked, difference, longest_pause_s, losses, out_of_order, tracked
from tests.chaos.hosts import SUITE
from tests.chaos.processes import HERE, Machine
from tests.chaos.scenarios import FINISHED, LAYOUTS, SAVE_EVERY, STEPS, Scenario, Strike
from tests.chaos.scene import Answer, RunFiles, Scene
from tests.chaos.servers import BUCKET, Bucket, object_store, s3_environment, tracking_server

EXPERIMENT = "chaos"
_ATTEMPT_TAG = ".attempt."
_POLL_S = 0.02
_COMMAND_S = 600.0
"""Longest life of one command; a guess: a training takes 30 s, and each recovery half a minute on a busy machine."""
_MOST_COMMANDS = 6
_NOTHING_LEFT = "no checkpoint of this run can be read"
"""The one ending after which the same command does not help: a random fault has damaged the only checkpoint."""
_STALL_WITHIN_S = 15.0
"""How long after a fault training may go on before it stands still; a guess."""
_GONE_S = 20.0
"""How long workers may take to end after their command has; a guess for a busy machine."""
_DISK_BYTES = 48 << 20
"""Room for three checkpoints of 4 MiB, a model and what is being written."""

BASE: Mapping[str, Any] = {
    "kind": "pretrain",
    # Dropout is on in GPT-2 unless it is turned off.
    "model": {"config": "gpt2", "overrides": {"n_layer": 2, "n_embd": 128, "n_head": 4}, "vocab_size": 512},
    "data": {"sequence_length": 128, "validation_fraction": 0.1, "max_validation_examples": 2},
    "training": {
        "steps": STEPS,
        "global_batch": 16,
        "micro_batch": 4,  # two workers: accumulation of 2
        "learning_rate": 1e-3,
        "eval_every_steps": 25,
    },
    "deepspeed": {"zero_stage": 2},
    "resources": {"workers": 2, "cpus_per_worker": 1},
    "checkpoint": {"every_steps": SAVE_EVERY, "keep": 3},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one scenario."""

    name: str
    fault: str
    outcome: str
    """How the commands ended."""
    pause_s: float
    """Longest time from a fault to the first step that is new; the same command is given again at once."""
    steps_again: int
    """Steps that were taken more than once."""
    apart: float
    """Largest relative difference of any compared figure; 0 is bit for bit."""
    metrics_lost: int
    problems: tuple[str, ...]
    """Why the scenario did not end as it should; none when it did."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    """Of the whole scenario."""


class Stage:
    """Clusters, data and undisturbed runs, shared by scenarios."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._home = folder / "home"
        self._home.mkdir()
        self._corpus = specs.write_corpus(folder / "corpus", documents=120)
        self._store = f"sqlite:///{self._home / 'mlflow.db'}"
        self._s3_port = processes.free_port()
        self._cluster: Cluster | None = None
        self._layout = ""
        self._references: dict[str, Tracked] = {}

    def play(self, scenario: Scenario) -> Row:
        """Runs a scenario to its end, whatever that is; a failure of the suite itself is a problem of its row."""
        started = time.monotonic()
        try:
            row = self._played(scenario)
        except (TimeoutError, RuntimeError, OSError) as error:
            row = Row(
                name=scenario.name,
                fault=scenario.fault,
                outcome="not played",
                pause_s=0.0,
                steps_again=0,
                apart=math.inf,
                metrics_lost=0,
                problems=(f"the suite failed: {error}",),
            )
            self.close()  # the next scenario gets a fresh cluster
        return replace(row, seconds=time.monotonic() - started)

    def _played(self, scenario: Scenario) -> Row:
        reference = self._reference(scenario)
        with self._scene(scenario) as scene:
            answers = _act(scene, list(scenario.strikes))
            if scenario.endings is not None and len(scene.struck_at) < len(scenario.strikes):
                scene.problems.append("not all faults came to strike")
            left_over = scene.left_over(within_s=_GONE_S)
            scene.repair()
            if scenario.flush:
                scene.flush()
            run = tracked(self._store, EXPERIMENT, scenario.name)
            return _judge(scenario, scene, answers, run=run, reference=reference, left_over=left_over)

    def close(self) -> None:
        """Ends the cluster."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster, self._layout = None, ""

    def _reference(self, scenario: Scenario) -> Tracked:
        """What the same training comes to when nobody disturbs it; runs that learn the same share one."""
        layout = scenario.reference or scenario.layout
        shaping = {key: value for key, value in scenario.changes.items() if key.startswith(("training.", "model."))}
        name = "-".join(["undisturbed", layout, *(str(value) for value in shaping.values())])
        if "search" in scenario.changes:
            shaping, name = dict(scenario.changes), f"{name}-search-{scenario.changes['resources.workers']}"
        if name not in self._references:
            undisturbed = Scenario(
                name=name, fault="none", strikes=(), layout=layout, changes=shaping, objects=LAYOUTS[layout].apart
            )
            with self._scene(undisturbed) as scene:
                answers = _act(scene, [])
            if [answer.ending for answer in answers] != [FINISHED]:
                raise RuntimeError(f"the undisturbed run did not finish: {answers[-1].ending}\n{answers[-1].log}")
            self._references[name] = tracked(self._store, EXPERIMENT, name)
        return self._references[name]

    @contextmanager
    def _scene(self, scenario: Scenario) -> Iterator[Scene]:
        """A place for one scenario; whatever it leaves in the cluster is gone for the next one."""
        folder = self._folder / scenario.name
        folder.mkdir(exist_ok=True)
        cluster = self._ready_cluster(scenario.layout)
        head = cluster.machine(HEAD)
        with _small_disk(folder / "disk") if scenario.small_disk else nullcontext() as disk:
            server = tracking_server(self._store, folder=folder, machine=head) if scenario.server else None
            objects = (
                object_store(folder=folder, port=self._s3_port, machine=_reached_by_all(scenario.layout))
                if scenario.objects
                else None
            )
            for started in (server, objects):
                if started is not None:
                    started.start()
            storage = f"s3://{BUCKET}/runs" if objects is not None else disk
            uri = self._store if server is None else server.uri
            scene = Scene(
                cluster=cluster,
                files=RunFiles(
                    runs=disk or self._home / "runs",
                    name=scenario.name,
                    bucket=None if objects is None else Bucket(objects.uri),
                    lost=folder / "lost",
                ),
                spec=_write_spec(scenario, folder=folder, corpus=self._corpus, uri=uri, storage=storage),
                folder=folder,
            )
            scene.server, scene.objects, scene.storage = server, objects, disk
            try:
                yield scene
            finally:
                scene.end_command()
                scene.wake()
                if scene.left_over(within_s=_GONE_S):
                    cluster.kill_all()
                for started in (server, objects):
                    if started is not None:
                        started.kill()

    def _ready_cluster(self, layout: str) -> Cluster:
        if self._layout != layout:
            self.close()
            folder = self._folder / layout
            environment = {
                "ORCHESTRATOR_HOME": str(self._home),
                **s3_environment(_reached_by_all(layout), self._s3_port),
            }
            self._cluster = Cluster(LAYOUTS[layout], folder=folder, environment=environment)
            self._layout = layout
        assert self._cluster is not None
        self._cluster.repair()
        return self._cluster


def _reached_by_all(layout: str) -> Machine:
    """Where a server of the suite's listens for all nodes of a layout."""
    return SUITE if LAYOUTS[layout].on_hosts else HERE


def _act(scene: Scene, strikes: list[Strike]) -> list[Answer]:
    """Gives the command until it finishes, striking when the moments come; every ending in order."""
    answers: list[Answer] = []
    while len(answers) < _MOST_COMMANDS and (not answers or answers[-1].ending != FINISHED):
        if answers:
            scene.repair()
        scene.start_command(fresh=bool(answers) and _NOTHING_LEFT in answers[-1].ending)
        deadline = time.monotonic() + _COMMAND_S
        while (answer := scene.answer()) is None:
            if strikes and strikes[0].when(scene) and _struck(scene, strikes[0]):
                strikes.pop(0)
            if time.monotonic() > deadline:
                scene.end_command()
                answers.append(Answer(code=-1, said={"status": f"not over after {_COMMAND_S:.0f} s"}, log=""))
                return answers
            time.sleep(_POLL_S)
        answers.append(answer)
    return answers


def _struck(scene: Scene, strike: Strike) -> bool:
    at_s = time.time()
    try:
        strike.what(scene)
    except LookupError:  # between two attempts there may be nothing to strike
        return False
    scene.struck_at.append(at_s)
    return True


def _judge(
    scenario: Scenario,
    scene: Scene,
    answers: list[Answer],
    *,
    run: Tracked,
    reference: Tracked,
    left_over: list[str],
) -> Row:
    """What came out against what should have."""
    apart = difference(run, reference, compared=LOSSES if scenario.tolerance else COMPARED)
    endings = [answer.ending for answer in answers]
    pauses = [
        longest_pause_s(points, after_s=at_s, within_s=_STALL_WITHIN_S)
        for at_s in scene.struck_at
        for points in losses(run)
    ]
    steps = scene.files.taken()
    told = run.metrics.get("recovery/lost_steps", ())  # where the points of a lost disk are lost with it
    again = max(len(steps) - len(set(steps)), *(int(point.value) for point in told), 0)
    problems = [
        *_ending_problems(scenario, endings),
        *size_problems(scenario, run.tags),
        *([f"curves differ by {apart.largest:.1e} ({apart.where})"] if not apart.largest <= scenario.tolerance else []),
        *([f"{apart.missing} points are missing"] if apart.missing else []),
        *([f"{apart.twice} points are there twice"] if apart.twice else []),
        *([f"{name} is out of order" for name in out_of_order(run)]),
        *([f"{again} steps were taken again"] if again > scenario.most_again else []),
        *([f"{len(run.run_ids)} MLflow runs"] if len(run.run_ids) != scene.runs else []),
        *([f"trials {', '.join(run.trials)}"] if run.trials != reference.trials else []),
        *([f"MLflow says {run.status}"] if run.status != "FINISHED" else []),
        *(f"left over: {title}" for title in left_over),
        *scene.problems,
    ]
    restarts = answers[-1].said.get("restarts", 0)
    return Row(
        name=scenario.name,
        fault=scenario.fault,
        outcome=", then ".join(endings) + (f" ({restarts} restart{'s' * (restarts > 1)})" if restarts else ""),
        pause_s=max(pauses, default=0.0),
        steps_again=again,
        apart=apart.largest,
        metrics_lost=apart.missing,
        problems=tuple(problems),
        notes=(*scene.notes, *(f"{key}: {run.tags[key]}" for key in sorted(run.tags) if _ATTEMPT_TAG in key)),
    )


def _ending_problems(scenario: Scenario, endings: list[str]) -> list[str]:
    wanted = scenario.endings
    if wanted is None:
        return [] if endings[-1] == FINISHED else [f"it ended with {endings[-1]!r}"]
    as_wanted = len(wanted) == len(endings) and all(
        part in ending for part, ending in zip(wanted, endings, strict=True)
    )
    return [] if as_wanted else [f"it was to end with {', then '.join(wanted)}"]


def size_problems(scenario: Scenario, tags: Mapping[str, str]) -> list[str]:
    """Attempts' tags begin with their number of workers."""
    attempts = sorted((int(key.rpartition(".")[2]), text) for key, text in tags.items() if _ATTEMPT_TAG in key)
    sizes = tuple(int(text.split(maxsplit=1)[0]) for _, text in attempts)
    if scenario.sizes is None or sizes == scenario.sizes:
        return []
    return [f"its attempts had {sizes} workers, and were to have {scenario.sizes}"]


def _write_spec(scenario: Scenario, *, folder: Path, corpus: Path, uri: str, storage: str | Path | None) -> Path:
    values: dict[str, Any] = {
        "name": scenario.name,
        "data.train": str(corpus),
        "tracking.uri": uri,
        "tracking.experiment": EXPERIMENT,
        **scenario.changes,
    }
    if storage is not None:
        values["checkpoint.storage"] = str(storage)
    raw = specs.raw(dict(BASE), **{path.replace(".", "__"): value for path, value in values.items()})
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own with little room. Needs the suite's own namespaces."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
