"""Inside a worker: steps, checkpoints, and a clean end, for one rank of one training.

Everything that must agree between ranks goes through one small all-reduce a step (`consensus`). Dropout is reseeded for
every micro-batch from (seed, batch, micro-batch): no random state has to be saved, and any number of workers with the
same micro-batch draws the same masks. A step that went bad (`divergence_guard`) is undone: back to the newest good
checkpoint, and on without the samples that it happened on. What is measured on the way, and what follows from it, is
asked of `validation`; what is told on the way goes through `reporting`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.atomic_file import read_json, write_json
from orchestrator.checkpoints import catalog
from orchestrator.runs.job import LoopState, Outcome, Status, TrainingJob, WorkerContext
from orchestrator.samples.masking import Masking
from orchestrator.worker import models
from orchestrator.worker.budget import Account
from orchestrator.worker.consensus import Consensus, ControlSignal
from orchestrator.worker.divergence_guard import DivergenceGuard, Verdict
from orchestrator.worker.engine import Engine, device_of, join_process_group
from orchestrator.worker.export import export
from orchestrator.worker.forward_timer import collectives_begun
from orchestrator.worker.lr_schedule import learning_rate
from orchestrator.worker.measurement import Pace, figures
from orchestrator.worker.model_inputs import ModelInputs
from orchestrator.worker.objectives import training_objective
from orchestrator.worker.recovery import RecoveryManager
from orchestrator.worker.reporting import Reporter
from orchestrator.worker.retention import step_data
from orchestrator.worker.validation import Validation, evaluated_samples

_HOLD_POLL_S = 0.05


def train(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank of a training to its end, its budget's end, or a requested stop; rank 0's outcome is the run's.

    Resumes by itself from the newest good checkpoint in `job.checkpoints`. A run that its budget has stopped gives the
    same outcome again, without another step, until the budget is raised.
    Raises StorageError when a checkpoint cannot be written or read, ModelError when the base model cannot be used,
    DivergedError when steps keep going bad, FencedError when a newer attempt has begun.
    """
    loop = _Loop(job, context)
    try:
        loop.restore()
        return loop.finish(loop.run())
    finally:
        loop.close()


