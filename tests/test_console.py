import io
import json

import pytest

from orchestrator import console


def progress(step: int, **more: object) -> dict:
    return {
        "step": step,
        "steps": 100,
        "tokens_per_second": 1234.0,
        "eta_s": 65.0,
        "metrics": {"train/loss": 2.5},
        "phase": "training",
        **more,
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0


def test_a_line_says_step_loss_speed_and_what_is_left() -> None:
    assert console.describe(progress(7)) == "step 7/100  loss 2.5000  1.23k tokens/s  ETA 1m05s"


def test_a_log_gets_plain_lines_now_and_then_and_one_for_every_evaluation() -> None:
    stream = io.StringIO()
    line = console.ProgressLine(stream)
    for step in range(50):
        line.show(progress(step))
    line.show(progress(50, metrics={"train/loss": 2.5, "eval/loss": 3.0}))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "eval/loss 3.0000" in lines[1]
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_line_that_rewrites_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("os.get_terminal_size", lambda _: type("Size", (), {"columns": 40})())
    stream = Terminal()
    line = console.ProgressLine(stream)
    line.show(progress(1))
    line.show(progress(2))
    line.say("done")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") == 3
    assert max(len(part) for part in text.replace("\x1b[K", "").split("\r")) <= 40


def test_an_answer_in_json_is_one_object_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("nan"), "b": [float("inf"), 1.0], "c": ()})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0], "c": []}
