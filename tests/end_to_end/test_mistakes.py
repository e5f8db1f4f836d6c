"""What goes wrong under the real command: each time a message, the right exit code, no process left, no work lost."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.commands import Done, Place, Running

pytestmark = pytest.mark.slow

LONG = {"training__steps": 5000, "checkpoint__every_steps": 50}
"""Longer than any test waits."""
SOON_S = 20.0
"""From a signal to the end: 2 to 4 s alone on two cores, more when other work shares them."""
PORTS = (6379, 8265)
RUN_FIELDS = {"status", "mlflow_run_id", "checkpoint", "model_path", "metrics", "restarts"}
COMPARE_FIELDS = {
    *("run_id", "name", "kind", "method", "metrics", "tokens", "flops", "gpu_hours", "usd", "parent"),
}
OUR_LINES = re.compile(
    r"preparing data|starting workers|this run is already finished; .*"
    r"|the new tokenizer has .*|held out: .*, fingerprint [0-9a-f]{16}|steps: .*|packing: .*"
    r"|step \d+/\d+(  (loss|ETA|eval/\w+) \S+|  \S+ tokens/s|  spent \S+( of \S+)?"
    r"|  (starting|evaluating|saving|exporting))*"
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(folder=tmp_path)


def mlflow_runs(place: Place) -> list[tuple[str, str]]:
    """(id, status) of all runs in the place's default store, oldest first."""
    with sqlite3.connect(f"file:{place.home / 'mlflow.db'}?mode=ro", uri=True) as store:
        return store.execute("select run_uuid, status from runs order by start_time").fetchall()


def checkpoints(folder: Path) -> dict[int, Path]:
    """Complete checkpoints below a folder of runs, by step."""
    return {int(path.name[5:]): path for path in sorted(folder.glob("*/checkpoints/step-*[0-9]"))}


def assert_clean(done: Done, *, code: int) -> None:
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert "Error" not in done.err


# -- a run that ends, beside others --------------------------------------------------------------------------------


@contextmanager
def listening(*ports: int) -> Iterator[None]:
    """Ports taken by this process, unless somebody else has them already."""
    with ExitStack() as stack:
        for port in ports:
            taken = stack.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("", port))
                taken.listen()
            except OSError:
                continue
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Done]:
    """A short run to its end, with its answer in JSON, while Ray's usual ports are taken."""
    place = Place(folder=tmp_path_factory.mktemp("finished"))
    place.write(training__eval_every_steps=3, checkpoint__every_steps=3)
    with listening(*PORTS):
        return place, place.run("run", str(place.spec), "--json")


def test_a_run_works_while_rays_ports_are_taken_and_leaves_no_process(finished: tuple[Place, Done]) -> None:
    place, done = finished
    assert_clean(done, code=0)
    assert place.left_over() == []


def test_the_answer_of_a_run_is_one_object_with_the_promised_fields(finished: tuple[Place, Done]) -> None:
    place, done = finished
    assert done.answer.keys() >= RUN_FIELDS
    assert done.answer["status"] == "finished"
    assert mlflow_runs(place) == [(done.answer["mlflow_run_id"], "FINISHED")]
    assert (Path(done.answer["model_path"]) / "model.safetensors").is_file()
    assert Path(done.answer["checkpoint"]).name == "step-00000006"


def test_in_a_log_progress_is_plain_lines_and_nothing_of_the_libraries(finished: tuple[Place, Done]) -> None:
    _, done = finished
    lines = done.err.splitlines()
    assert [line for line in lines if not OUR_LINES.fullmatch(line)] == []
    assert any("eval/loss" in line for line in lines)
    assert "\r" not in done.err
    assert "\x1b" not in done.err


def test_a_finished_run_run_again_answers_the_same_without_starting_ray(finished: tuple[Place, Done]) -> None:
    place, done = finished
    # An address that nobody answers at: whoever connected to Ray would fail.
    again = place.run("run", str(place.spec), "--json", RAY_ADDRESS="127.0.0.1:1")
    assert_clean(again, code=0)
    assert "already finished" in again.err
    assert again.answer == done.answer


