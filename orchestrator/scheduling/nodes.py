"""A question to the machines that ranks run on, answered at once however busy their cores are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import one_line
from orchestrator.scheduling.decisions.liveness import Place


def ask_nodes(action: Callable[[int], str], places: Sequence[Place], *, deadline_s: float) -> dict[int, str]:
    """What `action` says of each rank's process on its machine, by rank; or why it could not be asked. Never raises."""
    answers = {place.rank: f"no answer from its node in {deadline_s:.0f} s" for place in places}
    asked = {}
    try:
        for node_id in {place.node_id for place in places}:
            there = [place for place in places if place.node_id == node_id]
            asked[_ask(node_id, action, {place.rank: place.pid for place in there})] = there
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=deadline_s) if asked else ([], [])
        for answer in ready:
            answers |= _answer(answer, asked[answer])
        for answer in late:
            ray.cancel(answer, force=True)
    except RayError as error:
        return {place.rank: f"Ray could not be asked: {one_line(error)}" for place in places}
    return answers


def _ask(node_id: str, action: Callable[[int], str], pids: Mapping[int, int]) -> ray.ObjectRef:
    """One task for all processes of a node; on it, and at once."""
    task = ray.remote(num_cpus=0, max_retries=0)(_for_each)
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(action, pids)


def _for_each(action: Callable[[int], str], pids: Mapping[int, int]) -> dict[int, str]:
    return {rank: action(pid) for rank, pid in pids.items()}


def _answer(answer: ray.ObjectRef, places: Sequence[Place]) -> dict[int, str]:
    try:
        found: dict[int, str] = ray.get(answer)
    except RayError as error:
        return {place.rank: f"its node could not be asked: {one_line(error)}" for place in places}
    return found
