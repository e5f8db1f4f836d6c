from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from orchestrator.errors import ClusterError, DataError, MemoryExhaustedError, StorageError, TransientError
from orchestrator.planning.run_plan import ClusterShape, Kept, RunPlan
from orchestrator.scheduling import capacity, run_training
from orchestrator.scheduling.attempt import AttemptEnd, Watcher
from orchestrator.scheduling.decisions.next_action import AskForRoom, Ended, Start, given_up
from orchestrator.scheduling.failures import WorkerError, translate
from tests.training_runs import pretrain

DEAD = WorkerHealthCheckFailedError(
    "A worker health check failed.\nWorker info: rank 1",
    RayActorError(
        error_msg="The actor died. Worker exit type: SYSTEM_ERROR Worker exit detail: killed by SIGKILL. Some common "
        "causes include: (1) the process was killed by the OOM killer due to high memory usage"
    ),
)
"""What Ray 2.60 gives for a worker whose process was killed."""


def raised(error: BaseException) -> WorkerError:
    """What the driver gets when training raises `error` on a worker."""
    try:
        raise error
    except BaseException as caught:
        found = pickle.loads(pickle.dumps(WorkerError.of(caught)))
    assert isinstance(found, WorkerError)
    return found


PEER_GONE = raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"))
FOREIGN = raised(ValueError("operands could not be broadcast"))


def test_an_error_of_ours_explains_everything_else() -> None:
    ours = StorageError("the disk is full")
    assert translate({0: PEER_GONE, 1: DEAD, 2: ours, 3: FOREIGN}) is ours


def test_a_dead_worker_explains_broken_connections_and_what_its_peers_raised() -> None:
    error = translate({0: PEER_GONE, 1: DEAD, 2: FOREIGN})
    assert isinstance(error, TransientError)
    assert error.what == "worker of rank 1 died"
    assert error.got == "killed by SIGKILL."


def test_a_worker_that_went_with_its_node_is_told_without_the_ids_before() -> None:
    told = "its node has died. Node Id: 73af, the actor's node was terminated unexpectedly: too many missed checks."
    lost = RayActorError(error_msg=f"The actor died unexpectedly.\n\tactor_id: 23c5\nThe actor died because {told}")
    error = translate({0: PEER_GONE, 1: WorkerHealthCheckFailedError("A worker health check failed.", lost)})
    assert isinstance(error, TransientError)
    assert error.got == told


def test_a_death_is_told_without_rays_description_of_the_worker() -> None:
    described = "A worker health check failed.\nWorker info: Worker(actor=Actor(RayTrainWorker, 36ceff4f))"
    error = translate(
        {0: PEER_GONE, 1: WorkerHealthCheckFailedError(described, RayActorError(error_msg="Socket closed"))}
    )
    assert error.got == "Socket closed"


STARVED = WorkerHealthCheckFailedError(
    "A worker health check failed.\nWorker info: rank 1",
    RayActorError(
        error_msg="1 worker(s) were killed due to the node running low on memory. Memory on the node was 9GB"
    ),
)
"""What Ray 2.60 gives for a worker that its memory monitor has ended."""


@pytest.mark.parametrize("starved", [1, 2])
def test_of_several_dead_workers_the_one_that_ran_out_of_memory_explains_the_others(starved: int) -> None:
    error = translate({0: PEER_GONE, 1: DEAD, 2: DEAD, starved: STARVED})
    assert isinstance(error, MemoryExhaustedError)
    assert error.what == f"worker of rank {starved} ran out of memory and died"
    assert error.got == "Memory on the node was 9GB"


def test_an_error_that_only_points_to_another_ranks_is_not_taken_for_the_cause() -> None:
    pointing, ours = TransientError("another rank of this attempt could not go on"), StorageError("the disk is full")
    assert translate({0: pointing, 1: ours}) is ours


def test_broken_connections_alone_mean_that_a_worker_is_gone() -> None:
    error = translate({0: PEER_GONE, 2: PEER_GONE})
    assert isinstance(error, TransientError)
    assert error.what == "workers of rank 0, 2 lost the others"


def test_a_foreign_error_is_named_with_rank_and_place_and_is_not_tried_again() -> None:
    error = translate({0: PEER_GONE, 1: FOREIGN})
    assert isinstance(error, ClusterError)
    assert error.what == "training failed on rank 1 with ValueError"
    assert error.got == "operands could not be broadcast"
    assert "test_run_training.py" in str(error.do)


def test_a_message_about_connections_counts_only_from_the_transport() -> None:
    assert not raised(ValueError("connection reset")).is_broken_connection
    assert raised(ConnectionResetError(104, "Connection reset by peer")).is_broken_connection


def test_an_exception_that_does_not_pickle_still_arrives() -> None:
    class Odd(Exception):
        def __init__(self, code: int, *, reason: str) -> None:
            super().__init__(f"{code}: {reason}")
            self.lock = open(__file__)  # noqa: SIM115  a handle, which nothing can pickle

    odd = Odd(7, reason="odd")
    odd.lock.close()
    assert raised(odd).text == "7: odd"


def test_our_errors_keep_their_lines_on_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(DataError("no rows", got="0", do="add some")))
    assert translate({0: error}) is error
    assert str(error) == "no rows\n  got:     0\n  do:      add some"


