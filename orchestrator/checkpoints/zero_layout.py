"""Where the elements of trainable parameters lie in the flat tensors of a ZeRO optimizer; no torch.

That depends on the stage alone:

    0      unsharded: whole on every rank
    1, 2   the parameters of a group one after the other, and that row cut into as many parts as there are ranks
    3      every parameter cut into as many parts as there are ranks, and the parts of a group one after the other

A group is one of the optimizer's; under stage 3 one of DeepSpeed's sub-groups, into which it cuts large ones. Used by
`reshard`, which copies from one layout into another, and by `diff`, which gives flat tensors their names back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Sizes = Mapping[str, int]
"""Elements of every parameter of a group, in the order in which they lie."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Elements of a parameter that lie side by side in one rank's flat tensor of one group."""

    first: int
    """Index of the first of them within the parameter."""
    count: int
    rank: int
    group: int
    offset: int
    """Index of the first of them within the flat tensor."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the elements of every trainable parameter lie."""

    sizes: tuple[int, ...]
    """Elements of each group's flat tensor, the same on all ranks, padding included."""
    spans: Mapping[str, tuple[Span, ...]]
    """The runs of each parameter, by name."""

    def elements(self, name: str) -> int:
        """Elements of a parameter; 0 where there is none of that name."""
        return sum(span.count for span in self.spans.get(name, ()))


def rows_layout(groups: Sequence[Sizes], *, sizes: Sequence[int], paddings: Sequence[Sequence[int]]) -> Layout:
    """The layout of ZeRO 1 and 2: the row of a group is cut into parts of `sizes[group]` elements.

    `paddings[group]` says how many unused elements follow each parameter. What the row lacks at its end is padding.
    """
    spans: dict[str, tuple[Span, ...]] = {}
    for group, (parameters, size) in enumerate(zip(groups, sizes, strict=True)):
        start = 0
        for (name, elements), padding in zip(parameters.items(), paddings[group], strict=True):
            spans[name] = tuple(_cut(start, elements, size=size, group=group))
            start += elements + padding
    return Layout(sizes=tuple(sizes), spans=spans)


def parts_layout(groups: Sequence[Sizes], *, world_size: int) -> Layout:
    """The layout of ZeRO 3: each parameter is cut into equal parts, the last ones padded."""
    sizes, spans = [], {}
    for group, parameters in enumerate(groups):
        offset = 0
        for name, elements in parameters.items():
            part = math.ceil(elements / world_size)
            spans[name] = tuple(
                Span(first=rank * part, count=min(part, elements - rank * part), rank=rank, group=group, offset=offset)
                for rank in range(math.ceil(elements / part))
            )
            offset += part
        sizes.append(offset)
    return Layout(sizes=tuple(sizes), spans=spans)


def unsharded_layout(parameters: Sizes) -> Layout:
    """The layout without ZeRO: every parameter whole, a group for each."""
    groups = [{name: elements} for name, elements in parameters.items()]
    return rows_layout(groups, sizes=tuple(parameters.values()), paddings=[[0]] * len(groups))


def _cut(start: int, elements: int, *, size: int, group: int) -> Iterator[Span]:
    """The runs of a parameter that begins at `start` of a row which is cut every `size` elements."""
    first = 0
    while first < elements:
        rank, offset = divmod(start + first, size)
        count = min(elements - first, size - offset)
        yield Span(first=first, count=count, rank=rank, group=group, offset=offset)
        first += count


def overlaps(source: Iterable[Span], target: Span) -> Iterator[tuple[Span, Span]]:
    """The pieces of `source` of which `target` is made, each with its place there."""
    for span in source:
        first = max(span.first, target.first)
        count = min(span.first + span.count, target.first + target.count) - first
        if count > 0:
            yield _piece(span, first, count), _piece(target, first, count)


def _piece(span: Span, first: int, count: int) -> Span:
    offset = span.offset + first - span.first
    return Span(first=first, count=count, rank=span.rank, group=span.group, offset=offset)