def test_compare_answers_with_the_promised_fields_and_says_nothing_else(finished: tuple[Place, Done]) -> None:
    place, done = finished
    compared = place.run("compare", "--json")
    assert_clean(compared, code=0)
    assert compared.err == ""
    (run,) = compared.answer["runs"]
    assert run.keys() >= COMPARE_FIELDS
    assert run["run_id"] == done.answer["mlflow_run_id"]


def test_doctor_names_who_has_rays_ports_and_what_to_do(place: Place) -> None:
    with listening(*PORTS):
        done = place.run("doctor", "--json")
    findings = {finding["check"]: finding for finding in done.answer["findings"]}
    for port in PORTS:
        assert findings[f"port {port}"]["status"] == "warn"
        assert "in use by" in findings[f"port {port}"]["detail"]
        assert "(pid " in findings[f"port {port}"]["detail"]
        assert "port" in findings[f"port {port}"]["remedy"]


# -- refused before anything starts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "environment", "code", "expected"),
    [
        ({"resources__workers": 512, "training__global_batch": 512}, {}, 1, ("512", "got:", "do:")),
        ({}, {"RAY_ADDRESS": "127.0.0.1:1"}, 1, ("=127.0.0.1:1 does not answer", "orchestrator submit")),
    ],
    ids=["more workers than cores", "a dead Ray cluster"],
)
def test_what_is_missing_is_named_within_seconds(
    place: Place, changes: dict[str, object], environment: dict[str, str], code: int, expected: tuple[str, ...]
) -> None:
    done = place.run("run", str(place.write(**changes)), "--json", **environment)
    assert_clean(done, code=code)
    assert [part for part in expected if part not in done.err] == [], done.err
    assert done.answer["status"] == "failed"
    assert done.answer.keys() >= RUN_FIELDS
    assert done.seconds < 40
    assert place.left_over() == []
    assert not list(place.home.glob("runs/*"))


def test_a_run_without_its_mlflow_server_ends_and_says_how_its_results_get_there(place: Place) -> None:
    done = place.run("run", str(place.write(tracking__uri="http://127.0.0.1:9")), "--json")
    assert_clean(done, code=0)
    assert "MLflow server does not answer" in done.err
    assert (done.answer["status"], done.answer["mlflow_run_id"]) == ("finished", None)
    assert any("orchestrator flush" in note for note in done.answer["notes"])
    flushed = place.run("flush", "--json")
    assert flushed.code == 1, "the server is still away"
    assert flushed.answer["runs"][0]["waiting"] > 0


# -- stopping ------------------------------------------------------------------------------------------------------