class _Loop:
    """The state of one rank's training between its first and last step."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self._job, self._context = job, context
        self._spec, self._plan = job.spec, job.plan
        assert job.plan.steps is not None, "the plan has met its dataset"
        assert job.plan.warmup_steps is not None
        self._steps = job.plan.steps
        self._warmup_steps = job.plan.warmup_steps
        self._account = Account(job.plan, evaluated_samples=evaluated_samples(job), started_s_ago=job.started_s_ago)
        self._reporter, self._heartbeat = Reporter(job, context, self._account), context.heartbeat
        show_evaluating = partial(self._reporter.enter, "evaluating")
        join_process_group(job.plan, context)
        self._heartbeat.count(collectives_begun)
        masking = Masking(rate=job.spec.training.masking_rate, seed=job.spec.training.seed)
        self._inputs = ModelInputs(
            job,
            masking=masking,
            device=device_of(job.plan, context),
            say=self._reporter.note,
            before_batch=show_evaluating,
        )
        self._engine = self._build()
        self._data = step_data(job, self._inputs.train, masking=masking, rank=context.rank)
        self._recovery = RecoveryManager(
            self._engine, job, context, agree=self._from_leader, any_rank=self._on_any_rank
        )
        self._validation = Validation(
            job,
            self._inputs,
            self._recovery,
            masking=masking,
            rank=context.rank,
            agree=self._from_leader,
            before_batch=show_evaluating,
        )
        self._consensus = Consensus(self._sum, rank=context.rank, world_size=job.plan.workers)
        self._guard = DivergenceGuard(
            samples_per_step=job.plan.global_batch,
            spikes=job.spec.training.bad_steps.spikes == "auto",
        )
        self._pace = Pace()

    def _build(self) -> Engine:
        """A new engine on the weights that the run begins with."""
        model = models.build_model(self._spec, self._plan, self._job.data, say=self._reporter.note)
        if self._plan.flops_once:
            self._inputs.cache_features(model)
        self._parts = models.ParameterGroups.of(model, self._spec)
        return Engine(
            model,
            plan=self._plan,
            groups=self._parts.groups,
            objective=training_objective(self._job),
            context=self._context,
            anchors=self._parts.anchors(self._spec),
        )

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._engine.sum_over_ranks(values)

    def _on_any_rank(self, holds: bool) -> bool:
        return bool(self._sum(torch.tensor(float(holds))))

    def _from_leader(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        self._reporter.enter("waiting")
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @property
    def _leads(self) -> bool:
        return self._context.rank == 0

    @property
    def _step(self) -> int:
        return self._account.step

    # -- from start to end -------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Goes on from the newest good checkpoint, or begins."""
        self._reporter.enter("loading")
        state = self._recovery.restore()
        self._account.resume(state, self._job.held_before)
        self._take_up(state)
        self._reporter.open_log(resumed_from=state.step, holds=self._recovery.holds)

    def run(self) -> Status:
        """Steps until the end or a reason to stop."""
        self._reporter.tell("training")
        wish = self._consensus.wish(self._wish())
        if self._validation.needs_baseline and wish == ControlSignal.GO_ON:
            self._reporter.begin("evaluating")
            self._reporter.emit(self._validation.baseline(self._engine))
        while wish != ControlSignal.STOP:
            if self._step == self._steps:
                return "finished"
            # Before the step and not after the last one: a run that was stopped in between makes up for it.
            if self._validation.is_due(self._step):
                self._evaluate()
            if self._recovery.is_due(self._step):
                self._save()
            if (reason := self._validation.stop_reason()) is not None:
                self._reporter.note(reason)
                return "finished"
            if wish == ControlSignal.OVER_BUDGET:
                return "stopped_by_budget"
            wish = self._take_step()
        return "interrupted"

    def finish(self, status: Status) -> Outcome:
        """Evaluation, measurements, checkpoint, model folder and, when the run is over, the outcome file."""
        if status == "interrupted":
            self._save()
            return self._outcome(status)
        if status == "stopped_by_budget":
            earlier = self._from_leader(self._earlier_stop() if self._leads else None)
            if earlier is not None:
                return Outcome.from_dict(earlier)
        if self._step == 0 or not self._validation.is_evaluated(self._step):
            self._evaluate(is_last=status == "finished")
        self._measure()  # before the checkpoint, which keeps all metrics
        if self._job.final_checkpoint:
            self._save()
        self._export()
        outcome = self._outcome(status)
        if self._leads:
            file = self._job.outcome_file if status == "finished" else self._job.budget_stop_file
            with catalog.storage_errors(self._job.run_folder):
                write_json(file, outcome.to_dict())
            self._recovery.show(file)
        return outcome

    def close(self) -> None:
        """Ships what metrics it can and lets go of the engine."""
        try:
            self._reporter.close()
        finally:
            self._recovery.close()
            self._engine.close()

    # -- one step ----------------------------------------------------------------------------------------------

    def _take_step(self) -> ControlSignal:
        """One optimizer step on all ranks, undone if it went bad; returns rank 0's wish after it."""
        started = time.monotonic()
        step = self._step
        self._reporter.enter("computing")
        share = self._data.share(step, skipped=self._recovery.skipped)
        reading_s = time.monotonic() - started
        rate = learning_rate(self._spec.training, step=step, steps=self._steps, warmup_steps=self._warmup_steps)
        scales = self._parts.scales(self._spec.layerwise, step=step, steps=self._steps)
        loss, norm = self._engine.step(share.micro_batches, rate, seeds=share.seeds, scales=scales)
        self._account.add_step(
            seconds=time.monotonic() - started, tokens=share.tokens, padded_tokens=share.padded_tokens
        )
        self._heartbeat.enter("waiting", step)
        agreed = self._consensus.after_step(
            loss=loss, grad_norm=norm, wish=self._wish(), failed=self._recovery.has_failed()
        )
        self._heartbeat.computed(reading_s + self._engine.forward_s)
        if agreed.failed:
            self._recovery.raise_failure()
        verdict = self._guard.judge(step, loss=agreed.loss, grad_norm=agreed.grad_norm)
        if not verdict.ok:
            self._rewind(verdict, step)
            return self._consensus.wish(self._wish())
        seconds = time.monotonic() - started
        self._pace.add_step(seconds=seconds, tokens=share.tokens)
        self._recovery.add_step(seconds)
        news = {
            "train/loss": agreed.loss,
            "train/learning_rate": rate,
            "train/tokens_per_second": share.tokens / seconds,
        }
        self._record(news if agreed.grad_norm is None else {**news, "train/grad_norm": agreed.grad_norm})
        self._hold()
        return agreed.wish

    def _hold(self) -> None:
        """Waits where a rehearsal of a death asks for it; the other ranks meet rank 0 at their next collective."""
        while self._leads and self._step == self._job.hold_after_step and self._job.hold_file.exists():
            time.sleep(_HOLD_POLL_S)

    def _wish(self) -> ControlSignal:
        """Rank 0's wish: someone asked to stop, or one more step would overrun the budget."""
        if not self._leads:
            return ControlSignal.GO_ON
        if self._context.stop_requested() or self._step == self._job.stop_after_step:
            return ControlSignal.STOP
        budget = self._spec.parsed_budget
        if budget is None or self._step == self._steps:
            return ControlSignal.GO_ON
        decision = self._account.decide(budget, may_claim=self._recovery.still_holds)
        if not decision.go_on:
            self._reporter.note(decision.reason)
        return ControlSignal.GO_ON if decision.go_on else ControlSignal.OVER_BUDGET

    def _record(self, news: dict[str, float]) -> None:
        """A step's figures, with what the run has cost up to it."""
        cost = self._account.cost()
        self._reporter.emit(
            news
            | {
                "train/tokens": float(self._account.state().tokens),
                "cost/gpu_hours": cost.gpu_hours,
                "cost/flops": cost.flops,
                "cost/usd": cost.usd,
            }
        )
        self._reporter.tell("training")

    # -- back to a checkpoint ----------------------------------------------------------------------------------

    def _take_up(self, state: LoopState) -> None:
        self._validation.take_up(state)
        self._guard.restore(state.guard)
        self._reporter.take_up(state)

    def _rewind(self, verdict: Verdict, step: int) -> None:
        """Undoes a bad step and what led to it. Raises DivergedError when that has not helped."""
        self._reporter.tell("rewinding")
        state = self._recovery.rewind(verdict, step, samples_of=self._data.samples)
        if state is None:
            self._engine.close()
            self._engine = self._build()
            self._recovery.attach(self._engine)
            state = LoopState()
        self._account.rewind(state)
        self._take_up(state)

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def _evaluate(self, *, is_last: bool = False) -> None:
        started = time.monotonic()
        self._reporter.begin("evaluating")
        news = self._validation.evaluate(self._engine, self._step)
        self._reporter.emit(news)
        self._validation.judge(self._engine, news, metrics=self._reporter.metrics, is_last=is_last)
        seconds = time.monotonic() - started
        self._account.add_evaluation(seconds)
        self._pace.add_pause(seconds)
        self._reporter.report()

    def _measure(self) -> None:
        """What the run took, beside what was planned; nothing new where this attempt only ended an earlier one."""
        if not self._pace.steps:
            return
        peak_gib = self._engine.peak_gib()
        self._reporter.emit(
            figures(
                self._plan,
                self._pace,
                counts=self._job.data.counts,
                step=self._step,
                gpu_hours=self._account.cost().gpu_hours,
                peak_gib=peak_gib,
            )
        )

    def _save(self) -> None:
        """All ranks copy their state; it becomes a checkpoint while training goes on."""
        started = time.monotonic()
        self._reporter.begin("saving")
        state = replace(self._account.state(), metrics=dict(self._reporter.metrics), guard=self._guard.state())
        figures = self._recovery.save(self._validation.added_to(state), step_s=self._account.pace_s)
        self._validation.saved()
        if figures:
            self._reporter.log(figures)
        seconds = time.monotonic() - started
        self._account.add_saving(seconds)
        self._pace.add_pause(seconds)

    def _export(self) -> None:
        """Rank 0 writes the model as a Hugging Face folder, from the weights of all.

        Raises ModelError on every rank when the folder does not compute what was trained; all is kept then.
        """
        self._reporter.begin("exporting")
        job, wrong = self._job, None
        state, trained = self._validation.final_model(self._engine, self._step)
        if self._leads:
            self._recovery.check_fence()
            with catalog.storage_errors(job.run_folder, what="the model"):
                wrong = export(state, job.spec, job.plan, job.data, job.model_folder, trained=trained)
        wrong = self._from_leader(wrong)
        if wrong is not None:
            self._save()
            self._recovery.newest()
            raise wrong
        if self._leads:
            self._recovery.show(job.model_folder)

    def _outcome(self, status: Status) -> Outcome:
        """Once every rank has written all that it was given to write."""
        self._reporter.begin("saving")
        newest = self._recovery.newest()
        dist.barrier()
        best = None if status == "interrupted" else self._validation.best_before(self._step)
        if best is not None:
            self._reporter.note(self._validation.best_in_words(self._reporter.metrics))
        return Outcome(
            status=status,
            step=self._step,
            steps=self._steps,
            metrics={**self._reporter.metrics, **({} if best is None else self._validation.best_metrics)},
            checkpoint=newest,
            model_path=None if status == "interrupted" else str(self._job.model_folder),
            notes=(*self._recovery.notes, *self._reporter.notes),
            model_step=best,
        )

    def _earlier_stop(self) -> dict[str, Any] | None:
        """What was said when the budget stopped this run at this very step."""
        earlier: dict[str, Any] = read_json(self._job.budget_stop_file) or {}
        return earlier if earlier.get("step") == self._step else None
