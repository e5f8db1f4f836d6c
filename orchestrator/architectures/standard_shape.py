"""The shape of a model of which only the size is known: what published models of that size look like.

Comes in: a number of parameters, and those of its sizes that are known. Goes out: a `ModelShape`. Called by
`estimate` and by the advisor's prices.
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

from orchestrator.architectures.families import ModelShape
from orchestrator.errors import SpecError
from orchestrator.quantities import divisors, human_count


class PublishedSize(NamedTuple):
    """Sizes of a published model."""

    parameters: float
    layers: int
    vocab: int
    source: str


PUBLISHED = (
    PublishedSize(1e6, 4, 2_048, "a guess: the smallest worth training; its embedding is a tenth of it"),
    PublishedSize(14e6, 6, 8_192, "Pythia-14M's depth (Biderman 2023); our own tokenizer's default vocabulary"),
    PublishedSize(124e6, 12, 50_257, "GPT-2 small (Radford 2019); GPT-3 125M is as deep (Brown 2020, table 2.1)"),
    PublishedSize(355e6, 24, 50_257, "GPT-2 medium; GPT-3 350M"),
    PublishedSize(1.3e9, 24, 50_257, "GPT-3 1.3B; Pythia-1.4B"),
    PublishedSize(2.7e9, 32, 50_257, "GPT-3 2.7B; Pythia-2.8B; Phi-2"),
    PublishedSize(7e9, 32, 65_024, "Llama-2-7B, Llama-3-8B, Falcon-7B"),
    PublishedSize(13e9, 40, 65_024, "Llama-2-13B; GPT-3 13B"),
    PublishedSize(34e9, 48, 65_024, "CodeLlama-34B; GPT-NeoX-20B has 44"),
    PublishedSize(70e9, 80, 65_024, "Llama-2-70B, Llama-3-70B"),
    PublishedSize(175e9, 96, 65_024, "GPT-3"),
    PublishedSize(405e9, 126, 128_256, "Llama-3.1-405B (Dubey 2024)"),
)
"""Depth by size. Vocabularies of models above 2.7B range from 32,000 (Llama 2) to 256,000 (Gemma): 65,024 (Falcon)
lies between, and where logits matter the true one should be given."""

_LARGE = 2e9
"""Parameters from which heads are 128 wide (Llama, GPT-3 6.7B and up) rather than 64 (GPT-2, Llama-3.2-1B), and the
output layer is a table of its own rather than tied."""
_IMPLAUSIBLE = 8.0
"""Given sizes that imply this many times more or fewer weights than asked for are a mistake: the widest of the
published models, Gemma-7B with its MLP of 8 x hidden, is 2.2 times what 12 x layers x hidden^2 says."""

_LEAST_IN_LAYERS = 0.01
"""Share of the weights below which layers are no model any more; of the smallest published ones it is a tenth."""


MOST_SIZES = {"parameters": 10**16, "layers": 10**5, "hidden": 10**7, "heads": 10**6, "kv_heads": 10**6, "vocab": 10**9}
"""A thousand times and more of what was ever published (Switch-C: 1.6e12 parameters): what is above is a slip."""


def standard_shape(
    parameters: int,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocab: int | None = None,
) -> ModelShape:
    """A causal decoder like Llama (RMSNorm, gated MLP) with so many parameters; what is given stays as it is.

    Depth and vocabulary follow `PUBLISHED` between its rows; the width is what makes up the parameters, and the MLP
    takes what attention leaves of a layer. Raises SpecError when sizes are not positive or contradict each other.
    """
    _check_positive(parameters=parameters, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, vocab=vocab)
    depth = layers or round(_between(parameters, [float(row.layers) for row in PUBLISHED]))
    usual = round(_between(parameters, [float(row.vocab) for row in PUBLISHED]))
    words = vocab or max(1, min(usual, parameters // 8))  # tiny models have room for few
    tied = parameters < _LARGE
    tables = 1 if tied else 2
    width = hidden or _width(parameters, layers=depth, embedding=tables * words, heads=heads)
    count, key_values = _heads(parameters, hidden=width, heads=heads, kv_heads=kv_heads)
    embedding = words * width
    if tables * embedding >= parameters:
        tied, tables = True, 1
    _check_plausible(parameters, layers=depth, hidden=width, vocab=words)
    head_dim = width // count
    attention = 2 * width * width + 2 * width * key_values * head_dim
    mlp = (parameters - tables * embedding) / depth - attention
    return ModelShape(
        model_type="standard",
        parameters=parameters,
        embedding_parameters=embedding,
        head_parameters=0,
        layers=depth,
        hidden=width,
        heads=count,
        kv_heads=key_values,
        head_dim=head_dim,
        intermediate=max(width, round(mlp / (3 * width))),
        vocab=words,
        context=None,
        tied=tied,
        causal=True,
        mlp_tensors=4,
        rms_norm=True,
        dropout=False,
        exact=False,
    )


def given_shape(parameters: int, **sizes: int | None) -> ModelShape | None:
    """`standard_shape` with the sizes that are given, or None where none is. Raises what it raises."""
    return None if all(size is None for size in sizes.values()) else standard_shape(parameters, **sizes)


def _check_positive(**sizes: int | None) -> None:
    for name, value in sizes.items():
        option = "--" + name.replace("_", "-").replace("parameters", "params")
        if value is not None and value < 1:
            raise SpecError(f"{option} must be above zero", got=value, do=f"leave {option} out for a usual value")
        if value is not None and value > MOST_SIZES[name]:
            raise SpecError(f"{option} is beyond any model", got=value, allowed=f"up to {MOST_SIZES[name]:.0e}")


def _between(parameters: float, column: list[float]) -> float:
    """A column of `PUBLISHED` at a size, linear between rows on logarithmic axes, constant outside."""
    sizes = [row.parameters for row in PUBLISHED]
    if parameters <= sizes[0] or parameters >= sizes[-1]:
        return column[0] if parameters <= sizes[0] else column[-1]
    above = bisect.bisect_right(sizes, parameters)
    share = math.log(parameters / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    return math.exp((1 - share) * math.log(column[above - 1]) + share * math.log(column[above]))


def _width(parameters: float, *, layers: int, embedding: int, heads: int | None) -> int:
    """The hidden size h of 12 x layers x h^2 + embedding x h = parameters, a multiple of what heads need."""
    exact = (math.sqrt(embedding**2 + 48 * layers * parameters) - embedding) / (24 * layers)
    multiple = heads or _head_dim(parameters)
    if exact < multiple:
        return heads or max(1, round(exact))
    return round(exact / multiple) * multiple


def _head_dim(parameters: float) -> int:
    return 128 if parameters >= _LARGE else 64


def _heads(parameters: int, *, hidden: int, heads: int | None, kv_heads: int | None) -> tuple[int, int]:
    """Heads and key-value heads; raises SpecError when the hidden size or the heads do not split."""
    if heads is None:
        wanted = max(1, round(hidden / _head_dim(parameters)))
        step = kv_heads or 1
        possible = [n for n in divisors(hidden) if n % step == 0]
        if not possible:
            raise _uneven("--kv-heads", kv_heads, "the hidden size", hidden)
        heads = min(possible, key=lambda n: abs(n - wanted))
    if hidden % heads:
        raise _uneven("--heads", heads, "--hidden", hidden)
    if heads % (kv_heads or heads):
        raise _uneven("--kv-heads", kv_heads, "--heads", heads)
    return heads, kv_heads or heads


def _uneven(option: str, got: int | None, of: str, whole: int) -> SpecError:
    near = sorted(divisors(whole, most=256), key=lambda n: abs(n - (got or 1)))[:4]
    return SpecError(
        f"{of} does not split evenly over {option}",
        got=f"{option} {got} for {of} {whole}",
        allowed=f"a divisor of {whole}, such as {', '.join(map(str, sorted(near)))}",
    )


def _check_plausible(parameters: int, *, layers: int, hidden: int, vocab: int) -> None:
    matrices = 12 * layers * hidden**2
    implied = matrices + vocab * hidden
    too_far = vocab * hidden >= parameters or implied > _IMPLAUSIBLE * parameters or implied * _IMPLAUSIBLE < parameters
    if too_far or matrices < _LEAST_IN_LAYERS * parameters:
        raise SpecError(
            "the sizes contradict the number of parameters",
            got=f"--params {human_count(parameters)}; {layers} layers of {hidden} with a vocabulary of {vocab} have "
            f"about {human_count(implied)}",
            do="correct one of --params, --layers, --hidden and --vocab, or leave the others out",
        )
