"""One layout for every size of an elastic run, and the sizes it may take.

Comes in: a spec with a range of workers, and the `Site` of each size. Goes out: a `CommonLayout`. Called by `plan`.

Dropout masks are drawn for each micro-batch by its index in the global batch, so the micro-batch is chosen once for the
whole range, and with it stage, offload and recomputation, which the smallest size needs; only the accumulation differs.
The smallest size is always one at which something fits, since that is how far the run is meant to shrink; the largest
that fits is kept too. Sizes between them are left out where a micro-batch that suits them as well would be so small
that it costs more than they are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.planning.fitting import (
    SAME_TIME,
    Estimate,
    fits,
    largest_micro_batch,
    layout_name,
    layout_options,
    least_memory,
    needs,
    why_checkpointing,
)
from orchestrator.planning.memory import Layout
from orchestrator.planning.placement import ChosenPrecision, Site
from orchestrator.planning.run_plan import Kept
from orchestrator.quantities import divisors

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

PASS_OVERHEAD_TOKENS = {"cpu": 64, "cuda": 256}
"""What a forward and backward pass costs besides its tokens, in tokens. CPU: GPT-2 of 4 layers, 128 and 512 wide, with
32 to 256 tokens a pass and one thread of a busy machine, measured 65 and 74. GPU, not measured: a pass reads every
weight once, in the time of 156 tokens (A100) or 295 (H100) by their data sheets' FLOP/s over bytes/s."""

WORTH_A_WORD = 1.1
"""How much faster a narrower range must train to be named: a judgement."""

MOST_LISTED = 20
"""Sizes that a reason lists: a guess; a batch of 720,720 splits over 240."""

SitePace = Callable[[Site, Layout], float]
"""Hours that the steps of a training take on a site in a layout."""


