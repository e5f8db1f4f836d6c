"""What pretraining is worth to new data, what fine-tuning forgets, and how much old data prevents that.

Comes in: data and model sizes, losses. Goes out: characters, losses and shares, each with what it was fitted on.
The units are those of the papers, so they stand in the names. [M] marks figures quoted from memory.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from orchestrator.policy.laws import FittedRange, refuse_unless_positive

CHARACTERS_PER_TOKEN = 4.0
"""Of English under a vocabulary of 30k to 50k [M]; code has nearer 3. For turning tokens into Hernandez' characters."""

LORA_LEARNING_RATE_RATIO = 9.8
"""Best learning rate of LoRA over that of full fine-tuning ("LoRA Without Regret" 2025); Biderman 2024: about 10."""
LORA_BITS_PER_PARAMETER = 2.0
"""What an adapter's weight can store ("LoRA Without Regret" 2025 [M]); with more data than that LoRA falls behind."""


@dataclass(frozen=True, kw_only=True)
class TransferLaw:
    """D_T = k D_F^alpha N^beta (Hernandez 2021, arXiv 2102.01293): the fresh data that pretraining stands in for.

    D_F are characters of the target text, N non-embedding parameters, D_T the further characters that the same model
    with new weights would need for the same loss. Fitted on Python; holds for little data (`in_low_data_regime`).
    """

    name: str
    scale: float
    """k."""
    data_exponent: float
    """alpha: the smaller, the nearer the two kinds of text."""
    size_exponent: float
    """beta."""
    fitted: FittedRange

    def transferred_characters(self, characters: float, parameters: float) -> float:
        """D_T, for `characters` of target text and `parameters` non-embedding weights."""
        refuse_unless_positive(characters=characters, parameters=parameters)
        return float(self.scale * characters**self.data_exponent * parameters**self.size_exponent)

    def effective_characters(self, characters: float, parameters: float) -> float:
        """D_F + D_T: characters that new weights would need for the loss of the fine-tuned ones."""
        return characters + self.transferred_characters(characters, parameters)

    def multiplier(self, characters: float, parameters: float) -> float:
        """How many times its size the target data is worth; above 1."""
        return self.effective_characters(characters, parameters) / characters


_PYTHON_RUNS = FittedRange(parameters=(3e5, 1e9), characters=(1e5, 1e10))
"""[M] figure 2 and 3: models of about 0.3M to 1B, 1e5 to 1e10 characters of Python."""

TEXT_TO_PYTHON = TransferLaw(
    name="text to Python", scale=1.9e4, data_exponent=0.18, size_exponent=0.38, fitted=_PYTHON_RUNS
)
"""A far domain."""
MIXED_TO_PYTHON = TransferLaw(
    name="half text, half other code, to Python",
    scale=2.1e5,
    data_exponent=0.096,
    size_exponent=0.38,
    fitted=_PYTHON_RUNS,
)
"""A near domain."""

LOW_DATA_SHARE = 0.10
"""Of `sufficient_characters`: up to here the transfer law holds (Hernandez 2021, section 2)."""
OSSIFIED_PARAMETERS = 1e6
OSSIFIED_CHARACTERS = 1e8
"""Beyond 1e8 characters a model of 1M parameters did better with new weights: pretraining had ossified it (Hernandez
2021). It was seen only where data is ample for the size; no law of it is published."""


def sufficient_characters(parameters: float) -> float:
    """D(N): characters with which `parameters` non-embedding weights do as well to 1 % as with endless ones.

    From Kaplan's L(N, D) = [(8.8e13/N)^(.076/.095) + 5.4e13/D]^.095 in tokens (arXiv 2001.08361, equation 1.5); that
    1 % is what Hernandez means by it [M].
    """
    refuse_unless_positive(parameters=parameters)
    from_size = (8.8e13 / parameters) ** (0.076 / 0.095)
    tokens = 5.4e13 / (from_size * (1.01 ** (1 / 0.095) - 1))
    return float(tokens * CHARACTERS_PER_TOKEN)


def in_low_data_regime(characters: float, parameters: float) -> bool:
    """Whether target data is so short for the size that the transfer law was fitted on such cases."""
    return characters <= LOW_DATA_SHARE * sufficient_characters(parameters)


