"""Values of a YAML text replaced where they stand, so that comments, order and anchors stay: text -> text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml


def patch(text: str, values: Mapping[str, Any]) -> str:
    """The text with values set, by dotted path; a list's items are counted (`spec.groups.0.name`).

    Each path must be there already; raises KeyError where it is not. A value that is an alias changes its anchor.
    Documents after `---` are tried in order.
    """
    spans: list[tuple[int, int, str]] = []
    documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    for path, value in values.items():
        node = next((found for document in documents if (found := _find(document, path.split(".")))), None)
        if node is None:
            raise KeyError(f"{path} is not in the file")
        new = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        spans.append((node.start_mark.index, node.end_mark.index, new))
    for start, end, new in sorted(spans, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _find(node: yaml.Node, path: list[str]) -> yaml.Node | None:
    for key in path:
        below = dict(_children(node)).get(key)
        if below is None:
            return None
        node = below
    return node


def _children(node: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((str(key.value), value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((str(number), value) for number, value in enumerate(node.value))
