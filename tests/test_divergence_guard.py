from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import DivergedError
from orchestrator.samples.batches import batch_number
from orchestrator.worker.divergence_guard import (
    LEAST_STEPS,
    RECENT_STEPS,
    REWINDS_COUNT_STEPS,
    WINDOW_STEPS,
    DivergenceGuard,
    Rewind,
    RewindDecision,
    Verdict,
    decide_rewind,
    diverged,
    skipped_batches,
)


def fed(losses: Sequence[float], *, samples_per_step: int = 64, **options: Any) -> DivergenceGuard:
    """A guard that has seen these losses and found nothing wrong with them."""
    guard = DivergenceGuard(samples_per_step=samples_per_step, **options)
    for step, loss in enumerate(losses):
        verdict = guard.judge(step, loss=loss, grad_norm=1.0)
        assert verdict.ok, f"step {step}: {verdict.reason}"
    return guard


def noise(steps: int = 400, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=steps)


# -- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"spikes": False}])
def test_a_loss_that_is_not_finite_is_bad_from_the_first_step_on(loss: float, options: dict[str, bool]) -> None:
    verdict = DivergenceGuard(samples_per_step=8, **options).judge(0, loss=loss, grad_norm=1.0)
    assert not verdict.ok
    assert "loss" in verdict.reason
    assert verdict.first_step == 0


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_gradient_that_is_not_finite_is_bad(norm: float) -> None:
    assert DivergenceGuard(samples_per_step=8).judge(5, loss=2.0, grad_norm=norm) == Verdict(
        ok=False, reason="the gradient is not finite", first_step=5
    )


def test_steps_that_a_loss_scaler_left_out_in_vain_blame_the_update_before_them() -> None:
    guard = fed([2.0] * 10)
    assert all(guard.judge(step, loss=2.0, grad_norm=None).ok for step in range(10, 13))
    resumed = DivergenceGuard(samples_per_step=64)
    resumed.restore(json.loads(json.dumps(guard.state())))
    for one in (guard, resumed):
        verdict = one.judge(13, loss=2.0, grad_norm=math.inf)
        assert (verdict.ok, verdict.first_step) == (False, 9)
        assert "smallest loss scale of fp16, nor was it at larger ones in 3 steps before" in verdict.reason


def test_a_loss_scaler_that_found_its_scale_leaves_no_trace() -> None:
    guard = fed([2.0] * 10)
    guard.judge(10, loss=2.0, grad_norm=None)
    guard.judge(11, loss=2.0, grad_norm=1.0)
    assert guard.judge(12, loss=2.0, grad_norm=math.inf).first_step == 12


def test_the_batch_before_a_broken_loss_may_be_to_blame_and_that_before_a_broken_gradient_not() -> None:
    assert DivergenceGuard(samples_per_step=8).judge(7, loss=math.nan, grad_norm=math.nan).first_step == 6
    assert DivergenceGuard(samples_per_step=8).judge(7, loss=2.0, grad_norm=math.nan).first_step == 7


def test_a_huge_finite_gradient_and_an_unknown_one_are_no_bad_steps() -> None:
    assert fed([2.0] * 100).judge(100, loss=2.0, grad_norm=1e9).ok
    assert fed([2.0] * 100).judge(100, loss=2.0, grad_norm=None).ok


_NORMS = """
import json, os
os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
import torch, torch.distributed as dist, deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
found = []
for stage in (1, 2, 3):
    model = torch.nn.Linear(4, 4)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), dist_init_required=False,
        config={
            "train_batch_size": 2, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        },
    )
    outputs = engine(torch.ones(2, 4))
    outputs.register_hook(lambda gradient: gradient * float("nan"))
    engine.backward(outputs.sum())
    engine.step()
    found.append(float(engine.get_global_grad_norm()))
    engine.destroy()
print("NORMS", json.dumps(found))
"""


@pytest.mark.slow
def test_what_deepspeed_says_of_a_broken_gradient_is_judged_bad_at_every_zero_stage() -> None:
    done = subprocess.run([sys.executable, "-c", _NORMS], capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("NORMS")]
    assert lines, done.stderr
    norms = json.loads(lines[0].removeprefix("NORMS"))
    assert len(norms) == 3
    assert not any(DivergenceGuard(samples_per_step=2).judge(0, loss=1.0, grad_norm=norm).ok for norm in norms), norms


