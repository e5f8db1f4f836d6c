import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from orchestrator.scheduling.decisions.liveness import Place
from orchestrator.scheduling.stacks import dump_stacks, end_ranks, keep_stacks, stacks_of

STUCK = """
import threading
{prelude}
def stuck_in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    print("stuck", flush=True)
    lock.acquire()
stuck_in_a_lock()
"""
ANSWERS = "from orchestrator.scheduling.stacks import answer_stack_signal\nanswer_stack_signal()"

PYTHON = sys.executable

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that is stuck in `stuck_in_a_lock` when it returns."""
    running: list[subprocess.Popen[str]] = []

    def start_one(prelude: str = "") -> subprocess.Popen[str]:
        script = tmp_path / "training.py"  # a file, because py-spy also shows the command line
        script.write_text(STUCK.format(prelude=prelude))
        here = Path(__file__).parent.parent
        process = subprocess.Popen(
            [PYTHON, str(script)], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(here)}
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        return process

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def no_py_spy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def place(pid: int, *, rank: int = 0, node_id: str | None = None) -> Place:
    node_id = node_id or ray.get_runtime_context().get_node_id()
    return Place(rank=rank, host=socket.gethostname(), node_ip="127.0.0.1", node_id=node_id, pid=pid)


def test_a_deadlocked_process_shows_where(start: Start) -> None:
    assert "stuck_in_a_lock" in stacks_of(start().pid)


def test_a_stopped_process_shows_where_and_that_it_is_stopped(start: Start) -> None:
    process = start()
    stop(process)
    text = stacks_of(process.pid)
    assert "stuck_in_a_lock" in text
    assert "State: stopped" in text


def test_it_leaves_a_stopped_process_stopped_and_a_running_one_running(start: Start) -> None:
    stopped, running = start(), start()
    stop(stopped)
    stacks_of(stopped.pid)
    stacks_of(running.pid)
    assert psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED
    assert psutil.Process(running.pid).status() == psutil.STATUS_SLEEPING


@pytest.mark.slow  # starts a process that imports Ray
@pytest.mark.usefixtures("no_py_spy")
def test_without_py_spy_a_process_writes_its_own_stacks_each_time_it_is_asked(start: Start) -> None:
    process = start(ANSWERS)
    first, second = stacks_of(process.pid), stacks_of(process.pid)
    assert "stuck_in_a_lock" in first
    assert "not installed" in first
    assert first.count("stuck_in_a_lock") == second.count("stuck_in_a_lock") == 1


@pytest.mark.usefixtures("no_py_spy")
def test_a_process_that_did_not_offer_its_stacks_survives_being_asked(start: Start) -> None:
    process = start()
    assert "not installed" in stacks_of(process.pid)
    time.sleep(0.1)
    assert process.poll() is None


def test_a_process_that_is_gone_is_said_to_be() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert stacks_of(process.pid) == "its process is gone"


def test_a_process_of_another_language_gives_its_state_and_why_there_is_no_stack() -> None:
    process = subprocess.Popen(["sleep", "60"])
    text = stacks_of(process.pid)
    process.kill()
    process.wait()
    assert text.startswith("State: ")
    assert "py-spy: " in text
    assert "\n" not in text.partition("py-spy: ")[2]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
class TestThroughRay:
    def test_stacks_come_from_the_node_of_each_rank(self, start: Start) -> None:
        first, second = start(), start()
        stop(second)
        text = dump_stacks([place(first.pid), place(second.pid, rank=1)], deadline_s=60)
        assert text.count("stuck_in_a_lock") == 2
        assert f"== rank 1 on {socket.gethostname()} (pid {second.pid})" in text

    def test_a_node_that_is_gone_costs_the_others_nothing(self, start: Start) -> None:
        process = start()
        text = dump_stacks([place(process.pid), place(1, rank=1, node_id="a" * 56)], deadline_s=60)
        assert text.count("stuck_in_a_lock") == 1
        assert "rank 1" in text
        assert "its node could not be asked" in text

    def test_a_node_that_does_not_answer_is_given_up_at_the_deadline(self) -> None:
        began = time.monotonic()
        text = dump_stacks([place(os.getpid())], deadline_s=0.001)
        assert "no answer from its node" in text
        assert time.monotonic() - began < 5

    def test_a_stopped_rank_is_ended_and_one_that_is_gone_is_said(self, start: Start) -> None:
        process = start()
        stop(process)
        assert end_ranks([place(process.pid)], deadline_s=60) == {0: "killed"}
        assert process.wait(10) == -signal.SIGKILL
        assert end_ranks([place(process.pid)], deadline_s=60) == {0: "not killed (No such process)"}

    def test_each_hang_has_its_file(self, tmp_path: Path) -> None:
        for number in (1, 2):
            said = keep_stacks(tmp_path / "stacks", [], reason=f"hang {number}")
            assert said == f"their stacks are in {tmp_path}/stacks/hang-{number}.txt"
            assert (tmp_path / "stacks" / f"hang-{number}.txt").read_text().startswith(f"hang {number}\n")

    def test_a_disk_that_takes_nothing_is_no_error(self, tmp_path: Path) -> None:
        (tmp_path / "stacks").write_text("in the way")
        assert "could not be kept" in keep_stacks(tmp_path / "stacks", [], reason="a hang")