@pytest.mark.parametrize("error", [KeyError("x"), OSError(5, "input/output error"), AssertionError()])
def test_any_foreign_error_of_the_only_worker_is_no_death(error: BaseException) -> None:
    assert not isinstance(translate({0: raised(error)}), TransientError)


# -- the last word -------------------------------------------------------------------------------------------------


def test_the_last_word_names_cause_attempts_what_is_kept_and_the_way_on() -> None:
    told = given_up(TransientError("a worker died", got="SIGKILL"), reason="tried enough", attempts=4, saved_step=20)
    assert isinstance(told, TransientError)
    assert (told.what, told.got) == ("a worker died; tried enough (attempt 4)", "SIGKILL")
    assert told.do == "the checkpoint of step 20 is kept: the same command goes on from there"
    nothing = given_up(TransientError("a worker died"), reason="tried enough", attempts=4, saved_step=None)
    assert nothing.do == "nothing was saved yet: the same command starts over"


def test_a_sample_that_alone_is_too_large_needs_more_than_the_same_command() -> None:
    told = given_up(MemoryExhaustedError("too large"), reason="one sample already", attempts=7, saved_step=None)
    assert isinstance(told, MemoryExhaustedError)
    assert "deepspeed.zero_stage=3" in str(told.do)


def test_an_error_that_is_never_tried_again_speaks_for_itself() -> None:
    error = DataError("no rows", do="add some")
    assert given_up(error, reason="the same attempt would fail again", attempts=1, saved_step=None) is error


# -- between two attempts ------------------------------------------------------------------------------------------

DIED = TransientError("a worker died", got="SIGKILL")


def training(folder: Path, watcher: Watcher | None = None, **changes: Any) -> run_training._Run:
    """The attempts of a training, of which none has begun."""
    job = pretrain(folder, resources__max_failures=1, **changes)
    return run_training._Run(job, watcher or Watcher(), None, None)


def attempt_dies(run: run_training._Run, *, resumed_from: int, saved: int | None, last_step: int | None) -> None:
    """An attempt as its workers leave it; raises what ends the training, where this does."""
    number = run._attempts.open(workers=1, cause="a test", after=run._attempts.newest())
    run._attempts.note_resumed(number, resumed_from)
    if saved is not None:
        checkpoint = run._job.run_folder / "checkpoints" / f"step-{saved:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").write_text(json.dumps({"attempt": number}))
    for instruction in run._decide(run._ended(AttemptEnd(error=DIED, last_step=last_step), number)):
        if not isinstance(instruction, Start):
            run._tell(instruction)  # type: ignore[arg-type]


def test_only_a_checkpoint_beyond_where_an_attempt_began_earns_it_another_failure(tmp_path: Path) -> None:
    run = training(tmp_path)
    for began, saved in ((0, 10), (10, 20), (20, 30)):
        attempt_dies(run, resumed_from=began, saved=saved, last_step=saved + 5)
    # The second in a row: that there is a checkpoint of before is no news.
    with pytest.raises(TransientError, match=r"2 attempts failed without progress[\s\S]*step 30 is kept"):
        attempt_dies(run, resumed_from=30, saved=None, last_step=35)


def test_steps_beyond_the_checkpoint_of_a_lost_attempt_are_counted_as_lost_once(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    watcher = Watcher(on_recovery=lambda step, totals: told.append((step, totals["lost_steps"])))
    run = training(tmp_path, watcher)
    attempt_dies(run, resumed_from=0, saved=10, last_step=17)
    hear = run._hearing_of_the_beginning()
    hear({"step": 10})
    hear({"step": 11})
    assert (run._state.recovery.lost_steps, run._state.recovery.restarts) == (7, 1)
    attempt_dies(run, resumed_from=10, saved=20, last_step=20)
    run._hearing_of_the_beginning()({"step": 20})
    assert run._state.recovery.lost_steps == 7, "it died at its checkpoint"
    attempt_dies(run, resumed_from=20, saved=30, last_step=None)
    run._hearing_of_the_beginning()({"step": 30})
    assert told == [(10, 7), (20, 7), (30, 7)]


class Room:
    """A planner on a cluster where a lost worker group holds its machines for a while; time passes as it sleeps."""

    def __init__(self, plan: RunPlan, *, free_after_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._plan, self._free_after_s = plan, free_after_s
        monkeypatch.setattr(capacity, "free_shape", lambda **_: None)
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def __call__(self, room: ClusterShape, kept: Kept | None) -> RunPlan:
        return replace(self._plan, workers=2 if self.now_s >= self._free_after_s else 1)


@pytest.mark.parametrize(("free_after_s", "workers", "waited_s"), [(0, 2, 0), (4, 2, 4), (60, 1, 6)])
def test_a_smaller_size_is_taken_only_once_what_a_lost_group_held_had_time_to_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_after_s: float, workers: int, waited_s: float
) -> None:
    """The time is a guess, 5 s, and looked at once a second."""
    job = pretrain(tmp_path, training__global_batch=8)
    plan = replace(job.plan, workers=2)
    room = Room(plan, free_after_s=free_after_s, monkeypatch=monkeypatch)
    run = run_training._Run(replace(job, plan=plan), Watcher(), room, None)
    instructions = run._decide(Ended(attempt=1, error=DIED))
    while isinstance(asked := instructions[-1], AskForRoom):
        instructions = run._decide(run._seeker.look(run._state, pause_s=asked.pause_s))
    assert isinstance(instructions[-1], Start)
    assert run._state.plan.workers == workers
    assert room.now_s == waited_s
