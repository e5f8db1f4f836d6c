"""Long work that cannot be interrupted, waited for so that the wait can be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK_S = 0.5
"""Between two looks at whether to go on: what a person takes for at once."""


def go_on() -> None:
    """Never a reason to stop."""


def patiently(work: Callable[[], T], pause: Callable[[], None]) -> T:
    """What `work` gives, or raises, from a thread; before and meanwhile `pause` is called, and what it raises ends the
    wait.

    A signal is handled in the meantime, too, which compiled code would keep waiting. The thread is left behind then.
    """
    pause()
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        pause()
    if errors:
        raise errors[0]
    return answers[0]
