"""Bad steps: whether a step was one, and how far back to go after it. Pure; the loop and the driver act on it.

Bad is a loss or gradient that is not finite, one loss far above what recent steps and single samples explain, and a
loss that stays high. Large finite gradients are not: they are clipped, and what harm they do shows in the loss.

What others do. PaLM (Chowdhery et al. 2022, section 5.1) met about 20 spikes, each time went back some 100 steps and
skipped 200 to 500 batches; the same batches did no harm to other weights. OPT-175B (Zhang et al. 2022) went back and
lowered the learning rate, which Wortsman et al. 2023 find behind most instabilities. Lightning's `SpikeDetection` also
skips the batch before the spike, which may have caused it. MosaicML's `KillLossSpike` waits for five losses in a row
above twice the recent mean. ZClip (Kumar et al. 2025) compares gradients with their recent mean and deviation; here
quantiles are compared, which the outliers that are sought do not move.

Measured on 44 trainings of small models on a CPU (30,605 steps; pretraining, full, LoRA, head; batches of 1 to 32): no
healthy step was judged bad. Six deviations (MAD) above the median would have stopped 15 of the trainings, this rule
without its allowance for strange samples 7, twice the mean of ten steps 2,335 steps. A batch of corrupt data is found
once the model is well above chance; before, one such step did harm below 0.1 nats (30 of 30). Flips of a weight's
highest exponent bit were found in 11 of the 12 cases that did more, flips of the next four bits did less (72 of 72).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import DivergedError

WINDOW_STEPS = 128
"""A loss is compared with those of so many steps before it."""
RECENT_STEPS = 16
"""Whether the loss stays high is judged by so many newest steps."""
LEAST_STEPS = 32
"""No loss is compared with fewer: quantiles of a few, from the steep start of a training, say little."""

_SPREADS = 6.0
"""A spike is so many times as far above the median as 19 of 20 losses stay: 10 standard deviations of a normal
distribution; by chance 1 step in 2 million where losses have an exponential tail."""
_LEAST_RISE = 0.25
"""A spike exceeds the median by this share of it at least: the loss of a large batch hardly varies."""
_STRANGE_SAMPLES, _STRANGE_NATS = 2, 10.0
"""So many samples of one batch, so much worse than their peers, make no spike: a wrong label or text in another
alphabet. Confident mistakes of fine-tuned classifiers cost 5 to 9 nats (measured on small models)."""
_LASTING_RISE = 0.05
"""Losses that stay high exceed the earlier median by this share of it at least."""
_USUAL_SHARE = 0.95
"""Losses above so large a share of the earlier ones are high. By chance more than half of 16 are so in 1 of 50 million
steps, whatever the distribution of losses that do not depend on each other."""

REWINDS_COUNT_STEPS = 1000
"""Rewinds longer ago say nothing of a divergence now. A guess: 20 spikes of PaLM were about 10,000 steps apart."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a step's figures say."""

    ok: bool
    reason: str
    """Why the step is bad; empty when it is not."""
    first_step: int
    """The earliest step whose batch may be to blame; the step itself when it is good."""


