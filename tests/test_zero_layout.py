from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoints.zero_layout import Layout, overlaps, parts_layout, rows_layout, unsharded_layout

GROUPS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3).map(
    lambda groups: [{f"{g}.{p}": size for p, size in enumerate(sizes)} for g, sizes in enumerate(groups)]
)


@st.composite
def layouts(draw: st.DrawFn, groups: list[dict[str, int]]) -> Layout:
    """One of the layouts that DeepSpeed may have for these parameters."""
    world_size = draw(st.integers(1, 7))
    kind = draw(st.sampled_from(["unsharded", "rows", "parts"]))
    if kind == "unsharded":
        return unsharded_layout({name: size for group in groups for name, size in group.items()})
    if kind == "parts":
        return parts_layout(groups, world_size=world_size)
    paddings = [[draw(st.integers(0, 3)) for _ in group] for group in groups]
    rows = [sum(group.values()) + sum(padding) for group, padding in zip(groups, paddings, strict=True)]
    sizes = [2 * math.ceil(row / (2 * world_size)) for row in rows]  # DeepSpeed aligns a row to 2 x world size
    return rows_layout(groups, sizes=sizes, paddings=paddings)


@given(st.data(), GROUPS)
def test_a_layout_keeps_every_element_at_a_place_of_its_own(data: st.DataObject, groups: list[dict[str, int]]) -> None:
    layout = data.draw(layouts(groups))
    places = set()
    for group in groups:
        for name, elements in group.items():
            found = [s.first + i for s in layout.spans[name] for i in range(s.count)]
            assert found == list(range(elements)), "its runs are in order and without gaps"
            assert layout.elements(name) == elements
    for span in itertools.chain.from_iterable(layout.spans.values()):
        assert span.offset + span.count <= layout.sizes[span.group]
        mine = {(span.rank, span.group, span.offset + i) for i in range(span.count)}
        assert not places & mine
        places |= mine


@given(st.data(), GROUPS)
def test_any_layout_can_be_made_of_any_other(data: st.DataObject, groups: list[dict[str, int]]) -> None:
    source, target = data.draw(layouts(groups)), data.draw(layouts(groups))
    stored = {
        (span.rank, span.group, span.offset + i): (name, span.first + i)
        for name, spans in source.spans.items()
        for span in spans
        for i in range(span.count)
    }
    for name, spans in target.spans.items():
        for span in spans:
            made = {}
            for old, new in overlaps(source.spans[name], span):
                for i in range(new.count):
                    made[new.offset + i] = stored[old.rank, old.group, old.offset + i]
            assert made == {span.offset + i: (name, span.first + i) for i in range(span.count)}


def test_zero_2_cuts_the_row_of_a_group_and_zero_3_each_parameter() -> None:
    groups = [{"a": 3, "b": 4}]
    row = rows_layout(groups, sizes=[4], paddings=[[0, 0]])
    assert [(s.rank, s.offset, s.first, s.count) for s in row.spans["b"]] == [(0, 3, 0, 1), (1, 0, 1, 3)]
    parts = parts_layout(groups, world_size=2)
    assert [(s.rank, s.offset, s.first, s.count) for s in parts.spans["b"]] == [(0, 2, 0, 2), (1, 2, 2, 2)]
    assert [s.count for s in parts.spans["a"]] == [2, 1], "the last part is padded"


def test_unused_elements_behind_a_parameter_move_those_that_follow_it() -> None:
    """As DeepSpeed writes them where parameters are aligned: a row of aaa-bbbb--c, cut every six elements."""
    row = rows_layout([{"a": 3, "b": 4, "c": 1}], sizes=[6], paddings=[[1, 2, 0]])
    assert [(s.rank, s.offset, s.first, s.count) for s in row.spans["b"]] == [(0, 4, 0, 2), (1, 0, 2, 2)]
    assert [(s.rank, s.offset, s.first, s.count) for s in row.spans["c"]] == [(1, 4, 0, 1)]
