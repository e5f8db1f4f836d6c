"""What is drawn from documents and rows, and where a document is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.drawing import NEAR_BYTES, cut_near_end, draw_documents, draw_stratified

SMALL, LINES, BOOKS = st.integers(1, 300), st.integers(1, 5_000), st.integers(10_000, 5_000_000)
SIZES = st.one_of(
    *(st.lists(each, min_size=1, max_size=60) for each in (SMALL, LINES, BOOKS)),
    st.lists(st.one_of(SMALL, LINES, BOOKS), min_size=1, max_size=60),
)
FRACTIONS = st.one_of(st.sampled_from([0.005, 0.05, 0.2, 0.5]), st.floats(0.001, 0.999))


def held_bytes(sizes: np.ndarray, fraction: float, seed: int) -> int:
    drawn = draw_documents(sizes, fraction, seed)
    return int(sizes[drawn.whole].sum()) + drawn.end_bytes


@pytest.mark.slow
@settings(max_examples=400)
@given(sizes=SIZES, fraction=FRACTIONS, seed=st.integers(0, 100))
def test_documents_meet_the_share_whatever_their_sizes(sizes: list[int], fraction: float, seed: int) -> None:
    each = np.array(sizes)
    drawn = draw_documents(each, fraction, seed)
    assert abs(held_bytes(each, fraction, seed) - fraction * each.sum()) <= NEAR_BYTES + 0.5
    assert len(set(drawn.whole.tolist())) == len(drawn.whole) < len(sizes), "each once, and never all"
    assert np.array_equal(np.sort(drawn.whole), drawn.whole)
    if drawn.cut is None:
        assert len(drawn.whole) > 0
    else:
        assert drawn.cut not in drawn.whole
        assert 0 < drawn.end_bytes <= sizes[drawn.cut]


def test_no_document_is_cut_where_whole_ones_meet_the_share() -> None:
    drawn = draw_documents(np.full(40, 1000), 0.1, seed=3)
    assert (len(drawn.whole), drawn.cut) == (4, None)
    assert draw_documents(np.full(40, 1000), 0.11, seed=3).end_bytes == 400


def test_short_documents_fill_what_long_ones_leave() -> None:
    sizes = np.array([5_000] * 20 + [100] * 1_000)
    assert all(draw_documents(sizes, 0.05, seed).cut is None for seed in range(20))


def test_the_seed_decides_what_is_drawn() -> None:
    sizes = np.full(1000, 2000)
    drawn = [draw_documents(sizes, 0.05, seed).whole.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_one_long_book_among_short_ones_is_not_held_out() -> None:
    sizes = np.array([100_000, *[100] * 1000])
    for seed in range(50):
        drawn = draw_documents(sizes, 0.01, seed)
        assert 0 not in drawn.whole
        assert drawn.cut is None


def test_a_million_documents_are_drawn_without_a_loop_over_them() -> None:
    sizes = np.random.default_rng(0).integers(1, 100_000, size=1_000_000)
    assert abs(held_bytes(sizes, 0.05, 0) - 0.05 * sizes.sum()) <= NEAR_BYTES


@pytest.mark.parametrize(
    ("text", "share", "end"),
    [
        ("a title\n" + "one line\n" * 1000, 0.2, "one line\n" * 200),
        ("word " * 1000, 0.1, " word" * 100 + " "),
        ("\n" + "x" * 1000, 0.1, "x" * 100),
        ("ü" * 1000, 0.1, "ü" * 100),
    ],
    ids=["line", "word", "no place near", "letters of two bytes"],
)
def test_a_document_is_cut_at_a_line_else_a_word_else_a_letter(text: str, share: float, end: str) -> None:
    assert text[cut_near_end(text, share=share) :] == end


@settings(max_examples=300)
@given(text=st.text(alphabet=st.sampled_from("ab ü漢😀\n\ud800"), min_size=2, max_size=600), share=st.floats(0, 1))
def test_a_cut_is_near_its_place_and_inside_no_letter(text: str, share: float) -> None:
    place = cut_near_end(text, share=share)
    size = len(text.encode("utf-8", "surrogatepass"))
    assert abs(len(text[place:].encode("utf-8", "surrogatepass")) - share * size) <= NEAR_BYTES + 4


@pytest.mark.slow
@settings(max_examples=200)
@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=6), seed=st.integers(0, 99), data=st.data())
def test_stratified_draw_knows_every_class_on_both_sides(sizes: list[int], seed: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    count = data.draw(st.integers(len(sizes), len(labels) - len(sizes)))
    drawn = draw_stratified(labels, count, seed)
    assert len(set(drawn.tolist())) == count
    assert set(labels[drawn]) == set(np.delete(labels, drawn)) == set(range(len(sizes)))
    exact = count * np.array(sizes) / len(labels)
    # One row of each class is drawn and one kept for certain; the rest is in proportion.
    assert (np.abs(np.bincount(labels[drawn]) - exact) <= 1 + len(sizes)).all()


def test_stratified_draw_keeps_the_proportions() -> None:
    labels = np.repeat([0, 1], [9000, 1000])
    drawn = draw_stratified(labels, 500, seed=0)
    assert np.bincount(labels[drawn]) == pytest.approx([450, 50], abs=1)
    assert not np.array_equal(drawn, draw_stratified(labels, 500, seed=1))


def test_stratified_draw_may_leave_a_single_row() -> None:
    labels = np.repeat([0, 1, 2], 10)
    assert len(draw_stratified(labels, 29, seed=0)) == 29
    assert len(draw_stratified(labels, 30, seed=0)) == 30
