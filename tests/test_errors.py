import pickle

import pytest

from orchestrator import errors


def all_errors() -> list[type[errors.OrchestratorError]]:
    found = [errors.OrchestratorError]
    for kind in found:
        found += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_survives_the_way_between_processes(kind: type[errors.OrchestratorError]) -> None:
    error = kind("it broke", got="a", allowed="b", do="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


@pytest.mark.parametrize("kind", all_errors())
def test_only_mistakes_of_the_user_exit_with_two(kind: type[errors.OrchestratorError]) -> None:
    assert kind("x").exit_code == (2 if issubclass(kind, errors.UserError) else 1)


@pytest.mark.parametrize("kind", all_errors())
def test_the_module_docstring_draws_every_error(kind: type[errors.OrchestratorError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_a_message_says_what_got_allowed_and_do_in_this_order() -> None:
    text = str(errors.SpecError("it is wrong", got=3, allowed="1 or 2", do="use 2"))
    assert text.splitlines() == ["it is wrong", "  got:     3", "  allowed: 1 or 2", "  do:      use 2"]


ESCAPED = {
    "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "over\rwritten": "over\\x0dwritten",
    "back\x08space": "back\\x08space",
    "one byte \x9b2J": "one byte \\x9b2J",
    "\u202egnp.exe": "\\u202egnp.exe",
    "not utf-8 \udcff": "not utf-8 \\udcff",
    "none\u2028seen": "none\\u2028seen",
}


@pytest.mark.parametrize("text", ESCAPED)
def test_what_commands_a_terminal_is_shown_as_its_escape(text: str) -> None:
    assert errors.shown(text) == ESCAPED[text]
    assert errors.shown(ESCAPED[text]) == ESCAPED[text]


@pytest.mark.parametrize("text", ["a\tb\nc", "naïve 'x' \\n", "שלום 你好 👩\u200d🚀", ""])
def test_text_of_any_script_is_shown_as_it_is(text: str) -> None:
    assert errors.shown(text) == text


def test_messages_of_errors_are_printable_whatever_they_quote() -> None:
    said = str(errors.DataError("no column '\x1b[2J'", got="\x1b[31m", allowed="\x07", do="\udc80"))
    assert said.isascii()
    assert not set(said) & set("\x1b\x07")
