import ast
import errno
import io
import json
import os
from pathlib import Path

import pytest

from orchestrator import console
from orchestrator.errors import SpecError, StorageError


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
    monkeypatch.setattr("os.get_terminal_size", lambda _=0: os.terminal_size((40, 24)))
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


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            SpecError("no such key", got="a", allowed="b", do="use b"),
            2,
            "no such key\n  got:     a\n  allowed: b\n  do: ",
        ),
        (StorageError("the disk is full"), 1, "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), 1, "got:     /runs/a: No space left on device"),
        (KeyboardInterrupt(), 1, "ended at once"),
    ],
)
def test_a_failure_is_a_message_an_exit_code_and_in_json_one_object(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, expected: str
) -> None:
    with pytest.raises(SystemExit) as ended, console.reporting_failures(as_json=True, answer={"restarts": 0}):
        raise error
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert ended.value.code == code
    assert expected in shown.err
    assert shown.err == f"error: {answer.pop('error')}\n"
    assert answer == {"restarts": 0, "status": "failed"}


def test_without_json_a_failure_leaves_standard_output_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), console.reporting_failures(as_json=False):
        raise StorageError("the disk is full")
    assert capsys.readouterr().out == ""


def test_a_bug_keeps_its_traceback_and_still_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), console.reporting_failures(as_json=True):
        raise ZeroDivisionError("a bug")
    assert json.loads(capsys.readouterr().out) == {"status": "failed", "error": "ZeroDivisionError: a bug"}


def test_what_succeeds_passes_untouched(capsys: pytest.CaptureFixture[str]) -> None:
    with console.reporting_failures(as_json=True):
        pass
    assert capsys.readouterr() == ("", "")


WRITERS = ("print", "typer.echo", "sys.stdout.write", "sys.stderr.write")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b\u202e\udcff"


def test_no_way_to_the_terminal_lets_an_escape_of_the_data_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(Text(HOSTILE))
    table.add_row(Text(HOSTILE))
    console.print_table(table, Text(HOSTILE))
    console.print_lines(HOSTILE, "second line")
    console.print_messages(HOSTILE)
    console.print_error(SpecError(HOSTILE, got=HOSTILE, do=HOSTILE))
    line = console.ProgressLine()
    line.show(progress(1, phase=HOSTILE))
    line.say(HOSTILE)
    done = capsys.readouterr()
    for written in (done.out, done.err):
        assert "\\x1b]0;owned\\x07" in written
        assert not set(written) & set(HOSTILE) & set("\x1b\x07\x9b\u202e\udcff")
    assert done.out.endswith("\nsecond line\n")


def test_a_table_keeps_its_own_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda _=0: os.terminal_size((40, 24)))
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    console.print_table(Text("bold\x1b[2J", style="bold"))
    assert stream.getvalue() == "\x1b[1mbold\\x1b[2J\x1b[0m\n"


def test_nothing_but_the_console_writes_to_standard_streams() -> None:
    package = Path(console.__file__).parent
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WRITERS
    }
    assert writers == {"console.py", "cli.py"}, "cli.py writes the schema, which holds no data"


def test_a_name_that_no_file_can_have_is_a_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, console.reporting_failures(as_json=False):
        Path("x" * 5000).read_text()
    assert end.value.code == 2
    assert "no file can have so long a name" in capsys.readouterr().err


def test_a_name_in_brackets_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table()
    table.add_row("[/] [bold]x[/red]")
    console.print_table(table)
    assert "[/] [bold]x[/red]" in capsys.readouterr().out


def test_a_log_is_shown_without_escapes_and_a_rewritten_line_as_it_stood_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.print_log("10%\r50%\r\nwarn\x1b[2J\n", to_errors=False)
    console.print_log("beside an answer", to_errors=True)
    assert capsys.readouterr() == ("50%\nwarn\\x1b[2J\n", "beside an answer")


@pytest.mark.parametrize(
    ("typed", "answer"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_only_yes_is_yes(
    typed: str, answer: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert not console.is_answered()
    assert console.ask("submit?") is answer
    assert capsys.readouterr() == ("", "submit? [y/N] ")