# -- spikes: healthy series ------------------------------------------------------------------------------------------


def exponential(draws: np.random.Generator, steps: int) -> np.ndarray:
    return draws.exponential(0.3, steps)


def two_heaps(draws: np.random.Generator, steps: int) -> np.ndarray:
    """Mostly learnt, now and then a sample that is not: batches of one or two."""
    return np.where(draws.random(steps) < 0.1, draws.uniform(0.5, 3.0, steps), 0.01)


def steep_start(draws: np.random.Generator, steps: int) -> np.ndarray:
    return 2.5 + 7.0 * np.exp(-np.arange(steps) / 40) + 0.05 * draws.normal(size=steps)


def large_batch(draws: np.random.Generator, steps: int) -> np.ndarray:
    """Hardly any noise on a slow decline, with a passing hump of 2 %."""
    place = np.arange(steps)
    hump = 0.05 * np.exp(-(((place - 1500) / 60) ** 2))
    return 2.4 + 2.0 / np.sqrt(1 + place / 20) + hump + 0.004 * draws.normal(size=steps)


def memorised(draws: np.random.Generator, steps: int) -> np.ndarray:
    """Next to nothing, but for one wrong label in batches of 16 once in 200 steps."""
    return np.where(draws.random(steps) < 0.005, 9.0 / 16, draws.lognormal(-6, 1, steps))


