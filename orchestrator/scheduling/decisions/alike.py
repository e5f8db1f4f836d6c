"""Which nodes have other packages than the driver, so that a training on them would fail, or differ. Pure;
`installations` asks the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping

Installed = Mapping[str, str | None]
"""Versions by name: `python` (major and minor), and packages; None for one that is missing."""
_NAMED = 4
"""So many nodes are named in a sentence; the others are counted."""


def differences(own: Installed, nodes: Mapping[str, Installed]) -> str | None:
    """What stands on each node that differs from the driver's own, in words; None where all are alike."""
    found = {node: _compared(own, there) for node, there in sorted(nodes.items())}
    odd = [f"{node}: {words}" for node, words in found.items() if words]
    if not odd:
        return None
    return "; ".join(odd[:_NAMED]) + (f"; and {len(odd) - _NAMED} nodes more" if len(odd) > _NAMED else "")


def _compared(own: Installed, there: Installed) -> str:
    return ", ".join(_in_words(name, there.get(name), here) for name, here in own.items() if there.get(name) != here)


def _in_words(name: str, there: str | None, here: str | None) -> str:
    if there is None:
        return f"no {name}"
    return f"{name} {there}, the driver {'none' if here is None else here}"
