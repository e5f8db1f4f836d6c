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
