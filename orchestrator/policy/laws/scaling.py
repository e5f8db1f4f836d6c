"""Pretraining laws: the loss that so many parameters and tokens reach, and the best split of compute between them.

Comes in: parameters, tokens, FLOPs. Goes out: losses in nats per token, and an `Allocation`. Every law names what it
counts and what it was fitted on, so that callers can say when they extrapolate. Called by the advisor and by
`sizing` and `transfer`. [M] marks figures quoted from memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import SpecError
from orchestrator.quantities import human_count

FLOPS_PER_PARAMETER_TOKEN = 6.0
"""C = 6 N D: a multiplication and an addition forward, twice that backward (Kaplan 2020, section 2.1)."""
INFERENCE_FLOPS_PER_PARAMETER_TOKEN = 2.0
"""The forward third of it."""

Span = tuple[float, float]
_ANY: Span = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class FittedRange:
    """What a law was fitted on, smallest to largest. Unstated quantities were not limited, or are not known."""

    parameters: Span = _ANY
    tokens: Span = _ANY
    flops: Span = _ANY

    def outside(
        self,
        *,
        parameters: float | None = None,
        tokens: float | None = None,
        flops: float | None = None,
    ) -> tuple[str, ...]:
        """A sentence for each given quantity that the law was not fitted on; empty when all are inside."""
        given = (("parameters", parameters), ("tokens", tokens), ("FLOPs", flops))
        found = []
        for name, value in given:
            low, high = getattr(self, name.lower())
            if value is not None and not low <= value <= high:
                span = f"up to {_count(high)}" if low == 0 else f"{_count(low)} to {_count(high)}"
                found.append(f"extrapolated to {_count(value)} {name}: fitted on {span}")
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A split of training compute."""

    parameters: float
    tokens: float
    """Tokens trained on, repetitions counted."""

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 N D."""
        return FLOPS_PER_PARAMETER_TOKEN * self.parameters * self.tokens


@dataclass(frozen=True, kw_only=True)
class PretrainingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats per token of one pass over fresh data.

    N counts all parameters [M: Pearce & Song 2024 find that Hoffmann's counts include embeddings]. Tokens and nats are
    those of MassiveText and its 32k vocabulary: on other text the level shifts (`CORPUS_LOG_SD`), while
    differences between sizes and tokens carry over.
    """

    name: str
    irreducible: float
    """E, nats per token: what no model of this text can learn."""
    size_scale: float
    """A."""
    data_scale: float
    """B."""
    size_exponent: float
    """alpha."""
    data_exponent: float
    """beta."""
    fitted: FittedRange
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token of `parameters` weights after `tokens` fresh tokens. Raises SpecError unless both are > 0."""
        refuse_unless_positive(parameters=parameters, tokens=tokens)
        of_size = self.size_scale * parameters**-self.size_exponent
        of_data = self.data_scale * tokens**-self.data_exponent
        return float(self.irreducible + of_size + of_data)

    def tokens_for_loss(self, loss: float, parameters: float) -> float:
        """Tokens after which `parameters` weights reach `loss`; inf when they never do."""
        refuse_unless_positive(parameters=parameters)
        room = loss - self.irreducible - self.size_scale * parameters**-self.size_exponent
        return float((self.data_scale / room) ** (1 / self.data_exponent)) if room > 0 else math.inf

    @property
    def optimal_size_exponent(self) -> float:
        """N_opt grows as C to this power: beta / (alpha + beta)."""
        return self.data_exponent / (self.size_exponent + self.data_exponent)

    @property
    def _balance(self) -> float:
        """G of Hoffmann 2022, equation 4."""
        ratio = self.size_exponent * self.size_scale / (self.data_exponent * self.data_scale)
        return float(ratio ** (1 / (self.size_exponent + self.data_exponent)))

    def optimal(self, flops: float) -> Allocation:
        """The split of `flops` with the lowest loss. Raises SpecError unless they are above zero."""
        refuse_unless_positive(flops=flops)
        product = flops / FLOPS_PER_PARAMETER_TOKEN
        share = self.optimal_size_exponent
        return Allocation(
            parameters=self._balance * product**share,
            tokens=product ** (1 - share) / self._balance,
        )

    def optimal_tokens(self, parameters: float) -> float:
        """Tokens at which `parameters` weights are the optimal size for their compute."""
        refuse_unless_positive(parameters=parameters)
        product = (parameters / self._balance) ** (1 / self.optimal_size_exponent)
        return float(product / parameters)

    def cheapest(self, loss: float) -> Allocation:
        """The split that reaches `loss` with the fewest training FLOPs.

        Raises SpecError when the loss is at or below what the law holds for irreducible.
        """
        if not loss > self.irreducible:
            raise SpecError(
                "no model reaches this loss",
                got=f"{loss:g} nats per token",
                allowed=f"above {self.irreducible:g}, the irreducible loss by {self.name}",
                do="ask for a higher loss",
            )
        # On the optimal path B/D^beta = (alpha/beta) A/N^alpha, so both follow from the reducible loss.
        reducible = loss - self.irreducible
        total = self.size_exponent + self.data_exponent
        return Allocation(
            parameters=(self.size_scale * total / (self.data_exponent * reducible)) ** (1 / self.size_exponent),
            tokens=(self.data_scale * total / (self.size_exponent * reducible)) ** (1 / self.data_exponent),
        )


_CHINCHILLA_RUNS = FittedRange(parameters=(57e6, 16.2e9), tokens=(2.5e8, 3.2e11), flops=(1.4e18, 1.3e22))
"""Extent of the 245 runs of Hoffmann's figure 4, read from the points that Besiroglu 2024 published."""

