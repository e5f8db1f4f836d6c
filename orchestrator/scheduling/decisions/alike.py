"""Which nodes a training cannot begin on: with other packages than the driver, a disk too full, or no compiler. Pure;
`installations` asks the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Installed = Mapping[str, str | None]
"""Versions by name: `python` (major and minor), and packages; None for one that is missing."""
_NAMED = 4
"""So many nodes are named in a sentence; the others are counted."""
LEAST_FREE_BYTES = 200_000_000
"""What a node's disks need besides: logs of Ray, and metrics on their way to MLflow (a guess)."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node said of itself."""

    installed: Installed
    home: str
    """The state folder, where prepared data arrives."""
    home_free: int
    """Bytes free on its disk."""
    temp: str
    """Where Ray keeps its logs and what it spills."""
    temp_free: int
    prepared: tuple[str, ...]
    """Names of the prepared data that it has already."""
    has_compiler: bool
    """Whether it finds a C++ compiler."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a training takes on each node."""

    data: Mapping[str, int]
    """Bytes of prepared data by name."""
    scratch: int
    """Bytes of files on their way to a bucket."""
    compiles: bool
    """Whether DeepSpeed builds an operator there."""


def differences(own: Installed, nodes: Mapping[str, Installed]) -> str | None:
    """What stands on each node that differs from the driver's own, in words; None where all are alike."""
    return _of_each(nodes, lambda there: _compared(own, there))


def full_disks(needs: Needs, nodes: Mapping[str, Node]) -> str | None:
    """On which nodes a disk has too little room, in words; None where all have enough."""

    def too_full(node: Node) -> str:
        arriving = sum(size for name, size in needs.data.items() if name not in node.prepared)
        wanted = {node.home: arriving + needs.scratch + LEAST_FREE_BYTES, node.temp: LEAST_FREE_BYTES}
        free = {node.home: node.home_free, node.temp: node.temp_free}
        return ", ".join(
            f"{_size(free[folder])} free in {folder}, {_size(size)} needed"
            for folder, size in wanted.items()
            if free[folder] < size
        )

    return _of_each(nodes, too_full)


def without_compiler(needs: Needs, nodes: Mapping[str, Node]) -> str | None:
    """Which nodes lack the compiler that the plan takes; None where none does, or it takes none."""
    return _of_each(nodes, lambda node: "no C++ compiler" if needs.compiles and not node.has_compiler else "")


def _of_each(nodes: Mapping[str, T], words_of: Callable[[T], str]) -> str | None:
    odd = [f"{name}: {words}" for name, node in sorted(nodes.items()) if (words := words_of(node))]
    if not odd:
        return None
    return "; ".join(odd[:_NAMED]) + (f"; and {len(odd) - _NAMED} nodes more" if len(odd) > _NAMED else "")


def _compared(own: Installed, there: Installed) -> str:
    return ", ".join(_in_words(name, there.get(name), here) for name, here in own.items() if there.get(name) != here)


def _in_words(name: str, there: str | None, here: str | None) -> str:
    if there is None:
        return f"no {name}"
    return f"{name} {there}, the driver {'none' if here is None else here}"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
