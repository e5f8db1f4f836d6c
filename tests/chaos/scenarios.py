"""The faults of the suite as values: where, when, what, and how the training is to end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import faults
from tests.chaos.cluster import Layout
from tests.chaos.faults import Fault, Moment, at_step, while_saving

FINISHED = "finished"
KILLED = "killed"
STEPS = 60
SAVE_EVERY = 10

LAYOUTS = {
    "nodes": Layout(nodes={"node-1": 1, "node-2": 1, "node-3": 1}),
    "hosts": Layout(nodes={"host-1": 1, "host-2": 1}, on_hosts=True),
    "apart": Layout(nodes={"host-1": 1, "host-2": 1}, on_hosts=True, apart=True),
}
"""By name: two workers and room for a third, on this machine; two workers on two namespace hosts, nothing to spare; two
such hosts that share no folder of runs with each other or the driver."""
_ELASTIC: Mapping[str, Any] = {"resources.workers": [1, 2]}
_LASTING: Mapping[str, Any] = {"training.steps": 300}
"""So many steps, of 0.2 s and more, go on for longer than a server that comes back takes to start."""
_SLOW: Mapping[str, Any] = {"training.steps": 80, "training.global_batch": 224}
"""The whole corpus at every step: with 3 s on one worker a restart of 20 s to grow pays. Not with more steps: rounding,
2e-7 of the loss up to step 60, has grown to 4e-6 by step 100 and to 5e-4 by step 150, as small differences do."""
_MINUTES: Mapping[str, Any] = {"training.global_batch": 64}
"""So much work that it is not over before a link is healed."""
_LONGER_STEPS: Mapping[str, Any] = {
    "training.steps": 120,
    "training.global_batch": 64,
    "training.micro_batch": 16,
}
"""With steps of about 1 s there is time to tell a straggler, and enough left for leaving it to pay; with the larger
micro-batch the layers that are timed take longer than the pauses of a rank that is slowed down."""
_SEARCH: Mapping[str, Any] = {
    "search": {"space": {"training.learning_rate": {"grid": [1e-3, 2e-3, 4e-3]}}, "scheduler": "none"},
    "resources.workers": 1,
    "budget": "1gpu-hours",
    **_MINUTES,
}
"""Three trials, one on each of two hosts and a third after them; they claim what they spend from one ledger."""
_SEARCH_OF_TWO: Mapping[str, Any] = {
    **_SEARCH,
    "search": {"space": {"training.learning_rate": {"grid": [1e-3, 2e-3]}}, "scheduler": "none"},
    "resources.workers": 2,
}
"""Trials of two workers, on both hosts, one after the other."""
_AT_ANOTHER_SIZE = 1e-5
"""Largest relative difference of the losses where the number of workers has changed: the issue's figure."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One fault at its moment."""

    when: Moment
    what: Fault


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Faults on one training."""

    name: str
    fault: str
    """For the table."""
    strikes: tuple[Strike, ...]
    layout: str = "nodes"
    """Key of `LAYOUTS`."""
    reference: str = ""
    """Likewise, of the undisturbed run; empty: the same."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Spec fields that differ from the base spec; those of `training` and `model`, and all of a search, differ in the
    undisturbed run too."""
    endings: tuple[str, ...] | None = (FINISHED,)
    """How each command ends, in order: `finished`, `killed`, or a part of the error; None: any, then `finished`."""
    sizes: tuple[int, ...] | None = None
    """Number of workers of each attempt; None: of no interest."""
    most_again: int = SAVE_EVERY
    """Most steps that may be taken more than once."""
    server: bool = False
    """Metrics go through an MLflow server instead of straight to its database."""
    flush: bool = False
    """`orchestrator flush` ships afterwards what the server could not take."""
    objects: bool = False
    """Checkpoints go to an object store instead of a folder."""
    small_disk: bool = False
    """Checkpoints go to a disk of their own with little room."""
    quick: bool = False
    """Part of `make test`."""

    @property
    def tolerance(self) -> float:
        """Largest relative difference of the losses: none, unless the number of workers changes."""
        return 0.0 if self.sizes is None or len(set(self.sizes)) == 1 else _AT_ANOTHER_SIZE


def _once(when: Moment, what: Fault) -> tuple[Strike, ...]:
    return (Strike(when=when, what=what),)


def _search(name: str, fault: str, strikes: tuple[Strike, ...], **others: Any) -> Scenario:
    """A search on hosts that share no folder, against the same one on hosts that do."""
    values = {
        "layout": "apart",
        "reference": "hosts",
        "objects": True,
        "changes": _SEARCH,
        "most_again": 2 * SAVE_EVERY,
    }
    values |= others
    return Scenario(name=name, fault=fault, strikes=strikes, **values)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(name="leader", fault="kill -9 of rank 0", strikes=_once(at_step(37), faults.kill_leader)),
    Scenario(name="worker", fault="kill -9 of another rank", strikes=_once(at_step(37), faults.kill_other)),
    Scenario(
        name="node",
        fault="kill -9 of a node, one is spare",
        strikes=_once(at_step(37), faults.kill_node_of_other),
        quick=True,
    ),
    Scenario(
        name="leader-node",
        fault="kill -9 of rank 0's node, one is spare",
        strikes=_once(at_step(37), faults.kill_node_of_leader),
    ),
    Scenario(
        name="driver",
        fault="kill -9 of the driver",
        strikes=_once(at_step(37), faults.kill_driver),
        endings=(KILLED, FINISHED),
    ),
    Scenario(
        name="cluster",
        fault="kill -9 of the whole cluster",
        strikes=_once(at_step(37), faults.kill_cluster),
        endings=(KILLED, FINISHED),
    ),
    Scenario(
        name="server",
        fault="kill -9 of the MLflow server, back after 15 s",
        strikes=(
            Strike(when=at_step(20), what=faults.kill_server),
            Strike(when=faults.after(15), what=faults.start_server),
        ),
        changes=_LASTING,
        server=True,
    ),
    Scenario(
        name="server-absent",
        fault="no MLflow server at the start, there after 40 s",
        strikes=(
            Strike(when=at_step(0), what=faults.kill_server),
            Strike(when=faults.after(40), what=faults.start_server),
        ),
        changes=_LASTING,
        server=True,
    ),
    Scenario(
        name="server-gone",
        fault="kill -9 of the MLflow server, back after the run; flush",
        strikes=_once(at_step(20), faults.kill_server),
        server=True,
        flush=True,
    ),
    Scenario(
        name="server-and-leader",
        fault="kill -9 of the MLflow server, then of rank 0",
        strikes=(
            Strike(when=at_step(20), what=faults.kill_server),
            Strike(when=at_step(37), what=faults.kill_leader),
            Strike(when=faults.after(5), what=faults.start_server),
        ),
        server=True,
        quick=True,
    ),
    Scenario(
        name="saving-leader",
        fault="kill -9 of rank 0 during a checkpoint",
        strikes=_once(while_saving(30), faults.kill_leader),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="saving-worker",
        fault="kill -9 of another rank during a checkpoint",
        strikes=_once(while_saving(30), faults.kill_other),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="saving-cluster",
        fault="kill -9 of the whole cluster during a checkpoint",
        strikes=_once(while_saving(30), faults.kill_cluster),
        endings=(KILLED, FINISHED),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="uploading-leader",
        fault="kill -9 of rank 0 during an upload",
        strikes=_once(while_saving(30), faults.kill_leader),
        objects=True,
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="new-head",
        fault="kill -9 of the whole cluster, its disk lost: all goes on from the bucket",
        strikes=_once(at_step(37), faults.lose_run_folder),
        objects=True,
        endings=(KILLED, FINISHED),
    ),
    Scenario(name="hang", fault="SIGSTOP of a rank", strikes=_once(at_step(37), faults.stop_other)),
    Scenario(name="hang-leader", fault="SIGSTOP of rank 0", strikes=_once(at_step(37), faults.stop_leader)),
    Scenario(
        name="hang-wakes",
        fault="SIGSTOP of a rank, which wakes up in the next attempt",
        strikes=(
            Strike(when=at_step(37), what=faults.stop_leader),
            Strike(when=at_step(45), what=faults.wake),
        ),
    ),
    Scenario(
        name="straggler",
        fault="a rank gets a fifth of its time, one node is spare: the run moves there",
        strikes=_once(at_step(12), faults.slow_other),
        changes=_LONGER_STEPS,
        sizes=(2, 2),
        most_again=0,
    ),
    Scenario(
        name="disk",
        fault="the disk of the checkpoints fills up",
        strikes=_once(at_step(25), faults.fill_disk),
        endings=("no space is left", FINISHED),
        small_disk=True,
    ),
    Scenario(
        name="truncated",
        fault="newest checkpoint truncated, kill -9 of rank 0",
        strikes=_once(at_step(37), faults.both(faults.truncate_newest, faults.kill_leader)),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="flipped",
        fault="a bit of the newest checkpoint flipped, kill -9 of rank 0",
        strikes=_once(at_step(37), faults.both(faults.flip_bit_of_newest, faults.kill_leader)),
        quick=True,
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="missing",
        fault="a file of the newest checkpoint missing, kill -9 of rank 0",
        strikes=_once(at_step(37), faults.both(faults.remove_from_newest, faults.kill_leader)),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="twice",
        fault="kill -9 of rank 0, then of another rank",
        strikes=(
            Strike(when=at_step(37), what=faults.kill_leader),
            Strike(when=at_step(48), what=faults.kill_other),
        ),
        most_again=2 * SAVE_EVERY,
    ),
    Scenario(
        name="drained-driver",
        fault="SIGTERM to the driver",
        strikes=_once(at_step(37), faults.terminate_driver),
        endings=("stopped at step", FINISHED),
        most_again=0,
    ),
    Scenario(
        name="drained-node",
        fault="SIGTERM to a node (30 s of notice), one is spare",
        strikes=_once(at_step(20), faults.drain_node_of_other),
        most_again=0,
    ),
    Scenario(
        name="restarting",
        fault="kill -9 of rank 0, then of the driver while it restarts",
        strikes=(
            Strike(when=at_step(37), what=faults.kill_leader),
            Strike(when=faults.after(3), what=faults.kill_driver),
        ),
        endings=(KILLED, FINISHED),
    ),
    Scenario(
        name="host",
        fault="power cut of a host, no spare: one worker goes on",
        strikes=_once(at_step(27), faults.kill_node_of_other),
        layout="hosts",
        changes=_ELASTIC,
        sizes=(2, 1),
    ),
    Scenario(
        name="leader-host",
        fault="power cut of rank 0's host, no spare: one worker goes on",
        strikes=_once(at_step(27), faults.kill_node_of_leader),
        layout="hosts",
        changes=_ELASTIC,
        sizes=(2, 1),
    ),
    Scenario(
        name="host-returns",
        fault="power cut of a host, back after 20 s: the run shrinks and grows",
        strikes=(
            Strike(when=at_step(11), what=faults.kill_node_of_other),
            Strike(when=faults.after(20), what=faults.add_nodes),
        ),
        layout="hosts",
        changes={**_ELASTIC, **_SLOW},
        sizes=(2, 1, 2),
    ),
    Scenario(
        name="host-awaited",
        fault="power cut of a host, back after 20 s: a fixed size waits for it",
        strikes=(
            Strike(when=at_step(37), what=faults.kill_node_of_other),
            Strike(when=faults.after(20), what=faults.add_nodes),
        ),
        layout="hosts",
    ),
    Scenario(
        name="unshared",
        fault="a host that does not see the folder of runs",
        strikes=_once(at_step(0), faults.hide_runs),
        layout="hosts",
        endings=("does not see the run's folder", FINISHED),
        most_again=0,
    ),
    Scenario(
        name="apart",
        fault="power cut of rank 0's host, no common folder, a bucket instead",
        strikes=_once(at_step(27), faults.kill_node_of_leader),
        layout="apart",
        objects=True,
        changes={**_ELASTIC, **_MINUTES},
        sizes=(2, 1),
    ),
    _search("search-apart", "a search whose hosts share no folder, undisturbed", ()),
    _search(
        "search-host",
        "search, no common folder: power cut of a trial's host, no spare",
        _once(at_step(27), faults.kill_node_of_leader),
    ),
    _search(
        "search-link",
        "search, no common folder: link of a trial's host cut, healed after 60 s",
        (
            Strike(when=at_step(17), what=faults.cut_node_of_leader),
            Strike(when=faults.after(60), what=faults.heal_links),
        ),
    ),
    _search(
        "search-driver",
        "search, no common folder: kill -9 of the driver, its disk lost",
        _once(at_step(27), faults.lose_driver),
        endings=(KILLED, FINISHED),
    ),
    _search(
        "search-new-head",
        "search, no common folder: kill -9 of the whole cluster, all disks lost",
        _once(at_step(27), faults.lose_run_folder),
        endings=(KILLED, FINISHED),
    ),
    _search(
        "search-bucket",
        "search, no common folder: the bucket does not answer for 60 s",
        (Strike(when=at_step(17), what=faults.stop_objects), Strike(when=faults.after(60), what=faults.wake)),
        most_again=0,
    ),
    _search(
        "search-workers",
        "search of trials over two hosts, no common folder: power cut of a host, back after 20 s",
        (
            Strike(when=at_step(27), what=faults.kill_node_of_other),
            Strike(when=faults.after(20), what=faults.add_nodes),
        ),
        changes=_SEARCH_OF_TWO,
    ),
    Scenario(
        name="link",
        fault="link of a host cut, healed after 60 s",
        strikes=(
            Strike(when=at_step(17), what=faults.cut_node_of_other),
            Strike(when=faults.after(60), what=faults.heal_links),
        ),
        layout="hosts",
        changes={**_ELASTIC, **_MINUTES},
        sizes=(2, 1),
    ),
    Scenario(
        name="leader-link",
        fault="link of rank 0's host cut, healed after 60 s",
        strikes=(
            Strike(when=at_step(17), what=faults.cut_node_of_leader),
            Strike(when=faults.after(60), what=faults.heal_links),
        ),
        layout="hosts",
        changes={**_ELASTIC, **_MINUTES},
        sizes=(2, 1),
    ),
)

_KILLS: Mapping[str, Fault] = {
    "rank 0 killed": faults.kill_leader,
    "another rank killed": faults.kill_other,
    "rank 0's node killed": faults.kill_node_of_leader,
    "another node killed": faults.kill_node_of_other,
    "driver killed": faults.kill_driver,
    "cluster killed": faults.kill_cluster,
    "rank 0 stopped": faults.stop_leader,
    "another rank stopped": faults.stop_other,
    "newest checkpoint truncated, rank 0 killed": faults.both(faults.truncate_newest, faults.kill_leader),
    "newest checkpoint flipped, another rank killed": faults.both(faults.flip_bit_of_newest, faults.kill_other),
}


def random_scenario(seed: int) -> Scenario:
    """One to three faults at random moments, the same for the same seed: at a step, during a checkpoint, soon after."""
    draw = random.Random(seed)
    strikes, said, step = [], [], 0
    for number in range(draw.randint(1, 3)):
        name = draw.choice(list(_KILLS))
        step += draw.randint(11, 20)  # after the first checkpoint, before the last step
        seconds = round(draw.uniform(0, 20), 1)
        moments = {
            f"at step {step}": at_step(step),
            f"during checkpoint {step // SAVE_EVERY * SAVE_EVERY}": while_saving(step // SAVE_EVERY * SAVE_EVERY),
            f"{seconds} s later": faults.after(seconds),
        }
        moment = draw.choice(list(moments)[: 2 if number == 0 else 3])
        strikes.append(Strike(when=moments[moment], what=_KILLS[name]))
        said.append(f"{name} {moment}")
    if sum("node killed" in each for each in said) > 1:  # one is spare
        strikes.append(Strike(when=faults.after(20), what=faults.add_nodes))
        said.append("the nodes come back 20 s later")
    fault = f"seed {seed}: {'; '.join(said)}"
    again = 3 * SAVE_EVERY * len(strikes)  # a fault during a checkpoint, and the one before it damaged
    return Scenario(name=f"random-{seed}", fault=fault, strikes=tuple(strikes), endings=None, most_again=again)