@dataclass(frozen=True, kw_only=True)
class ForgettingLaw:
    """L_f = -c L_ft + s (Kalajdzievski 2024, arXiv 2401.05605): what the base unlearns as the new data is learnt.

    Nats per token. L_f is the loss against the base model's own predictions, L_ft that on the new data. Fitted on
    Llama-2-7B-chat with LoRA of rank 8 to 256; the line says nothing of other bases, only of how the two go together.
    """

    name: str
    slope: float
    """c: nats forgotten per nat learnt."""
    intercept: float
    """s."""
    r_squared: float

    def loss(self, finetuning_loss: float) -> float:
        """L_f, nats per token; not below 0."""
        return max(0.0, self.intercept - self.slope * finetuning_loss)

    def forgotten(self, *, learnt: float) -> float:
        """Nats per token lost on the base's own text when the loss on the new data falls by `learnt`."""
        return self.slope * max(0.0, learnt)


OPENORCA_FORGETTING = ForgettingLaw(name="OpenOrca", slope=1.7334, intercept=2.0481, r_squared=0.945)
NEWS_FORGETTING = ForgettingLaw(name="news", slope=1.0615, intercept=3.1285, r_squared=0.974)
FORGETTING_LAWS = (NEWS_FORGETTING, OPENORCA_FORGETTING)
"""The two data sets measured: between 1.1 and 1.7 nats forgotten for each learnt."""


@dataclass(frozen=True, kw_only=True)
class ReplayRun:
    """One continued pretraining with a share of old data in the mixture, and the losses it ended with."""

    name: str
    replayed: float
    """Share of the mixture that is the base's own kind of data."""
    old_loss_before: float
    old_loss: float
    """Nats per token on the base's own kind of data, before and after."""
    new_loss: float
    """On the new data, after."""
    source: str


_IBRAHIM = "Ibrahim 2024, arXiv 2403.08763: 405M, 300B tokens of the Pile, then 200B of German"
REPLAY_RUNS = (
    ReplayRun(
        name="ibrahim-strong-0", replayed=0.0, old_loss_before=2.17, old_loss=3.56, new_loss=1.11, source=_IBRAHIM
    ),
    ReplayRun(
        name="ibrahim-strong-25", replayed=0.25, old_loss_before=2.17, old_loss=2.33, new_loss=1.16, source=_IBRAHIM
    ),
)
"""Training both corpora from scratch ended at 2.26 and 1.25."""
TOLERANT_DOMAIN_SHARE = 0.924
"""Share of chemistry text in continuing Qwen1.5-1.8B on 10B tokens for a general loss 3 % higher (D-CPT 2024, arXiv
2406.01375, table 5): the one worked case of that law."""

_REPLAY_DECAY = -math.log((2.33 - 2.17) / (3.56 - 2.17)) / 0.25


def forgetting_left(replayed: float) -> float:
    """Share of the forgetting that is left when `replayed` of the mixture is old data: 1 at 0, 0.12 at 0.25.

    An exponential through the two `REPLAY_RUNS`: a rule of thumb for a strong shift, not a law.
    """
    return math.exp(-_REPLAY_DECAY * min(1.0, max(0.0, replayed)))


def replay_for(left: float) -> float:
    """Share of old data in the mixture that leaves `left` of the forgetting; at most half."""
    return min(0.5, -math.log(max(left, 1e-9)) / _REPLAY_DECAY) if left < 1 else 0.0


CRITICAL_MIXTURE_RANGE = FittedRange(parameters=(460e6, 3.1e9), tokens=(2e9, 2e10))
"""Sizes of the four fits; up to 20B tokens were trained, the lower end is a guess."""
_CRITICAL_MIXTURE = (
    (460e6, 0.22525, 0.26944, -0.48140),
    (940e6, 0.75206, 0.13720, -1.06582),
    (1.6e9, -2.36385, -0.15126, 1.59224),
    (3.1e9, -2.53682, -0.42071, 0.84375),
)
"""(parameters, a, s, b) of R = a T^s + b, T in units of 0.2B tokens (CMR, Gu 2024, arXiv 2407.17467)."""


def critical_mixture_share(parameters: float, tokens: float) -> float:
    """The largest share of domain text at which continued pretraining still keeps the general loss (CMR).

    R = a T^s + b over T = tokens / 0.2B, interpolated in the logarithm of all parameters; the ends hold beyond them.
    """
    refuse_unless_positive(parameters=parameters, tokens=tokens)
    shares = [scale * (tokens / 0.2e9) ** exponent + offset for _, scale, exponent, offset in _CRITICAL_MIXTURE]
    sizes = [math.log(size) for size, *_ in _CRITICAL_MIXTURE]
    at = math.log(parameters)
    above = min(max(bisect.bisect(sizes, at), 1), len(sizes) - 1)
    weight = min(1.0, max(0.0, (at - sizes[above - 1]) / (sizes[above] - sizes[above - 1])))
    share = (1 - weight) * shares[above - 1] + weight * shares[above]
    return float(min(1.0, max(0.0, share)))