def stopped_step(done: Done) -> int:
    """The step that the message of a stopped run names."""
    found = re.search(r"error: stopped at step (\d+) of \d+, with a checkpoint", done.err)
    assert found is not None, done.err
    assert "the same command goes on from there" in done.err
    return int(found[1])


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """(our side, the command's side) of a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def read_until(ours: int, text: str | None, timeout: float = 240) -> str:
    """What a terminal shows up to `text`, or up to its end."""
    shown, deadline = "", time.monotonic() + timeout
    while text is None or text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 65536).decode()
            except OSError:  # Linux says so that nobody holds the other side any more
                assert text is None, shown
                return shown
    return shown


def test_ctrl_c_on_a_terminal_saves_and_a_damaged_checkpoint_is_passed_over(place: Place) -> None:
    spec = str(place.write(training__steps=400, training__eval_every_steps=20, checkpoint__every_steps=20))
    with terminal() as (ours, theirs), place.start("run", spec, terminal=theirs, TERM="xterm") as running:
        os.close(theirs)
        shown = read_until(ours, "step ") + read_until(ours, "eval/loss")  # drawn at least twice, at whatever speed
        asked = time.monotonic()
        os.write(ours, b"\x03")  # as the key does: to every process of the foreground group
        shown += read_until(ours, None)
        stopped = Done(code=running.process.wait(60), out="", err=shown.replace("\r", ""), seconds=0)
    assert stopped.code == 1
    assert time.monotonic() - asked < SOON_S
    step = stopped_step(stopped)
    assert place.left_over() == []
    assert mlflow_runs(place)[0][1] == "KILLED"
    kept = checkpoints(place.home / "runs")
    assert max(kept) == step
    assert_rewrites_one_line(shown)

    flip_a_bit(kept[step])
    done = place.run("run", spec, "--json")
    assert_clean(done, code=0)
    assert done.answer["status"] == "finished"
    assert f"step-{step:08d} is damaged and was passed over" in " ".join(done.answer["notes"])
    assert [status for _, status in mlflow_runs(place)] == ["FINISHED"]
    assert place.left_over() == []


def assert_rewrites_one_line(shown: str) -> None:
    """Progress comes as `CR, clear, text` on one line, none wider than the terminal; no library speaks."""
    drawn = [part for part in re.split(r"\r\x1b\[K|\r\n", shown) if part]
    progress = [part for part in drawn if part.startswith("step ")]
    assert len(progress) >= 3, "twice before the key, and once after"
    assert max(map(len, progress)) < 100
    assert len(re.findall(r"step \d+/400[^\r]*\r\n", shown)) <= 1, "only the last one may stay"
    others = [part for part in drawn if not OUR_LINES.fullmatch(part) and not part.startswith("step ")]
    assert others[0] in ("^C", "^Cstopping: saving a checkpoint (again to end at once)") or "stopping" in others[0]
    assert all(re.match(r"\^C|stopping: |error: stopped|  (got|do): ", part) for part in others), others


def flip_a_bit(checkpoint: Path) -> None:
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_sigterm_saves_too_and_a_second_signal_ends_the_next_attempt_at_once(place: Place) -> None:
    spec = str(place.write(resources__workers=2, deepspeed={"zero_stage": 2}, **LONG))
    with place.start("run", spec, "--json") as running:
        wait_for_checkpoint(place, running, above=0)
        asked = time.monotonic()
        running.send(signal.SIGTERM)
        done = running.finish(60)
        assert time.monotonic() - asked < SOON_S
    assert_clean(done, code=1)
    step = stopped_step(done)
    assert done.answer["status"] == "failed"
    assert max(checkpoints(place.home / "runs")) == step
    assert [status for _, status in mlflow_runs(place)] == ["KILLED"]
    assert place.left_over() == []

    with place.start("run", spec) as running:
        wait_for_checkpoint(place, running, above=step)  # it went on from there
        running.send(signal.SIGINT)
        running.wait_for("stopping: saving a checkpoint")
        asked = time.monotonic()
        running.send(signal.SIGINT)
        done = running.finish(60)
        assert time.monotonic() - asked < SOON_S
    assert_clean(done, code=1)
    assert "ended at once" in done.err or "stopped at step" in done.err
    assert [status for _, status in mlflow_runs(place)] == ["KILLED"]
    assert place.left_over() == []


def wait_for_checkpoint(place: Place, running: Running, *, above: int, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while max(checkpoints(place.home / "runs"), default=0) <= above:
        assert running.process.poll() is None, running.err.read_text()
        assert time.monotonic() < deadline, running.err.read_text()
        time.sleep(0.05)


def test_fresh_forgets_and_ctrl_c_while_workers_start_ends_soon(finished: tuple[Place, Done]) -> None:
    place, before = finished
    outcome = Path(before.answer["run_folder"]) / "outcome.json"
    with place.start("run", str(place.spec), "--fresh", "--json") as running:
        running.wait_for("starting workers")
        asked = time.monotonic()
        running.send(signal.SIGINT)
        done = running.finish(60)
        assert time.monotonic() - asked < SOON_S
    assert_clean(done, code=1)
    assert "the same command" in done.err
    assert not outcome.exists()
    first, second = mlflow_runs(place)
    assert first == (before.answer["mlflow_run_id"], "FINISHED")
    assert second[1] == "KILLED"
    assert place.left_over() == []


# -- a full disk ---------------------------------------------------------------------------------------------------


class SmallDisk:
    """A folder that takes only a few MB, until it is enlarged.

    A file system of its own where this user may mount one. Else a limit on the size of the files that the training
    worker writes, which its kernel refuses in the same place with another reason.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self._place = folder, place
        folder.mkdir()
        self.mounted = self._mount("size=2560k")

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, running: Running) -> None:
        """Makes later writes fail; a mounted disk fills by itself."""
        if not self.mounted:
            for process in self._place.processes():
                if process.name().startswith("ray::"):
                    process.rlimit(psutil.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def enlarge(self) -> None:
        if self.mounted:
            assert self._mount("remount,size=64m")

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def test_on_a_full_disk_the_last_checkpoint_stays_good_and_the_run_goes_on_once_there_is_room(place: Place) -> None:
    disk = SmallDisk(place.folder / "small", place)
    try:
        spec = str(place.write(training__steps=60, checkpoint__every_steps=10, checkpoint__storage=str(disk.folder)))
        with place.start("run", spec, "--json") as running:
            if not disk.mounted:
                running.wait_for("step ")
                disk.fill(running)
            done = running.finish()
        assert_clean(done, code=1)
        assert re.search(r"error: .*\n +got: .*\n +do: .*(the same command then|the run) goes on from", done.err), (
            done.err
        )
        assert done.answer["status"] == "failed"
        assert [status for _, status in mlflow_runs(place)] == ["FAILED"]
        assert place.left_over() == []
        kept = checkpoints(disk.folder)
        assert kept or not disk.mounted
        for checkpoint in kept.values():
            files = json.loads((checkpoint / "manifest.json").read_text())["files"]
            assert all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())

        disk.enlarge()
        done = place.run("run", spec, "--json")
        assert_clean(done, code=0)
        assert done.answer["status"] == "finished"
        assert [status for _, status in mlflow_runs(place)] == ["FINISHED"]
    finally:
        disk.close()


