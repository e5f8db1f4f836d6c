"""All kinds of cases by name, each drawn from its seed and number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from tests.fuzz.case import Case
from tests.fuzz.files import file_case
from tests.fuzz.options import option_case
from tests.fuzz.specs import spec_case

GENERATORS: dict[str, Callable[[Random], Case]] = {"specs": spec_case, "options": option_case, "files": file_case}


def cases(kind: str, *, seed: int, count: int) -> Iterator[Case]:
    """The first so many cases of a seed; each by itself, so that one can be drawn again alone."""
    for number in range(count):
        yield GENERATORS[kind](Random(f"{kind} {seed} {number}"))