REFIT = PretrainingLaw(
    name="Chinchilla (Besiroglu's refit)",
    irreducible=1.8172,
    size_scale=482.01,
    data_scale=2085.43,
    size_exponent=0.3478,
    data_exponent=0.3658,
    fitted=_CHINCHILLA_RUNS,
    source="Besiroglu 2024, arXiv 2404.10102: 240 runs of Hoffmann 2022; mean error on them 0.47 %",
)
"""Of the fits to these runs the only one whose optimum agrees with Hoffmann's other two approaches."""

CORPUS_LOG_SD = 0.18
"""Shift of all losses on another corpus and vocabulary, in the logarithm: -0.22 for the Pile, +0.14 for C4 on average
(tests/evidence/losses.csv). Two corpora only."""


@dataclass(frozen=True, kw_only=True)
class RepetitionLaw:
    """What repeated data and surplus parameters are still worth (Muennighoff 2023, arXiv 2305.16264).

    L(N, D, U) = E + A / N_eff^a + B / D_eff^b, with U unique of D tokens, N_eff and D_eff below. C4, GPT-2 tokens, all
    parameters. Its authors call absolute values unreliable (8 to 13 % off on their 296 runs), so `repeated_loss` takes
    only the equivalents from here. It knows no overfitting: 1.1B parameters on 120 epochs of 100M tokens diverged.
    Fading the surplus only as far as data repeats would follow those runs closer (0.7 instead of 1.2 %), but then many
    more parameters than were best in them look better still, so the published form stands.
    """

    irreducible: float = math.exp(0.6254804)
    size_scale: float = math.exp(6.255414)
    data_scale: float = math.exp(7.3049974)
    exponent: float = 0.3526596
    """Of size and of data alike."""
    repetitions_worth: float = 15.387756
    """R_D*: repetitions after which a share 1 - 1/e of all that repeating can give has been had."""
    surplus_worth: float = 5.309743
    """R_N*: the same for parameters beyond what the unique tokens call for."""
    fitted: FittedRange = FittedRange(parameters=(7e6, 8.7e9), tokens=(1e8, 9e11))
    """Extent of the runs in the authors' notebook."""

    def effective_tokens(self, tokens: float, unique: float) -> float:
        """Fresh tokens that teach as much as `tokens` drawn from `unique` ones; between the two."""
        refuse_unless_positive(tokens=tokens, unique_tokens=unique)
        return _worth(tokens, unique, self.repetitions_worth)

    def effective_parameters(self, parameters: float, unique: float) -> float:
        """Parameters that would do as well, were data not short: those beyond the optimum for `unique` fade."""
        refuse_unless_positive(parameters=parameters, unique_tokens=unique)
        return _worth(parameters, self.parameters_for(unique), self.surplus_worth)

    def loss(self, parameters: float, tokens: float, unique: float) -> float:
        """Nats per token by the law's own constants: for trends, not for levels."""
        size = self.effective_parameters(parameters, unique)
        data = self.effective_tokens(tokens, unique)
        return float(self.irreducible + self.size_scale * size**-self.exponent + self.data_scale * data**-self.exponent)

    def parameters_for(self, unique: float) -> float:
        """Optimal size for one pass over `unique` tokens: with equal exponents N = D G^2."""
        return float(unique * (self.size_scale / self.data_scale) ** (1 / self.exponent))


REPETITION = RepetitionLaw()


def effective_tokens(tokens: float, unique: float) -> float:
    """Fresh tokens worth as much as `tokens` drawn from `unique` ones: U + U R* (1 - e^(-R/R*)), R = D/U - 1."""
    return REPETITION.effective_tokens(tokens, unique)


def repeated_loss(parameters: float, tokens: float, unique: float, *, law: PretrainingLaw = REFIT) -> float:
    """Nats per token by `law` when no more than `unique` fresh tokens exist: at what N and D are then worth.

    Falls with N, D and U alike; equals `law.loss` as long as N suits U (20 tokens per parameter) and D <= U.
    """
    size = REPETITION.effective_parameters(parameters, unique)
    return law.loss(size, REPETITION.effective_tokens(tokens, unique))


def _worth(amount: float, unique: float, decay: float) -> float:
    """Amount at which the first `unique` count whole and each further one less: by 1/e after `decay` times `unique`."""
    if amount <= unique:
        return amount
    return unique * (1 - decay * math.expm1(-(amount / unique - 1) / decay))


def _count(value: float) -> str:
    return human_count(value) if value < 1e15 else f"{value:.2g}"


def refuse_unless_positive(**quantities: float) -> None:
    """Raises SpecError naming the first quantity that is not a finite number above zero."""
    for name, value in quantities.items():
        if not 0 < value < math.inf:
            raise SpecError(
                f"{name.replace('_', ' ')} must be a number above zero",
                got=f"{value:g}",
                allowed="above 0",
                do=f"check the number of {name.replace('_', ' ')}",
            )
