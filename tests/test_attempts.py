import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import FencedError, StorageError
from orchestrator.runs import attempts as module
from orchestrator.runs.attempts import Attempts, Fence, Held


def test_attempts_are_numbered_from_one_and_remember_why(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    assert attempts.newest() == 0
    assert attempts.open(workers=2, cause="first start") == 1
    assert attempts.open(workers=1, cause="a worker died") == 2
    attempts.note_resumed(2, 30)
    first, second = (json.loads((tmp_path / "attempts" / f"000{number}.json").read_text()) for number in (1, 2))
    assert (first["workers"], first["cause"], attempts.resumed_step(1)) == (2, "first start", None)
    assert (second["workers"], second["cause"], attempts.resumed_step(2)) == (1, "a worker died", 30)


def test_the_time_of_attempts_is_known_once_their_workers_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(module.time, "time", lambda: now_s)
    attempts = Attempts(tmp_path)
    first = attempts.open(workers=4, cause="first start")
    assert attempts.held() == Held()
    now_s = 1100.0
    attempts.close(first)
    now_s = 1500.0  # nobody holds a device until the next attempt
    killed = attempts.open(workers=2, cause="a worker died")
    now_s = 1600.0
    third = attempts.open(workers=2, cause="started again")
    now_s = 1610.0
    attempts.close(first)
    attempts.close(third)
    assert attempts.started_s(killed) == 1500.0
    assert attempts.held() == Held(wall_seconds=110.0, device_seconds=420.0)
    assert attempts.newest() == third


def test_drivers_that_start_at_once_never_share_a_number(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.runs.attempts import Attempts; "
        "a = Attempts(Path(sys.argv[1])); print([a.open(workers=1, cause='x') for _ in range(20)])"
    )
    drivers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    numbers = [number for driver in drivers for number in json.loads(driver.communicate(timeout=60)[0])]
    assert sorted(numbers) == list(range(1, 61))


def test_the_fence_of_an_attempt_falls_when_a_newer_one_begins(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    fence = attempts.fence(attempts.open(workers=1, cause="first start"))
    assert fence.holds(now=True)
    fence.check()
    attempts.open(workers=1, cause="another driver")
    assert not fence.holds(now=True)
    with pytest.raises(FencedError, match="taken this run over"):
        fence.check()


def test_a_driver_that_was_overtaken_opens_no_attempt_and_fences_nobody_out(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    old = attempts.open(workers=1, cause="first start", after=0)
    new = attempts.open(workers=1, cause="another driver", after=old)
    with pytest.raises(FencedError, match="taken this run over"):
        attempts.open(workers=1, cause="a worker died", after=old)
    assert attempts.fence(new).holds(now=True)


def test_a_machine_that_does_not_see_the_runs_folder_is_told_from_one_that_does(tmp_path: Path) -> None:
    driver, elsewhere = Attempts(tmp_path / "shared"), Attempts(tmp_path / "own")
    number = driver.open(workers=1, cause="first start")
    driver.check_seen(number, within_s=0)
    with pytest.raises(StorageError, match=r"(?s)does not see the run's folder.*own.*checkpoint.storage"):
        elsewhere.check_seen(number, within_s=0)
    assert not (tmp_path / "own").exists()


def test_a_command_knows_whether_it_is_the_first(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    assert attempts.cause_of_start() == "first start"
    attempts.open(workers=1, cause="first start")
    assert attempts.cause_of_start() == "started again"


def test_the_fence_is_looked_at_every_quarter_of_a_second_at_most() -> None:
    looks, now_s = [], [0.0]

    def newest() -> int:
        looks.append(now_s[0])
        return 1

    fence = Fence(1, newest=newest, clock=lambda: now_s[0])
    for tick in range(100):
        now_s[0] = tick / 100
        assert fence.holds()
    assert len(looks) == 4


def test_a_worker_that_wakes_up_late_sees_at_once_that_it_was_replaced() -> None:
    newest, now_s = [1], [0.0]
    fence = Fence(1, newest=lambda: newest[0], clock=lambda: now_s[0])
    assert fence.holds()
    newest[0], now_s[0] = 2, 3600.0
    assert not fence.holds()


def test_what_an_old_attempt_wrote_beyond_the_step_of_a_later_start_is_void(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(3):
        attempts.open(workers=1, cause="x")
    attempts.note_resumed(2, 20)
    assert not attempts.is_void(1, 20)
    assert attempts.is_void(1, 21)
    assert not attempts.is_void(2, 30), "the third has not begun to train"
    attempts.note_resumed(3, 25)
    assert attempts.is_void(2, 30)
    assert not attempts.is_void(3, 99)


def test_a_run_that_nobody_else_can_start_has_no_fence_to_fall(tmp_path: Path) -> None:
    assert Attempts(tmp_path).fence(0).holds(now=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("a file in its place")
    with pytest.raises(StorageError, match="attempts of this run"):
        Attempts(tmp_path).open(workers=1, cause="x")
