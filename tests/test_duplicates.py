from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.facts import duplicates
from orchestrator.facts.duplicates import (
    Duplicates,
    fingerprint,
    measure_duplicates,
    near_duplicates,
    normalize,
    similarity,
    sketch,
)
from orchestrator.intervals import Interval
from orchestrator.ratio_estimates import exactly

WORDS = [f"word{number}" for number in range(2_000)]


def prose(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def measured(texts: list[str], *, share: float = 1.0, seed: int = 0) -> Duplicates:
    normal = [normalize(text) for text in texts]
    return measure_duplicates({fingerprint(text): text for text in normal}, len(normal), share=share, seed=seed)


def test_case_and_spacing_make_no_difference() -> None:
    assert normalize("  A\tb \n C") == "a b c"
    assert measured(["One text", "one  TEXT\n", "another"]).exact == exactly(1 / 3)


def test_lone_surrogates_have_a_fingerprint() -> None:
    assert fingerprint("\ud800") != fingerprint("\ud801")


def test_changed_word_in_a_long_text_leaves_a_near_duplicate() -> None:
    text = prose(100, 0)
    texts = [text, text.replace(text.split()[50], "other"), *(prose(100, seed) for seed in range(1, 20))]
    assert near_duplicates(texts) == 2


def test_unrelated_texts_are_no_duplicates() -> None:
    assert near_duplicates([prose(100, seed) for seed in range(50)]) == 0


def test_common_opening_makes_no_near_duplicates() -> None:
    opening = prose(20, 99)
    assert near_duplicates([f"{opening} {prose(100, seed)}" for seed in range(100)]) == 0


@pytest.mark.parametrize("shared", [0.2, 0.5, 0.8])
def test_sketches_estimate_the_similarity_of_their_sets(shared: float) -> None:
    whole = [prose(3, seed) for seed in range(3_000)]
    common = round(len(whole) * shared)
    rest = (len(whole) - common) // 2
    # Each word triple stands alone, so that texts are sets of shingles up to those across the seams.
    first, second = whole[: common + rest], whole[:common] + whole[common + rest :]
    exact = len(_shingles(first) & _shingles(second)) / len(_shingles(first) | _shingles(second))
    assert similarity(sketch(" ".join(first)), sketch(" ".join(second))) == pytest.approx(exact, abs=0.16)


def _shingles(parts: list[str]) -> set[tuple[str, ...]]:
    words = " ".join(parts).split()
    return set(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.slow
@given(st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=1, max_size=12), st.randoms())
def test_order_changes_nothing(texts: list[str], chance: random.Random) -> None:
    mixed = texts.copy()
    chance.shuffle(mixed)
    assert measured(mixed) == measured(texts)


@given(st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=12))
def test_data_twice_is_at_least_half_duplicates(texts: list[str]) -> None:
    once, twice = measured(texts), measured(texts * 2)
    copies = twice.exact.mid * 2 * len(texts)
    assert copies == pytest.approx(once.exact.mid * len(texts) + len(texts))


def test_large_collections_are_searched_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "POOL_CHARACTERS", 200_000)
    texts = [prose(50, seed) for seed in range(500)]
    pairs = [f"{text} more" for text in texts]
    found = measured(texts + pairs)
    assert 300 < found.near_pool < 700
    assert found.near.low < 1 == found.near.high  # every text has a near duplicate, drawn half the time
    assert found.near.mid == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_a_part_of_the_data_gives_an_interval_that_holds_the_truth() -> None:
    chance = random.Random(0)
    texts = [prose(5, seed) for seed in range(4_000)]
    texts += texts[:1_000]  # a fifth of all rows are copies
    held = 0
    for seed in range(40):
        found = measured(chance.sample(texts, 1_000), share=0.2, seed=seed).exact
        held += found.low <= 0.2 <= found.high
    assert held >= 34


def test_nothing_left_out_gives_no_interval() -> None:
    assert measured(["a b c d", "e f g h"]) == Duplicates(
        exact=Interval(low=0, mid=0, high=0), near=Interval(low=0, mid=0, high=0), near_pool=2
    )
