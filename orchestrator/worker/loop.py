"""Inside a worker: steps, evaluation, checkpoints, and a clean end, for one rank of one training.

Everything that must agree between ranks goes through one small all-reduce a step (`consensus`). Dropout is reseeded for
every micro-batch from (seed, batch, micro-batch): no random state has to be saved, and any number of workers with the
same micro-batch draws the same masks. A step that went bad (`divergence_guard`) is undone: back to the newest good
checkpoint, and on without the samples that it happened on.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.atomic_file import read_json, write_json
from orchestrator.checkpoints import catalog
from orchestrator.runs.heartbeat import Phase
from orchestrator.runs.job import LoopState, Outcome, Progress, Status, TrainingJob, WorkerContext
from orchestrator.samples.batches import Samples
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split
from orchestrator.tracking.tracker import MetricLog
from orchestrator.worker import early_stop, models
from orchestrator.worker.best_weights import BestWeights
from orchestrator.worker.budget import Account
from orchestrator.worker.consensus import Consensus, ControlSignal
from orchestrator.worker.divergence_guard import DivergenceGuard, Verdict
from orchestrator.worker.engine import Engine, device_of, join_process_group
from orchestrator.worker.evaluation import Evaluator, gap_samples
from orchestrator.worker.export import Sample, check_batch, export, first_batch
from orchestrator.worker.features import FeatureSamples, HeadAlone
from orchestrator.worker.forward_timer import collectives_begun
from orchestrator.worker.lr_schedule import layer_scale, learning_rate
from orchestrator.worker.measurement import Pace, figures
from orchestrator.worker.objectives import Batch, objective_for
from orchestrator.worker.recovery import RecoveryManager
from orchestrator.worker.retention import Forgetting, step_data

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
        self._notes: tuple[str, ...] = ()
        training = job.spec.training
        masking = Masking(rate=training.masking_rate, seed=training.seed)
        self._forgetting, counts = Forgetting(job, masking=masking), job.data.counts
        evaluated = counts.validation_samples + len(gap_samples(counts.train_samples, counts.validation_samples))
        evaluated += self._forgetting.samples
        self._account = Account(job.plan, evaluated_samples=evaluated, started_s_ago=job.started_s_ago)
        self._objective = objective_for(job.spec.task)
        self._heartbeat = context.heartbeat
        join_process_group(job.plan, context)
        self._heartbeat.count(collectives_begun)
        self._validation: Samples = open_split(job.data.path, "validation", masking=masking)
        self._checked = self._validation
        self._train: Samples = open_split(job.data.path, "train", masking=masking)
        self._keeps_features = False
        self._engine = self._build()
        self._evaluator = Evaluator(
            job,
            self._objective,
            train=self._train,
            validation=self._validation,
            rank=context.rank,
            before_batch=self._show_life,
        )
        self._data = step_data(job, self._train, masking=masking, rank=context.rank)
        self._recovery = RecoveryManager(
            self._engine, job, context, agree=self._from_leader, any_rank=self._on_any_rank
        )
        self._best = BestWeights(
            job, self._recovery, leads=self._leads, agree=self._from_leader, compared=self._given_to_compare()
        )
        self._consensus = Consensus(self._sum, rank=context.rank, world_size=job.plan.workers)
        self._guard = DivergenceGuard(
            samples_per_step=job.plan.global_batch,
            spikes=job.spec.training.bad_steps.spikes == "auto",
        )
        self._pace = Pace()
        self._metrics: dict[str, float] = {}
        self._evaluated_step = 0
        self._progress = early_stop.Progress()
        self._log: MetricLog | None = None

    def _build(self) -> Engine:
        """A new engine on the weights that the run begins with."""
        model = models.build_model(self._spec, self._plan, self._job.data, say=self._note)
        if self._plan.flops_once:
            self._keep_features(model)
        self._parts = models.ParameterGroups.of(model, self._spec)
        return Engine(
            model,
            plan=self._plan,
            groups=self._parts.groups,
            objective=self._objective,
            context=self._context,
            anchors=self._parts.anchors(self._spec),
        )

    def _keep_features(self, model: Any) -> None:
        """Takes the backbone out of the model, and at the first time has it read every row before.

        Where the head does not read one vector of a row, all stays as it is.
        """
        alone = HeadAlone(model, dtype=models.DTYPES[self._plan.precision], device=device_of(self._plan, self._context))
        if not self._keeps_features:
            read = alone.reading(self._train)
            if read is None:
                self._note("features: the head does not read one vector of a row, so the backbone is run in every pass")
                return
            self._train, self._validation = (
                FeatureSamples(rows, alone.compute(rows, read, before_batch=self._show_life))
                for rows in (self._train, self._validation)
            )
            self._keeps_features = True
        alone.cut()

    def _show_life(self) -> None:
        self._heartbeat.enter("evaluating", self._step)

    def _note(self, note: str) -> None:
        """Keeps what a user should know for the outcome, once however often the model is built."""
        self._notes = (*self._notes, *({note} - {*self._notes}))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self._engine.sum_over_ranks(values)

    def _on_any_rank(self, holds: bool) -> bool:
        return bool(self._sum(torch.tensor(float(holds))))

    @property
    def _leads(self) -> bool:
        return self._context.rank == 0

    @property
    def _step(self) -> int:
        return self._account.step

    # -- from start to end -------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Goes on from the newest good checkpoint, or begins."""
        self._heartbeat.enter("loading", self._step)
        state = self._recovery.restore()
        self._account.resume(state, self._job.held_before)
        self._take_up(state)
        if self._leads:
            job = self._job
            self._log = MetricLog(
                job.run_folder,
                attempt=max(1, job.attempt),
                resumed_from=state.step,
                holds=self._recovery.holds,
            )

    def run(self) -> Status:
        """Steps until the end or a reason to stop."""
        self._tell("training")
        wish = self._consensus.wish(self._wish())
        if self._forgetting.is_unmeasured and wish == ControlSignal.GO_ON:
            self._begin("evaluating")
            self._emit(self._forgetting.figures(self._evaluator, self._engine))
        while wish != ControlSignal.STOP:
            if self._step == self._steps:
                return "finished"
            # Before the step and not after the last one: a run that was stopped in between makes up for it.
            if self._job.is_evaluated_after(self._step) and self._evaluated_step != self._step:
                self._evaluate()
                self._judge_progress()
            if self._recovery.is_due(self._step):
                self._save()
            if self._progress.waited and (reason := self._progress.reason(self._spec.training.stop, self._spec.goal)):
                self._note(reason)
                return "finished"
            if wish == ControlSignal.OVER_BUDGET:
                return "stopped_by_budget"
            wish = self._take_step()
        return "interrupted"

    def _judge_progress(self) -> None:
        """Counts an evaluation of those every so many steps for `training.stop`."""
        training, goal = self._spec.training, self._spec.goal
        if training.stop is not None and training.eval_every_steps and self._step % training.eval_every_steps == 0:
            value = self._metrics.get(goal.metric)
            self._progress = self._progress.after(value, goal, min_delta=training.stop.min_delta)

    def finish(self, status: Status) -> Outcome:
        """Evaluation, measurements, checkpoint, model folder and, when the run is over, the outcome file."""
        if status == "interrupted":
            self._save()
            return self._outcome(status)
        if status == "stopped_by_budget":
            earlier = self._from_leader(self._earlier_stop() if self._leads else None)
            if earlier is not None:
                return Outcome.from_dict(earlier)
        if self._evaluated_step != self._step or self._step == 0:
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
            if self._log is not None:
                self._log.close()
        finally:
            self._recovery.close()
            self._engine.close()

    # -- one step ----------------------------------------------------------------------------------------------

    def _take_step(self) -> ControlSignal:
        """One optimizer step on all ranks, undone if it went bad; returns rank 0's wish after it."""
        started = time.monotonic()
        step = self._step
        self._heartbeat.enter("computing", step)
        share = self._data.share(step, skipped=self._recovery.skipped)
        reading_s = time.monotonic() - started
        rate = learning_rate(self._spec.training, step=step, steps=self._steps, warmup_steps=self._warmup_steps)
        loss, norm = self._engine.step(share.micro_batches, rate, seeds=share.seeds, scales=self._scales(step))
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

    def _scales(self, step: int) -> list[float]:
        """What the learning rate is multiplied by in each group."""
        layerwise, layers = self._spec.layerwise, self._parts.layers
        return [
            layer_scale(layerwise, below_head=part, layers=layers, step=step, steps=self._steps)
            for part in self._parts.below_head
        ]

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
        decision = self._account.decide(budget)
        if not decision.go_on:
            self._note(decision.reason)
        return ControlSignal.GO_ON if decision.go_on else ControlSignal.OVER_BUDGET

    def _record(self, news: dict[str, float]) -> None:
        """A step's figures, with what the run has cost up to it."""
        cost = self._account.cost()
        self._emit(
            news
            | {
                "train/tokens": float(self._account.state().tokens),
                "cost/gpu_hours": cost.gpu_hours,
                "cost/flops": cost.flops,
                "cost/usd": cost.usd,
            }
        )
        self._tell("training")

    # -- back to a checkpoint ----------------------------------------------------------------------------------

    def _take_up(self, state: LoopState) -> None:
        self._evaluated_step, self._metrics = state.evaluated_step, dict(state.metrics)
        self._progress = early_stop.Progress(best=state.best, waited=state.waited)
        self._best.take_up(state)
        self._guard.restore(state.guard)
        self._forgetting.take_up(state)

    def _rewind(self, verdict: Verdict, step: int) -> None:
        """Undoes a bad step and what led to it. Raises DivergedError when that has not helped."""
        self._tell("rewinding")
        state = self._recovery.rewind(verdict, step, samples_of=self._data.samples)
        if state is None:
            self._engine.close()
            self._engine = self._build()
            self._recovery.attach(self._engine)
            state = LoopState()
        self._account.rewind(state)
        self._take_up(state)
        if self._log is not None:
            self._log.rewind(state.step)

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def _evaluate(self, *, is_last: bool = False) -> None:
        started = time.monotonic()
        self._begin("evaluating")
        summary = self._evaluator.figures(self._engine) | self._forgetting.figures(self._evaluator, self._engine)
        self._evaluated_step = self._step
        self._emit(summary)
        self._best.judge(self._engine, self._step, summary, is_last=is_last)
        seconds = time.monotonic() - started
        self._account.add_evaluation(seconds)
        self._pace.add_pause(seconds)
        if self._leads:
            self._context.report(self._step, dict(self._metrics))

    def _measure(self) -> None:
        """What the run took, beside what was planned; nothing new where this attempt only ended an earlier one."""
        if not self._pace.steps:
            return
        peak_gib = self._engine.peak_gib()
        self._emit(
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
        self._begin("saving")
        state = replace(
            self._account.state(),
            evaluated_step=self._evaluated_step,
            metrics=dict(self._metrics),
            best=self._progress.best,
            waited=self._progress.waited,
            best_step=self._best.step,
            best_metrics=dict(self._best.metrics),
            retained_before=self._forgetting.before,
            guard=self._guard.state(),
        )
        figures = self._recovery.save(state, step_s=self._account.pace_s)
        self._best.named()
        if figures and self._log is not None:  # of how it was run, not of what came out: no part of the outcome
            self._log.log(self._step, figures)
        seconds = time.monotonic() - started
        self._account.add_saving(seconds)
        self._pace.add_pause(seconds)

    def _export(self) -> None:
        """Rank 0 writes the model as a Hugging Face folder, from the weights of all.

        Raises ModelError on every rank when the folder does not compute what was trained; all is kept then.
        """
        self._begin("exporting")
        batch, job, wrong = self._batch_to_compare(), self._job, None
        logits, state = self._engine.logits(self._given_to_compare()), self._engine.full_state()
        if (best := self._best.at(self._step)) is not None:
            logits, state = best.logits, state | best.weights
        trained = Sample(batch=batch, logits=logits)
        if self._leads and self._keeps_features:  # the engine has the head alone
            state = {**models.build_model(job.spec, job.plan, job.data).state_dict(), **state}
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

    def _batch_to_compare(self) -> Batch:
        """Samples that an exported model must give the same logits for."""
        return check_batch(self._checked, self._plan, whole=self._keeps_features)

    def _given_to_compare(self) -> Batch:
        """What the engine's model is given for them: the head alone reads features."""
        return first_batch(self._validation) if self._keeps_features else self._batch_to_compare()

    def _outcome(self, status: Status) -> Outcome:
        """Once every rank has written all that it was given to write."""
        self._begin("saving")
        newest = self._recovery.newest()
        dist.barrier()
        best = self._best.step if status != "interrupted" and self._best.step != self._step else None
        if best is not None:
            self._note(
                f"the model is that of step {best}, the best of all evaluations: {self._best.in_words(self._metrics)}"
            )
        return Outcome(
            status=status,
            step=self._step,
            steps=self._steps,
            metrics={**self._metrics, **({} if best is None else self._best.metrics)},
            checkpoint=newest,
            model_path=None if status == "interrupted" else str(self._job.model_folder),
            notes=(*self._recovery.notes, *self._notes),
            model_step=best,
        )

    def _earlier_stop(self) -> dict[str, Any] | None:
        """What was said when the budget stopped this run at this very step."""
        earlier: dict[str, Any] = read_json(self._job.budget_stop_file) or {}
        return earlier if earlier.get("step") == self._step else None

    # -- telling -----------------------------------------------------------------------------------------------

    def _from_leader(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        self._heartbeat.enter("waiting", self._step)
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _emit(self, values: dict[str, float]) -> None:
        self._metrics.update(values)
        if self._log is not None:
            self._log.log(self._step, values)

    def _begin(self, phase: Phase) -> None:
        self._heartbeat.enter(phase, self._step)
        self._tell(phase)

    def _tell(self, phase: str) -> None:
        if not self._leads:
            return
        self._context.progress(
            Progress(
                step=self._step,
                steps=self._steps,
                phase=phase,
                eta_s=self._account.pace_s * (self._steps - self._step),
                tokens_per_second=self._metrics.get("train/tokens_per_second", 0.0),
                metrics=dict(self._metrics),
            )
        )
