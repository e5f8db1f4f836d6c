"""Commands whose mistyped options are told as our own errors are: no more than a screen, and no credential."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
import typer.core

from orchestrator.errors import message_part


class CommandGroup(typer.core.TyperGroup):
    """Typer's group, which quotes what was typed as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Splits off the options of the group itself."""
        with _told_briefly():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, whose options are read here."""
        with _told_briefly():
            return super().invoke(ctx)


@contextmanager
def _told_briefly() -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        error.message = message_part(error.message) or ""
        raise