class DivergenceGuard:
    """Judges every step by the window of good steps before it, which is its whole state."""

    def __init__(self, *, samples_per_step: int, spikes: bool = True) -> None:
        self._spikes = spikes
        self._explained_nats = _STRANGE_SAMPLES * _STRANGE_NATS / samples_per_step
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS + RECENT_STEPS - 1)
        self._left_out = 0
        """Newest steps in a row without a gradient norm."""

    def judge(self, step: int, *, loss: float, grad_norm: float | None) -> Verdict:
        """Whether a step (counted from 0) was good, by its mean loss in nats and its gradient norm before clipping.

        The norm is None where it is not known, as in steps that fp16's loss scaler leaves out to try a smaller scale.
        Call it once a step, in order, before anything of the step is logged or saved; every rank that is given the same
        figures comes to the same verdict. Only good steps enter the window.
        """
        verdict = self._verdict(step, loss, grad_norm)
        if verdict.ok:
            self._losses.append(loss)
            self._left_out = self._left_out + 1 if grad_norm is None else 0
        return verdict

    def state(self) -> dict[str, Any]:
        """The window as plain JSON values, for the checkpoint."""
        return {"losses": list(self._losses), "left_out": self._left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a window; from there on it judges as the guard that gave it. An empty mapping starts anew."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self._left_out = state.get("left_out", 0)

    def _verdict(self, step: int, loss: float, grad_norm: float | None) -> Verdict:
        before = max(0, step - 1)  # the update of the step before may have broken the weights
        if not math.isfinite(loss):
            return Verdict(ok=False, reason=f"the loss is {loss}", first_step=before)
        # Of a NaN too DeepSpeed 0.19.8 says inf at ZeRO stages 1 to 3, which leave the weights alone; at stage 0 those
        # are broken. Some of its helpers mark such a norm by -1.
        if grad_norm is not None and not 0 <= grad_norm < math.inf:
            return self._not_finite(step)
        if self._spikes:
            reason = self._spike(loss)
            if reason is not None:
                return Verdict(ok=False, reason=reason, first_step=before)
            lasting = self._lasting(step, loss)
            if lasting is not None:
                return lasting
        return Verdict(ok=True, reason="", first_step=step)

    def _not_finite(self, step: int) -> Verdict:
        """One step blames its batch. Steps in a row had the same weights, so the update before them is to blame too."""
        if not self._left_out:
            return Verdict(ok=False, reason="the gradient is not finite", first_step=step)
        return Verdict(
            ok=False,
            reason="the gradient is not finite at the smallest loss scale of fp16, nor was it at larger ones in "
            f"{self._left_out} step{'s' if self._left_out > 1 else ''} before",
            first_step=max(0, step - self._left_out - 1),
        )

    def _spike(self, loss: float) -> str | None:
        window = sorted(list(self._losses)[-WINDOW_STEPS:])
        if len(window) < LEAST_STEPS:
            return None
        median, usual = _quantile(window, 0.5), _quantile(window, _USUAL_SHARE)
        limit = median + max(_SPREADS * (usual - median), _LEAST_RISE * median, self._explained_nats)
        if loss <= limit:
            return None
        return (
            f"the loss jumped to {loss:.4g}: of the {len(window)} steps before, half were below {median:.4g} and 19 of "
            f"20 below {usual:.4g}, which explains up to {limit:.4g}"
        )

    def _lasting(self, step: int, loss: float) -> Verdict | None:
        losses = [*self._losses, loss]
        recent, window = losses[-RECENT_STEPS:], sorted(losses[:-RECENT_STEPS])
        if len(window) < LEAST_STEPS:
            return None
        median = _quantile(window, 0.5)
        limit = max(_quantile(window, _USUAL_SHARE), (1 + _LASTING_RISE) * median)
        high = [place for place, each in enumerate(recent) if each > limit]
        if len(high) <= RECENT_STEPS // 2:
            return None
        return Verdict(
            ok=False,
            reason=f"the loss stays high: {len(high)} of the last {RECENT_STEPS} steps above {limit:.4g}, which 19 of "
            f"20 steps before stayed below; their median was {median:.4g}",
            first_step=max(0, step - RECENT_STEPS + high[0]),
        )


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


# -- what to do about one --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """A bad step and what was done about it. A run keeps its rewinds beside its checkpoints, which know nothing later.

    Batches are numbered in the endless stream (`batches.batch_number`), steps are optimizer steps; both count from 0.
    """

    step: int
    """The bad step."""
    first_step: int
    """The earliest step whose batch may be to blame."""
    to_step: int
    """Steps done by the checkpoint from which the run went on."""
    skipped: tuple[int, ...]
    """Batches left out from then on."""
    samples: tuple[int, ...]
    """Numbers of the skipped training samples, for whoever looks into the data."""
    reason: str
    """What was wrong with the step."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Rewind:
        """The rewind that `to_dict` gave, also after JSON."""
        return cls(**{**value, "skipped": tuple(value["skipped"]), "samples": tuple(value["samples"])})


@dataclass(frozen=True, kw_only=True)
class RewindDecision:
    """Go back and skip, or give up; and why."""

    rewind: bool
    to_step: int
    """Steps done by the checkpoint to go back to; 0 is the start of the run."""
    reason: str


def skipped_batches(rewinds: Sequence[Rewind]) -> tuple[int, ...]:
    """Every batch that is left out, in order."""
    return tuple(sorted({number for rewind in rewinds for number in rewind.skipped}))


def decide_rewind(
    verdict: Verdict, step: int, *, earlier: Sequence[Rewind], checkpoints: Sequence[int], max_rewinds: int
) -> RewindDecision:
    """How far to go back after a bad step, by the run's earlier rewinds and the steps of its good checkpoints.

    First to the newest checkpoint from before the step to blame. Bad at the same place with its batches skipped, the
    fault is in the weights: one checkpoint further. After that, without an older checkpoint, and after `max_rewinds`
    (`training.bad_steps.max_rewinds`) within `REWINDS_COUNT_STEPS`, the training diverges.
    """
    assert not verdict.ok, "only a bad step is a reason to go back"
    starts = sorted({0, *checkpoints})
    # Everything up to an earlier bad step is repeated bit for bit, so only a step after its skipped ones is news.
    same_place = [rewind for rewind in earlier if rewind.first_step <= step and verdict.first_step <= rewind.step]
    recent = [rewind for rewind in earlier if step - rewind.step < REWINDS_COUNT_STEPS]
    to_step = max(start for start in starts if start <= verdict.first_step)
    if len(recent) >= max_rewinds:
        return _give_up(
            f"step {step} was bad, and training.bad_steps.max_rewinds allows {max_rewinds} within "
            f"{REWINDS_COUNT_STEPS} steps"
        )
    if len(same_place) > 1:
        return _give_up(f"step {step} was bad again after going back one checkpoint further")
    if same_place:
        older = [start for start in starts if start < min(to_step, same_place[0].to_step)]
        if not older:
            return _give_up(f"step {step} was bad again with its batches skipped, and there is no older checkpoint")
        return RewindDecision(
            rewind=True,
            to_step=older[-1],
            reason=f"bad again with other samples, so the weights of step {same_place[0].to_step} are to blame: back "
            f"to step {older[-1]}",
        )
    return RewindDecision(
        rewind=True, to_step=to_step, reason=f"back to step {to_step}; the samples that may be to blame are skipped"
    )


def diverged(
    verdict: Verdict, step: int, *, decision: RewindDecision, earlier: Sequence[Rewind], precision: str
) -> DivergedError:
    """What a user is told when no further rewind is tried; `precision` is that of the training."""
    tried = "; ".join(
        f"at step {rewind.step} back to {rewind.to_step} without samples {_some(rewind.samples)}" for rewind in earlier
    )
    return DivergedError(
        f"the training diverges: {decision.reason}",
        got=f"step {step}: {verdict.reason}" + (f"; tried: {tried}" if tried else ""),
        do=("set training.precision=bf16 or fp32, whose range is wider than fp16's, " if precision == "fp16" else "")
        + "lower training.learning_rate, raise training.warmup_fraction or set training.gradient_clip=1.0, and look "
        "at those samples of the training data; training.bad_steps.spikes=off accepts high losses that are finite",
    )


def _give_up(reason: str) -> RewindDecision:
    return RewindDecision(rewind=False, to_step=0, reason=reason)


def _some(samples: Sequence[int]) -> str:
    shown = ", ".join(map(str, samples[:8]))
    return shown if len(samples) <= 8 else f"{shown} and {len(samples) - 8} more"
