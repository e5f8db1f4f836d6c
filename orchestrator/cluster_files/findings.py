"""What `cluster check` finds in a file: problems with their place and remedy, checks left out, and prices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    at: str
    """Path in the YAML (`available_node_types.head.node_config`), or empty for the whole file."""
    what: str
    got: str | None = None
    allowed: str | None = None
    do: str | None = None

    def lines(self) -> list[str]:
        """For a person: what is wrong and where, and below it what was given, allowed, and to do."""
        parts = (("got", self.got), ("allowed", self.allowed), ("do", self.do))
        return [f"{self.at}: {self.what}" if self.at else self.what] + [
            f"  {label + ':':<9}{text}" for label, text in parts if text
        ]


@dataclass(frozen=True, kw_only=True)
class Price:
    """What the machines of a file cost on demand."""

    of: str
    """`the head alone`, or `at most`."""
    machines: tuple[str, ...]
    """`4 x g6.12xlarge (4 L4)`."""
    usd_per_hour: float | None
    """None where a machine's price is not known."""
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All about one file."""

    file: str
    provider: str
    problems: tuple[Problem, ...]
    left_out: tuple[str, ...]
    """Checks that could not be made here, and why."""
    prices: tuple[Price, ...]

    @property
    def exit_code(self) -> int:
        """2 where the file has a problem, as for any mistake of the user's."""
        return 2 if self.problems else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"ok": not self.problems} | asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        found = [line for problem in self.problems for line in problem.lines()]
        verdict = f"{len(self.problems)} to mend" if self.problems else f"nothing is wrong ({self.provider})"
        return [
            *found,
            f"{self.file}: {verdict}",
            *(f"not checked: {why}" for why in self.left_out),
            *map(_priced, self.prices),
        ]


def _priced(price: Price) -> str:
    machines = ", ".join(price.machines)
    if price.usd_per_hour is None:
        return f"{price.of}: {machines}; no price known ({price.why_not})"
    return f"{price.of}: {machines}, about {price.usd_per_hour:.2f} usd an hour on demand"
