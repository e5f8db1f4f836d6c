from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.architectures.standard_shape import PUBLISHED, given_shape, standard_shape
from orchestrator.errors import SpecError


def matrices(parameters: int) -> int:
    """Weights that layers, table and output layer of the shape add up to."""
    shape = standard_shape(parameters)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * q + 2 * shape.hidden * kv + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer + (1 if shape.tied else 2) * shape.embedding_parameters


@pytest.mark.parametrize(
    ("parameters", "layers", "hidden"),
    [(124_000_000, 12, 768), (355_000_000, 24, 1024), (6_740_000_000, 32, 4096), (175_000_000_000, 96, 12288)],
    ids=["GPT-2", "GPT-2 medium", "Llama-2-7B", "GPT-3"],
)
def test_published_models_come_out_with_their_own_depth_and_width(parameters: int, layers: int, hidden: int) -> None:
    shape = standard_shape(parameters)
    assert shape.layers == layers
    assert shape.hidden == pytest.approx(hidden, rel=0.05)


def test_sizes_that_are_given_stay_and_the_mlp_makes_up_the_rest() -> None:
    gemma = standard_shape(8_540_000_000, layers=28, hidden=3072, heads=16, vocab=256_000)
    assert (gemma.layers, gemma.hidden, gemma.heads, gemma.vocab) == (28, 3072, 16, 256_000)
    assert gemma.intermediate == pytest.approx(24_576, rel=0.1)


def test_fewer_key_value_heads_leave_more_to_the_mlp() -> None:
    llama3 = {"layers": 32, "hidden": 4096, "heads": 32, "vocab": 128_256}
    assert standard_shape(8_030_000_000, **llama3, kv_heads=8).intermediate == pytest.approx(14_336, rel=0.01)


def test_the_width_is_one_that_the_given_heads_split() -> None:
    assert standard_shape(7_000_000_000, heads=48).hidden % 48 == 0


@given(parameters=st.integers(10**2, 10**12))
def test_the_embedding_is_never_all_there_is(parameters: int) -> None:
    assert 0 < standard_shape(parameters).embedding_parameters < parameters


@given(parameters=st.integers(10**6, 10**12))
def test_the_weights_of_the_shape_are_those_asked_for(parameters: int) -> None:
    shape = standard_shape(parameters)
    assert matrices(parameters) == pytest.approx(parameters, rel=0.05)
    assert shape.parameters == parameters
    assert shape.hidden % shape.heads == 0
    assert 0 < shape.embedding_parameters < parameters


@given(parameters=st.integers(10**7, 10**12))
def test_a_tenth_more_weights_change_a_tokens_activations_by_no_more_than_a_third(parameters: int) -> None:
    def widths(size: int) -> int:
        shape = standard_shape(size)
        return shape.layers * (3 * shape.hidden + shape.intermediate)

    assert widths(round(1.1 * parameters)) == pytest.approx(widths(parameters), rel=0.33)


def test_the_table_is_ordered_and_cites_every_row() -> None:
    assert list(PUBLISHED) == sorted(PUBLISHED)
    assert all(row.source for row in PUBLISHED)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"hidden": 4096, "heads": 33}, "--heads"),
        ({"heads": 32, "kv_heads": 7}, "--kv-heads"),
        ({"kv_heads": 5, "hidden": 4096}, "--kv-heads"),
        ({"layers": 0}, "--layers"),
        ({"vocab": -1}, "--vocab"),
        ({"layers": 2, "hidden": 64}, "--params"),
        ({"vocab": 10**9}, "--params"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(sizes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError) as error:
        standard_shape(7_000_000_000, **sizes)
    assert named in str(error.value)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(SpecError, match="--params"):
        standard_shape(0)


def test_no_size_given_is_no_shape() -> None:
    assert given_shape(10**9, layers=None, vocab=None) is None
    shape = given_shape(10**9, layers=10, vocab=None)
    assert shape is not None
    assert shape.layers == 10