@pytest.mark.parametrize(
    ("series", "samples_per_step"),
    [(exponential, 64), (two_heaps, 2), (steep_start, 64), (large_batch, 1024), (memorised, 16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_healthy_losses_of_any_shape_are_left_alone(
    series: Callable[[np.random.Generator, int], np.ndarray], samples_per_step: int
) -> None:
    for seed in range(3):
        losses = series(np.random.default_rng(seed), 2000).tolist()
        guard = fed(losses, samples_per_step=samples_per_step)
        assert guard.judge(2000, loss=losses[-1], grad_norm=1.0).ok


def test_one_or_two_strange_samples_in_a_small_batch_are_no_spike() -> None:
    learnt = [0.001] * 200
    assert fed(learnt, samples_per_step=16).judge(200, loss=2 * 9.0 / 16, grad_norm=50.0).ok
    assert not fed(learnt, samples_per_step=16).judge(200, loss=9.0, grad_norm=50.0).ok, "a whole batch of them"


def test_a_jump_by_a_tenth_is_no_spike_however_quiet_the_losses_were() -> None:
    assert fed([2.4, 2.401] * 100, samples_per_step=4096).judge(200, loss=2.64, grad_norm=1.0).ok
    assert not fed([2.4, 2.401] * 100, samples_per_step=4096).judge(200, loss=3.2, grad_norm=1.0).ok


def test_the_first_steps_are_not_compared() -> None:
    assert fed([3.0] * (LEAST_STEPS - 1)).judge(LEAST_STEPS - 1, loss=30.0, grad_norm=1.0).ok
    assert not fed([3.0] * LEAST_STEPS).judge(LEAST_STEPS, loss=30.0, grad_norm=1.0).ok


# -- spikes: faults --------------------------------------------------------------------------------------------------


def test_a_spike_is_bad_and_says_what_would_have_been_usual() -> None:
    verdict = fed((3.0 + 0.05 * noise()).tolist()).judge(400, loss=6.0, grad_norm=1.0)
    assert not verdict.ok
    assert verdict.first_step == 399, "the update before may have caused it"
    assert "jumped to 6" in verdict.reason
    assert "128 steps before" in verdict.reason


def test_spikes_can_be_turned_off() -> None:
    assert fed([3.0] * 200, spikes=False).judge(200, loss=300.0, grad_norm=1.0).ok


def test_a_loss_that_stays_high_is_bad_from_where_it_rose() -> None:
    guard = fed([2.8, 3.0, 3.1, 3.2] * 100, samples_per_step=4)  # a batch so small that a jump of 1 is none
    for step in range(400, 400 + RECENT_STEPS):
        verdict = guard.judge(step, loss=4.0, grad_norm=1.0)
        if not verdict.ok:
            break
    assert step - 400 == RECENT_STEPS // 2, "more than half of the recent steps"
    assert "stays high" in verdict.reason
    assert verdict.first_step == 399


def test_a_bad_step_leaves_no_trace_in_the_window() -> None:
    guard = fed([3.0] * 200)
    before = guard.state()
    assert not guard.judge(200, loss=30.0, grad_norm=1.0).ok
    assert guard.state() == before


@settings(max_examples=12)
@given(st.integers(0, 500), st.integers(0, 5))
def test_a_resumed_guard_judges_as_the_one_that_went_on(stopped_at: int, seed: int) -> None:
    losses = [*np.abs(1.0 + 0.5 * noise(500, seed=seed)).tolist(), 40.0]
    losses[480:480] = [4.0] * 12
    whole = DivergenceGuard(samples_per_step=8)
    verdicts = [whole.judge(step, loss=loss, grad_norm=1.0) for step, loss in enumerate(losses)]
    first = DivergenceGuard(samples_per_step=8)
    for step in range(stopped_at):
        first.judge(step, loss=losses[step], grad_norm=1.0)
    resumed = DivergenceGuard(samples_per_step=8)
    resumed.restore(json.loads(json.dumps(first.state())))
    again = [resumed.judge(step, loss=losses[step], grad_norm=1.0) for step in range(stopped_at, len(losses))]
    assert again == verdicts[stopped_at:]
    assert not verdicts[-1].ok


def test_a_checkpoint_without_a_window_starts_a_new_one() -> None:
    guard = fed([3.0] * 200)
    guard.restore({})
    assert guard.state() == DivergenceGuard(samples_per_step=64).state()


def test_judging_costs_less_than_a_thousandth_of_a_step_of_100_ms() -> None:
    guard = fed((3.0 + 0.05 * noise()).tolist())
    seconds = []
    for step in range(400, 600):
        start = time.perf_counter()
        guard.judge(step, loss=3.0, grad_norm=1.0)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-4
    assert len(guard.state()["losses"]) == WINDOW_STEPS + RECENT_STEPS - 1


# -- spikes: real faults in a real training --------------------------------------------------------------------------


SAMPLES, LENGTH, SYMBOLS = 32, 16, 64


class NextSymbol(torch.nn.Module):
    """A small language model: embeddings, a recurrent layer, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(SYMBOLS, 32)
        self.hidden = torch.nn.GRU(32, 32, batch_first=True)
        self.norm = torch.nn.LayerNorm(32)
        self.head = torch.nn.Linear(32, SYMBOLS)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(symbols))[0]))


@dataclass(kw_only=True)
class Training:
    model: NextSymbol
    optimizer: torch.optim.Optimizer
    guard: DivergenceGuard
    draws: np.random.Generator
    step: int = 0

    def batch(self) -> torch.Tensor:
        """Counting up by one to four, with one symbol in ten replaced."""
        start = self.draws.integers(0, SYMBOLS, (SAMPLES, 1))
        stride = self.draws.integers(1, 5, (SAMPLES, 1))
        symbols = (start + stride * np.arange(LENGTH + 1)) % SYMBOLS
        strange = self.draws.random(symbols.shape) < 0.1
        return torch.from_numpy(np.where(strange, self.draws.integers(0, SYMBOLS, symbols.shape), symbols))

    def take_step(self, symbols: torch.Tensor, *, rate: float = 3e-3, loss_factor: float = 1.0) -> Verdict:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logits = self.model(symbols[:, :-1])
        loss = loss_factor * F.cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return self.guard.judge(self.step - 1, loss=loss.item(), grad_norm=norm.item())


@pytest.fixture(scope="module")
def healthy() -> Training:
    """A training of 300 steps, from its steep start, in which no step was bad."""
    torch.manual_seed(0)
    model = NextSymbol()
    training = Training(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        guard=DivergenceGuard(samples_per_step=SAMPLES),
        draws=np.random.default_rng(0),
    )
    for _ in range(300):
        verdict = training.take_step(training.batch())
        assert verdict.ok, verdict.reason
    assert training.guard.state()["losses"][-1] < 2.0, "it has learnt: ln(64) is 4.2"
    return training


@pytest.fixture
def training(healthy: Training) -> Training:
    return copy.deepcopy(healthy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrupt",
    [
        lambda symbols: torch.randint(SYMBOLS, symbols.shape, generator=torch.Generator().manual_seed(1)),
        lambda symbols: torch.full_like(symbols, 7),
        lambda symbols: symbols.flip(1),
    ],
    ids=["random", "one symbol", "backwards"],
)
def test_a_batch_of_corrupt_data_is_a_bad_step(
    training: Training, corrupt: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    step = training.step
    verdict = training.take_step(corrupt(training.batch()))
    assert not verdict.ok
    assert verdict.first_step == step - 1


@pytest.mark.slow
def test_losses_times_ten_are_a_bad_step(training: Training) -> None:
    assert not training.take_step(training.batch(), loss_factor=10.0).ok


@pytest.mark.slow
def test_a_learning_rate_a_thousand_times_too_high_for_one_step_is_a_bad_step(training: Training) -> None:
    step = training.step
    assert training.take_step(training.batch(), rate=3.0).ok, "its own loss is still that of the weights before"
    verdict = training.take_step(training.batch())
    assert not verdict.ok
    assert verdict.first_step == step, "where the weights were broken"


@pytest.mark.slow
def test_a_flipped_exponent_bit_that_does_harm_is_a_bad_step(training: Training) -> None:
    """Silent data corruption: the highest exponent bit of one weight, in 16 places."""
    sound = copy.deepcopy(training)
    for _ in range(20):
        assert sound.take_step(sound.batch()).ok
    usual = np.mean(sound.guard.state()["losses"][-10:])
    draws = np.random.default_rng(2)
    harmful, found = 0, 0
    for _ in range(16):
        struck = copy.deepcopy(training)
        weights = [each for each in struck.model.parameters() if each.dim() > 1]
        bits = weights[draws.integers(len(weights))].data.view(torch.int32).view(-1)
        bits[draws.integers(len(bits))] ^= 1 << 30
        bad = not all(struck.take_step(struck.batch()).ok for _ in range(20))
        harmful += bad or np.mean(struck.guard.state()["losses"][-10:]) > 1.1 * usual
        found += bad
    assert harmful >= 4, "the fault is meant to hurt"
    assert found >= 0.8 * harmful


# -- going back ------------------------------------------------------------------------------------------------------


BAD = Verdict(ok=False, reason="the loss is nan", first_step=119)


def rewind(step: int, to_step: int, *, skipped: tuple[int, ...] = ()) -> Rewind:
    return Rewind(
        step=step, first_step=step - 1, to_step=to_step, skipped=skipped, samples=(4, 8), reason="the loss is nan"
    )


def bad_at(step: int) -> Verdict:
    return replace(BAD, first_step=step - 1)


def decided(verdict: Verdict, step: int, *, earlier: Sequence[Rewind], checkpoints: Sequence[int]) -> RewindDecision:
    return decide_rewind(verdict, step, earlier=earlier, checkpoints=checkpoints, max_rewinds=3)


def test_a_bad_step_goes_back_to_the_newest_checkpoint() -> None:
    decision = decided(BAD, 120, earlier=(), checkpoints=(50, 100))
    assert (decision.rewind, decision.to_step) == (True, 100)


def test_a_checkpoint_from_after_the_fault_is_not_used() -> None:
    lasting = replace(BAD, first_step=97)
    assert decided(lasting, 106, earlier=(), checkpoints=(50, 100)).to_step == 50


def test_without_a_checkpoint_it_goes_back_to_the_start() -> None:
    assert decided(BAD, 120, earlier=(), checkpoints=()).to_step == 0


def test_the_same_step_bad_with_other_samples_goes_one_checkpoint_further_and_then_gives_up() -> None:
    first = rewind(120, 100)
    decision = decided(BAD, 120, earlier=(first,), checkpoints=(50, 100))
    assert (decision.rewind, decision.to_step) == (True, 50)
    assert "weights of step 100 are to blame" in decision.reason
    again = decided(BAD, 120, earlier=(first, rewind(120, 50)), checkpoints=(25, 50))
    assert not again.rewind


def test_the_step_after_the_bad_one_counts_as_the_same_place() -> None:
    assert decided(bad_at(121), 121, earlier=(rewind(120, 100),), checkpoints=(50, 100)).to_step == 50


def test_without_an_older_checkpoint_the_same_step_gives_up() -> None:
    decision = decided(BAD, 120, earlier=(rewind(120, 0),), checkpoints=())
    assert not decision.rewind
    assert "no older checkpoint" in decision.reason


def test_too_many_rewinds_in_a_stretch_of_steps_give_up_and_old_ones_are_forgotten() -> None:
    earlier = [rewind(100 + 50 * number, 100) for number in range(3)]
    assert decided(bad_at(300), 300, earlier=earlier[1:], checkpoints=(250,)).rewind
    assert not decided(bad_at(300), 300, earlier=earlier, checkpoints=(250,)).rewind
    later = 200 + REWINDS_COUNT_STEPS
    assert decided(bad_at(later), later, earlier=earlier, checkpoints=(250,)).rewind


@given(st.data())
def test_a_run_with_any_bad_steps_comes_to_an_end(data: st.DataObject) -> None:
    """Every bad step is either skipped past, or the run gives up; it never goes round in circles."""
    poisoned = data.draw(st.sets(st.integers(0, 60), max_size=12))  # batches that are bad wherever they are seen
    broken = data.draw(st.sets(st.integers(1, 60), max_size=2))  # steps that are bad whatever they are given
    rewinds: list[Rewind] = []
    step, taken = 0, 0
    while step < 80:
        taken += 1
        assert taken < 2000
        number = batch_number(step, skipped_batches(rewinds))
        if number not in poisoned and step not in broken:
            step += 1
            continue
        verdict = replace(BAD, first_step=max(0, step - 1))
        decision = decided(verdict, step, earlier=rewinds, checkpoints=range(0, step, 10))
        if not decision.rewind:
            assert rewinds, "the first bad step is never the end"
            return
        assert decision.to_step <= verdict.first_step
        left_out = tuple(batch_number(s, skipped_batches(rewinds)) for s in range(verdict.first_step, step + 1))
        rewinds.append(replace(rewind(step, decision.to_step, skipped=left_out), first_step=verdict.first_step))
        step = decision.to_step
    assert poisoned.isdisjoint(batch_number(s, skipped_batches(rewinds)) for s in range(80))


def test_without_rewinds_the_first_bad_step_ends_the_run() -> None:
    decision = decide_rewind(BAD, 120, earlier=(), checkpoints=(100,), max_rewinds=0)
    assert not decision.rewind
    assert "max_rewinds allows 0" in decision.reason


def test_skipped_batches_of_all_rewinds_are_given_once_and_in_order() -> None:
    assert skipped_batches([rewind(9, 5, skipped=(8, 9)), rewind(6, 5, skipped=(6, 8))]) == (6, 8, 9)


def test_a_rewind_survives_json() -> None:
    one = rewind(120, 100, skipped=(119, 120))
    assert Rewind.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_giving_up_names_what_happened_what_was_tried_and_what_to_do() -> None:
    earlier = (replace(rewind(120, 100), samples=tuple(range(20))), rewind(120, 50))
    decision = decided(BAD, 120, earlier=earlier, checkpoints=(50,))
    error = diverged(BAD, 120, decision=decision, earlier=earlier, precision="bf16")
    assert isinstance(error, DivergedError)
    message = str(pickle.loads(pickle.dumps(error)))
    for part in (
        "diverges",
        "step 120: the loss is nan",
        "back to 100 without samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more",
        "back to 50 without samples 4, 8",
        "training.learning_rate",
        "training.warmup_fraction",
        "training.gradient_clip",
    ):
        assert part in message
    assert "training.precision" not in message
    assert "set training.precision=bf16 or fp32" in str(
        diverged(BAD, 120, decision=decision, earlier=(), precision="fp16").do
    )
