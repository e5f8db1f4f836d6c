"""What a network takes: two workers on one host and on two, over shaped links too, beside what `plan` says of them.

python -m tests.bench.on_hosts ROUNDS STEPS    prints one JSON object; needs root, for hosts made of namespaces
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator.commands.plan import Planner
from orchestrator.load_spec import load_spec
from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.planning.throughput import STARTUP_SECONDS
from orchestrator.policy.corrections import corrections
from orchestrator.tracking.past_runs import read_history
from tests.bench.pace import loss_times, steps_alone, steps_per_second
from tests.chaos import hosts
from tests.chaos.cluster import HEAD, Cluster, Layout
from tests.chaos.processes import ROOT

SPEC = str(ROOT / "configs" / "pretrain" / "demo.yaml")
TOGETHER, APART = "both", ("one", "other")
"""A host of two cores, and two of one core each."""
LINKS = {"one host": None, "two hosts": None, "1 Gbit/s": 1.0, "100 Mbit/s": 0.1}
"""Gbit/s of each host's link, in turn; None leaves it as fast as the machine is."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One training."""

    steps_per_second: float
    megabytes_per_step: float
    """That one of two hosts got from the other; its control messages too."""
    planned: float
    """Steps per second that `plan --history` said before."""


def main(rounds: int, steps: int) -> None:
    """Trains in turn over each link, and prints medians."""
    if not hosts.inside():
        hosts.enter("tests.bench.on_hosts", [str(rounds), str(steps)])
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:  # short: Ray's sockets have 107 bytes
        home = Path(folder) / "home"
        home.mkdir()
        store = f"sqlite:///{home / 'mlflow.db'}"
        environment = {"ORCHESTRATOR_HOME": str(home), "MLFLOW_TRACKING_URI": store}
        layout = Layout(nodes={TOGETHER: 2, **dict.fromkeys(APART, 1)}, on_hosts=True)
        cluster = Cluster(layout, folder=Path(folder) / "ray", environment=environment)
        try:
            found = _play(cluster, store, rounds=rounds, steps=steps)
        finally:
            cluster.close()
    print(json.dumps(found, indent=2))


def _play(cluster: Cluster, store: str, *, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    seen: dict[str, list[Measured]] = {link: [] for link in LINKS}
    for number in range(rounds):
        cluster.repair()  # with the host of two cores, where both workers then go
        if number == 0:
            _train(cluster, steps=2, gbit=None)  # the data is prepared, and a store made, by nobody's account
        for link, gbit in LINKS.items():
            if link == "two hosts":
                cluster.kill(TOGETHER)
            assert cluster.network is not None
            for host in APART:
                cluster.network.shape(host, gbit)
            planned = None if link == "one host" else _planned(store, gbit, steps)
            before = cluster.network.received(APART[0])
            pace = _train(cluster, steps=steps, gbit=gbit)
            sent = (cluster.network.received(APART[0]) - before) / steps / 1e6
            seen[link].append(Measured(steps_per_second=pace, megabytes_per_step=sent, planned=planned or pace))
            print(f"{link:12} {seen[link][-1]}", file=sys.stderr)
    return {link: _typical(taken) for link, taken in seen.items()}


def _typical(taken: list[Measured]) -> dict[str, float]:
    return {name: statistics.median(getattr(one, name) for one in taken) for name in Measured.__dataclass_fields__}


def _train(cluster: Cluster, *, steps: int, gbit: float | None) -> float:
    """Steps per second of the real command on the head."""
    command = [sys.executable, "-m", "orchestrator", "run", SPEC, "--fresh", "--json", *_changes(steps, gbit)]
    done = subprocess.run(
        [*cluster.machine(HEAD).enter, "env", *_settings(cluster), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the training ended with {done.returncode}: {done.stderr[-3000:]}")
    times = loss_times(Path(json.loads(done.stdout)["run_folder"]) / "outbox")
    return steps_per_second(times) if len(times) == steps > 2 else 0.0


def _settings(cluster: Cluster) -> list[str]:
    given = {**cluster.environment, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    return [f"{name}={value}" for name, value in given.items()]


def _changes(steps: int, gbit: float | None) -> list[str]:
    return [
        *steps_alone(steps),
        *(() if gbit is None else (f"resources.network_gbit={gbit:g}",)),
    ]


def _planned(store: str, gbit: float | None, steps: int) -> float:
    """Steps per second that `plan --history` gives for two nodes of one core each, after the runs before."""
    spec = load_spec(SPEC, _changes(steps, gbit))
    node = NodeShape(cpus=1, gpus=0, memory_gib=local_cluster().nodes[0].memory_gib)
    cluster = ClusterShape(nodes=(node,) * len(APART), device_name="cpu")
    planner = Planner(corrections=corrections(read_history(store).records))
    plan = planner.plan(partial(make_plan, spec, cluster))
    assert plan.wall_hours is not None
    return steps / (3600 * plan.wall_hours.mid - STARTUP_SECONDS.mid)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
