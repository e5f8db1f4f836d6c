"""What pretraining is worth to new data, and how much of what it taught old data keeps.

Comes in: data and model sizes, shares. Goes out: characters and shares, each with what it was fitted on.
The units are those of the papers, so they stand in the names. [M] marks figures quoted from memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.policy.laws.scaling import refuse_unless_positive

CHARACTERS_PER_TOKEN = 4.0
"""Of English under a vocabulary of 30k to 50k [M]; code has nearer 3. For turning tokens into Hernandez' characters."""

LORA_BITS_PER_PARAMETER = 2.0
"""What an adapter's weight can store ("LoRA Without Regret" 2025 [M]); with more data than that LoRA falls behind."""


@dataclass(frozen=True, kw_only=True)
class TransferLaw:
    """D_T = k D_F^alpha N^beta (Hernandez 2021, arXiv 2102.01293): the fresh data that pretraining stands in for.

    D_F are characters of the target text, N non-embedding parameters, D_T the further characters that the same model
    with new weights would need for the same loss. Fitted on 1e5 to 1e10 characters of Python and 0.3M to 1B parameters
    [M, figures 2 and 3]; holds up to a tenth of the characters with which the model does as well as with endless ones
    (section 2).
    """

    name: str
    scale: float
    """k."""
    data_exponent: float
    """alpha: the smaller, the nearer the two kinds of text."""
    size_exponent: float
    """beta."""

    def transferred_characters(self, characters: float, parameters: float) -> float:
        """D_T, for `characters` of target text and `parameters` non-embedding weights."""
        refuse_unless_positive(characters=characters, parameters=parameters)
        return float(self.scale * characters**self.data_exponent * parameters**self.size_exponent)


TEXT_TO_PYTHON = TransferLaw(name="text to Python", scale=1.9e4, data_exponent=0.18, size_exponent=0.38)
"""A far domain."""
MIXED_TO_PYTHON = TransferLaw(
    name="half text, half other code, to Python",
    scale=2.1e5,
    data_exponent=0.096,
    size_exponent=0.38,
)
"""A near domain."""

_REPLAY_DECAY = -math.log((2.33 - 2.17) / (3.56 - 2.17)) / 0.25


def forgetting_left(replayed: float) -> float:
    """Share of the forgetting that is left when `replayed` of the mixture is old data: 1 at 0, 0.12 at 0.25.

    An exponential through two runs, a rule of thumb for a strong shift and not a law: 405M parameters on 300B tokens of
    the Pile, then on 200B of German, took the loss on the Pile from 2.17 to 3.56 without old data and to 2.33 with a
    quarter of it (Ibrahim 2024, arXiv 2403.08763).
    """
    return math.exp(-_REPLAY_DECAY * min(1.0, max(0.0, replayed)))