@dataclass(frozen=True, kw_only=True)
class CommonLayout:
    """A layout that a run keeps while its number of workers changes."""

    layout: Layout
    """That of the largest size; others differ in `workers` alone."""
    sizes: tuple[int, ...]
    """The numbers of workers that it suits, the smallest first."""
    reasons: tuple[str, ...]

    def at(self, workers: int) -> Layout:
        """The layout with so many workers."""
        return replace(self.layout, workers=workers)


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A layout with the sizes at which it surely fits, and what it is worth."""

    layout: Layout
    sizes: tuple[int, ...]
    worth: float
    hours: float
    """With the largest of the sizes."""


def choose_common_layout(
    spec: RunSpec, sites: Mapping[int, Site], precision: ChosenPrecision, *, estimate: Estimate, pace: SitePace
) -> CommonLayout:
    """Of the layouts that fit at the smallest size at which any does, the one that trains fastest over all numbers of
    workers that a run may find room for, each as likely (a guess).

    Where there is room for a number that is no size of the layout, the next smaller size trains. Of layouts that are
    about as fast, the simplest with the largest micro-batch is taken.
    """
    largest = max(sites)
    options = layout_options(spec, sites[largest], precision)
    candidates = [one for option in options for one in _candidates(spec, sites, option, estimate, pace)]
    if not candidates:
        layout, why = least_memory(options, sites[largest], estimate)
        sizes = tuple(sorted(sites))
        why_recompute = why_checkpointing(spec, sites[largest], layout, estimate)
        return CommonLayout(
            layout=layout, sizes=sizes, reasons=(why, why_recompute, _why_micro_batch(spec, layout, sizes))
        )
    least = min(one.sizes[0] for one in candidates)
    far_enough = [one for one in candidates if one.sizes[0] == least]
    best = max(one.worth for one in far_enough)
    chosen = next(one for one in far_enough if one.worth * SAME_TIME >= best)
    layout = replace(chosen.layout, workers=chosen.sizes[-1])
    return CommonLayout(
        layout=layout,
        sizes=chosen.sizes,
        reasons=(
            *_why_sizes(spec, sites, chosen, estimate),
            f"{needs(replace(layout, workers=least), sites[least], estimate)} with "
            f"{_workers(least)}; it is that of every size"
            f"{_why_not_faster(chosen, candidates)}",
            why_checkpointing(spec, sites[layout.workers], layout, estimate),
            _why_micro_batch(spec, layout, chosen.sizes),
        ),
    )


def settle(spec: RunSpec, kept: Kept) -> RunSpec:
    """The spec with what it leaves open set to what the run began with, and the micro-batch to the run's.

    Where no size splits into such micro-batches the largest divisor is taken with which one does. A ZeRO stage that the
    spec sets is taken, since any stage's checkpoints are read: the sums behind a step are taken in another order, no
    more. Then offload, which stages do not share, is left as open as the spec leaves it.
    """
    asked, training, resources = spec.deepspeed, spec.training, spec.resources
    same_stage = asked.zero_stage in ("auto", kept.zero_stage)
    open_recompute = training.activation_checkpointing == "auto"
    changed = {
        "deepspeed": asked.model_copy(
            update={"zero_stage": kept.zero_stage if same_stage else asked.zero_stage}
            | ({"offload": kept.offload} if same_stage and asked.offload == "auto" else {})
        ),
        "training": training.model_copy(
            update={"micro_batch": _kept_micro_batch(spec, kept.micro_batch)}
            | ({"precision": kept.precision} if training.precision == "auto" else {})
            | ({"activation_checkpointing": kept.activation_checkpointing} if open_recompute else {})
        ),
        "resources": resources.model_copy(
            update={"gpus_per_worker": kept.gpus_per_worker} if resources.gpus_per_worker == "auto" else {}
        ),
    }
    return spec.model_copy(update=changed)


def _kept_micro_batch(spec: RunSpec, kept: int) -> int:
    workers, batch = spec.resources.workers, spec.training.global_batch
    if workers == "auto":
        return kept
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    smaller = (size for size in reversed(divisors(kept)) if batch % size == 0)
    return next(size for size in smaller if divisors(batch // size, least=least, most=most))


def _candidates(
    spec: RunSpec, sites: Mapping[int, Site], option: Layout, estimate: Estimate, pace: SitePace
) -> Iterator[_Candidate]:
    """One for each micro-batch that suits the smallest and the largest size at which the option fits."""
    fitting: dict[int, int] = {}
    for size, site in sites.items():
        fit = largest_micro_batch(spec, site, replace(option, workers=size), estimate)
        if fit is not None:
            fitting[size] = fit.micro_batch
    batch = spec.training.global_batch
    hours = {size: pace(sites[size], replace(option, workers=size)) for size in fitting}
    set_size = spec.training.micro_batch
    tried = divisors(batch, most=max(fitting.values(), default=0))[::-1] if set_size == "auto" else [set_size]
    for micro_batch in tried:
        sizes = tuple(
            n for n, most in sorted(fitting.items()) if micro_batch <= most and batch % (n * micro_batch) == 0
        )
        if sizes and sizes[0] == min(fitting) and sizes[-1] == max(fitting):
            layout = replace(option, micro_batch=micro_batch)
            busy = layout.tokens / (layout.tokens + PASS_OVERHEAD_TOKENS[layout.device])
            yield _Candidate(
                layout=layout, sizes=sizes, worth=busy * _speed(spec, sizes, hours), hours=hours[sizes[-1]]
            )


def _speed(spec: RunSpec, sizes: tuple[int, ...], hours: Mapping[int, float]) -> float:
    """Trainings an hour, summed over every number of workers that there may be room for."""
    asked = spec.resources.workers
    assert isinstance(asked, tuple)  # only ranges come here
    total = best = 0.0
    for size, larger in zip(sizes, (*sizes[1:], asked[1] + 1), strict=True):
        best = max(best, 1 / hours[size])
        total += best * (larger - size)  # the room for which this is the largest size
    return total


# -- why -------------------------------------------------------------------------------------------------------------


def _why_sizes(spec: RunSpec, sites: Mapping[int, Site], chosen: _Candidate, estimate: Estimate) -> tuple[str, ...]:
    asked = spec.resources.workers
    assert isinstance(asked, tuple)
    layout, batch = chosen.layout, spec.training.global_batch
    left_out = []
    for size in (n for n in sorted(sites) if n not in chosen.sizes):
        here = replace(layout, workers=size)
        if batch % (size * layout.micro_batch) == 0 and not fits(estimate(here), sites[size]):
            left_out.append(f"{size} is left out, since {needs(here, sites[size], estimate)}")
        else:
            left_out.append(
                f"{size} is left out, since it would need a smaller micro-batch than {layout.micro_batch} at every size"
            )
    odd = asked[1] - asked[0] + 1 - len(sites)
    if odd:
        into = "" if spec.training.micro_batch == "auto" else f" into micro-batches of {layout.micro_batch}"
        left_out.append(f"{odd} other{'s do' if odd > 1 else ' does'} not split the batch of {batch}{into}")
    why = f"sizes: {_listed(chosen.sizes)}, of resources.workers: [{asked[0]}, {asked[1]}]"
    return ("; ".join([why, *left_out]),)


def _why_not_faster(chosen: _Candidate, candidates: list[_Candidate]) -> str:
    """What a larger smallest size would gain, where that is worth a word."""
    others = [one for one in candidates if one.sizes[0] > chosen.sizes[0] and one.sizes[-1] == chosen.sizes[-1]]
    if not others:
        return ""
    most = min(one.hours for one in others)
    faster = min((one for one in others if one.hours <= SAME_TIME * most), key=lambda one: one.sizes[0])
    if chosen.hours < WORTH_A_WORD * most:
        return ""
    return (
        f"; with no fewer than {faster.sizes[0]} workers, {layout_name(faster.layout)} would fit, and "
        f"{_workers(faster.sizes[-1])} would train {chosen.hours / faster.hours:.2g} x as fast"
    )


def _why_micro_batch(spec: RunSpec, layout: Layout, sizes: tuple[int, ...]) -> str:
    batch = spec.training.global_batch
    passes = [f"{batch // size // layout.micro_batch} with {_workers(size)}" for size in sizes]
    why = "as set" if spec.training.micro_batch != "auto" else "the best over all sizes"
    return (
        f"micro_batch: {layout.micro_batch}, {why}, and the same at each, because dropout masks are drawn for each "
        f"micro-batch; accumulation: {_listed(passes)}"
    )


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def _listed(items: tuple[int, ...] | list[str]) -> str:
    words = [str(item) for item in items]
    if len(words) > MOST_LISTED:
        words = [*words[: MOST_LISTED // 2], f"{len(words) - MOST_LISTED} more", *words[-MOST_LISTED // 2 :]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