# -- the state folder ----------------------------------------------------------------------------------------------


REBUILT = (
    *("result.json", "identity.json", "mlflow.json", "handle.json", "confirmed.json", "shipped.json"),
    *("meta.json", "sizes.json", "train.bin"),
)
"""Files of a home that can be made anew."""


def tear(home: Path, *names: str) -> None:
    files = [path for name in names for path in home.rglob(name) if "model" not in path.parts]
    assert {path.name for path in files} == set(names)
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def test_torn_files_of_a_run_are_made_anew_or_called_damaged(place: Place) -> None:
    spec = str(place.write())
    first = place.run("run", spec, "--json").answer
    tear(place.home, *REBUILT)
    again = place.run("run", spec, "--json")
    assert_clean(again, code=0)
    assert again.answer["metrics"]["eval/loss"] == first["metrics"]["eval/loss"]
    assert [status for _, status in mlflow_runs(place)] == ["FINISHED"]

    tear(place.home, "result.json", "kept.json")
    damaged = place.run("run", spec)
    assert_clean(damaged, code=1)
    assert "what the run knows of its attempts is damaged" in damaged.err
    assert "start over with --fresh" in damaged.err
    assert place.run("run", spec, "--fresh", "--json").answer["status"] == "finished"


def test_a_home_that_is_deleted_in_mid_run_ends_in_a_message(place: Place) -> None:
    with place.start("run", str(place.write(**LONG))) as running:
        wait_for_checkpoint(place, running, above=0)
        shutil.rmtree(place.home)
        done = running.finish(120)
    assert_clean(done, code=1)
    assert "the folder of the run is gone" in done.err
    assert place.left_over() == []
