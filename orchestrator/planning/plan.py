"""`RunSpec` and cluster to `RunPlan`: the dry run. Refuses what can be known wrong before anything starts.

Called by `plan` and, before the data is read and again once its counts are known, by `run`. Every choice leaves a
sentence with its figures in `RunPlan.reasons`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.architectures.families import DECODERS, ENCODERS, ModelShape, model_config, model_shape
from orchestrator.errors import ModelError, SpecError
from orchestrator.methods.base import MethodCost
from orchestrator.methods.registry import method_of, trainable_parameters
from orchestrator.planning.asking import Asking, asking, measuring
from orchestrator.planning.base_fit import base_notes, check_same_classes, refuse_frozen_head
from orchestrator.planning.deepspeed_config import deepspeed_config
from orchestrator.planning.elastic import choose_common_layout, settle
from orchestrator.planning.fitting import choose_layout, fits, remedy
from orchestrator.planning.length import Length, training_length, warmup_steps
from orchestrator.planning.memory import Layout, MemoryEstimate, Trainer, peak_memory
from orchestrator.planning.placement import (
    Site,
    check_room,
    choose_precision,
    place_sizes,
    place_workers,
    worker_counts,
)
from orchestrator.planning.run_plan import ClusterShape, DatasetCounts, Kept, RunPlan, SizePlan
from orchestrator.planning.supported import check_supported
from orchestrator.planning.throughput import (
    STARTUP_SECONDS,
    MeasuredSpeed,
    PricedRun,
    RunCost,
    flops_per_token,
    run_cost,
)
from orchestrator.quantities import human_count
from orchestrator.tasks.names import TrainedTask
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

_NO_TIME_HOURS = 1e-9
"""The least that steps take, 4 microseconds: the difference that tells their time is no more exact."""
_NOMINAL_STEPS = 1000
"""Steps over which layouts are compared while the length is open."""
AUTO_WORKERS_PREMIUM = 1.10
"""What `workers: auto` pays for being done sooner, over the least device hours: a judgement."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be trained, whatever it runs on."""

    spec: RunSpec
    shape: ModelShape
    trainable: int
    method: MethodCost
    about_base: tuple[str, ...]
    """What a user should know of the base model."""
    flops_per_step: float
    counts: DatasetCounts | None
    length: Length
    asking: Asking | None = None
    """What is read where nothing is trained."""
    measured: MeasuredSpeed | None = None
    """What past runs say of the device's speed."""

    @property
    def steps(self) -> int | None:
        return self.length.steps

    @property
    def padded_tokens_per_step(self) -> float:
        return self.length.padded_tokens(self.spec.training.global_batch)

    def keeps_features(self, layout: Layout) -> bool:
        """Whether the rows' features are computed once: where they are seen again, and no rank has only a part of the
        backbone."""
        return (
            method_of(self.spec.method).keeps_features
            and self.shape.exact
            and layout.zero_stage < 3
            and self.counts is not None
            and self.steps is not None
            and self.spec.of_general_data is None  # whose rows the backbone has to read too
            and self.steps * self.spec.training.global_batch > self.counts.train_samples
        )

    def flops(self, layout: Layout) -> tuple[float, float]:
        """Before the first step, and of each step."""
        if self.asking is not None:
            batch, tokens = self.spec.training.global_batch, self.asking.tokens(layout.workers)
            return self.flops_per_step / batch * tokens / self.asking.each, 0.0
        if not self.keeps_features(layout):
            return 0.0, self.flops_per_step
        assert self.counts is not None
        head = 6.0 * self.trainable  # of one position for each row
        batch = self.spec.training.global_batch
        return self.counts.train_samples * (self.flops_per_step / batch - head), batch * head

    def memory(self, layout: Layout) -> MemoryEstimate:
        rows = self.counts.train_samples + self.counts.validation_samples if self.counts else 0
        return peak_memory(
            replace(layout, sequence_length=layout.sequence_length + self.method.virtual_tokens),
            shape=self.shape,
            method=self.method,
            trainable=self.trainable,
            trainer=Trainer(
                predicted_share=self.spec.training.masking_rate if task_of(self.spec.task).hides_tokens else 1.0,
                copies_checkpoints=self.asking is None,
                features=rows if self.keeps_features(layout) else 0,
                anchors=self.spec.retain is not None and self.spec.retain.l2sp > 0,
                accumulates=layout.workers * layout.micro_batch < self.spec.training.global_batch,
                # Where nothing is trained, logits of the few last positions are all that is computed of them.
                loss_chunks=layout.sequence_length if self.asking is not None and not self.asking.all_logits else 1,
            ),
        )

    def cost(self, site: Site, layout: Layout) -> RunCost:
        batch = self.spec.training.global_batch
        once, each = self.flops(layout)
        return run_cost(
            PricedRun(
                flops_once=once,
                flops_per_step=each,
                steps=self.steps or _NOMINAL_STEPS,
                workers=layout.workers,
                device=site.device,
                precision=layout.precision,
                cpus_per_worker=self.spec.resources.cpus_per_worker,
                usd_per_device_hour=site.usd_per_device_hour,
                activation_checkpointing=layout.activation_checkpointing,
                method=self.method,
                parameters=self.shape.parameters,
                trainable=self.trainable,
                zero_stage=layout.zero_stage,
                offload=layout.offload,
                nodes=site.nodes,
                tokens_per_device_step=self.padded_tokens_per_step / layout.workers,
                accumulation=batch // layout.workers // layout.micro_batch,
                network_gb_s=site.network_gb_s,
                measured=self.measured,
            )
        )

    def hours_of_steps(self, site: Site, layout: Layout) -> float:
        return max(self.cost(site, layout).wall_hours.mid - STARTUP_SECONDS.mid / 3600, _NO_TIME_HOURS)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One number of workers with the layout that is best for it."""

    site: Site
    layout: Layout
    reasons: tuple[str, ...]
    fits: bool
    peak_gib: float
    gpu_hours: float


def make_plan(
    spec: RunSpec,
    cluster: ClusterShape,
    *,
    counts: DatasetCounts | None = None,
    workers: int | None = None,
    kept: Kept | None = None,
    measured: MeasuredSpeed | None = None,
) -> RunPlan:
    """How to carry out a training on a cluster; a search is planned as its base training.

    Without `counts` a length in epochs stays open: `steps`, hours and money are None. `workers` overrides the spec's
    number; of a range, the largest size with room is taken when it is None. `kept` is what an earlier attempt of the
    same run settled, `RunPlan.kept`; `measured` is how fast past runs were on such devices. Raises SpecError or
    ModelError for settings that cannot work, DataError for too little data, and CapacityError for more workers than
    there is room for. What may need more memory than there is comes back with `fits=False`.
    """
    if kept is not None:
        spec = settle(spec, kept)
    job = replace(_job(spec, counts), measured=measured)
    return _planned(job, cluster, counts=counts, workers=workers, kept=kept)


def _planned(
    job: _Job, cluster: ClusterShape, *, counts: DatasetCounts | None, workers: int | None, kept: Kept | None
) -> RunPlan:
    """See `make_plan`."""
    spec = job.spec
    way, why_workers, sizes = _best_way(job, cluster, workers)
    site, layout, memory, steps, training = way.site, way.layout, job.memory(way.layout), job.steps, spec.training
    cost = None if steps is None else job.cost(site, layout)
    reasons = (site.reason + why_workers, *way.reasons, *job.length.reasons, *_notes(job, counts, kept))
    reasons += cost.reasons if cost else ()
    reasons += tuple(_cost_notes(job, layout, cost))
    if not fits(memory, site):
        reasons += (remedy(spec, site, layout, job.memory),)
    accumulation = training.global_batch // layout.workers // layout.micro_batch
    flops_once, flops_per_step = job.flops(layout)
    return RunPlan(
        **asdict(layout),
        gpu_hours=cost.gpu_hours if cost else None,
        wall_hours=cost.wall_hours if cost else None,
        usd=cost.usd if cost else None,
        device_name=site.device.name,
        gpus_per_worker=site.gpus_per_worker,
        cpus_per_worker=spec.resources.cpus_per_worker,
        accumulation=accumulation,
        global_batch=training.global_batch,
        steps=steps,
        warmup_steps=None if steps is None else warmup_steps(training.warmup_fraction, steps),
        tokens_per_step=job.length.tokens_per_step,
        padded_tokens_per_step=round(job.padded_tokens_per_step),
        parameters=job.shape.parameters,
        trainable_parameters=job.trainable,
        flops_per_step=flops_per_step,
        flops_once=flops_once,
        usd_per_device_hour=site.usd_per_device_hour or 0.0,
        states_gib=memory.states_gib,
        peak_gib=memory.peak_gib,
        device_memory_gib=site.capacity_gib,
        fits=fits(memory, site),
        deepspeed={}
        if job.asking is not None
        else deepspeed_config(
            layout, training=training, accumulation=accumulation, trainable=job.trainable, raw=spec.deepspeed.raw
        ),
        sizes=sizes,
        reasons=reasons,
    )


def _job(spec: RunSpec, counts: DatasetCounts | None) -> _Job:
    """What is to be trained; its spec has the length of the longest batch instead of the cut-off."""
    shape, trainable, about_base = _shape(spec, counts)
    method, asked = method_of(spec.method).cost_of(spec, shape), None
    if not method_of(spec.method).trains:
        asks = method_of(spec.method).asks_in_prompts
        asked = asking(spec, counts, context=shape.context) if asks else measuring(spec, counts)
        shape = replace(shape, dropout=False)
    length = training_length(spec, counts) if asked is None else asked.length(spec)
    computed = [(columns + method.virtual_tokens, share) for columns, share in length.columns]
    flops = sum(
        share * columns * flops_per_token(shape, method=method, trainable=trainable, sequence_length=columns)
        for columns, share in computed
    )
    data = spec.data.model_copy(update={"sequence_length": length.longest})
    return _Job(
        spec=spec.model_copy(update={"data": data}),
        shape=shape,
        trainable=trainable,
        method=method,
        about_base=about_base,
        flops_per_step=spec.training.global_batch * flops,
        counts=counts,
        length=length,
        asking=asked,
    )


def _best_way(job: _Job, cluster: ClusterShape, workers: int | None) -> tuple[_Way, str, tuple[SizePlan, ...]]:
    """The number of workers with its layout, why that number, and the sizes of an elastic run."""
    spec = job.spec
    if spec.resources.is_elastic:
        return _elastic_way(job, cluster, workers)
    if workers is None:
        way, why = _cheapest([_way(job, cluster, count) for count in worker_counts(spec, cluster)])
        return way, why, ()
    if not spec.training.splits_over(workers):
        raise SpecError(
            f"training.global_batch {spec.training.global_batch} cannot be split over {workers} workers",
            got=f"training.micro_batch: {spec.training.micro_batch}",
            do="choose a number of workers that divides it",
        )
    return _way(job, cluster, workers), "", ()


def _elastic_way(job: _Job, cluster: ClusterShape, workers: int | None) -> tuple[_Way, str, tuple[SizePlan, ...]]:
    """The size that was asked for, or the largest with room, in the layout that all sizes share."""
    spec = job.spec
    sites, room = place_sizes(spec, cluster, worker_counts(spec, cluster))
    precision, why_precision = choose_precision(spec, next(iter(sites.values())).device)
    common = choose_common_layout(spec, sites, precision, estimate=job.memory, pace=job.hours_of_steps)
    if workers is not None and workers not in common.sizes:
        raise SpecError(
            "this run cannot be of that size", got=f"{workers} workers", allowed=", ".join(map(str, common.sizes))
        )
    chosen = workers or max([size for size in common.sizes if size <= room], default=common.sizes[0])
    check_room(spec, cluster, chosen, room=room, gpus_per_worker=sites[chosen].gpus_per_worker)
    why = f"; of the sizes {', '.join(map(str, common.sizes))} the largest with room" if workers is None else ""
    way = _Way(
        site=sites[chosen],
        layout=common.at(chosen),
        reasons=(why_precision, *common.reasons),
        fits=fits(job.memory(common.at(chosen)), sites[chosen]),
        peak_gib=job.memory(common.at(chosen)).peak_gib.mid,
        gpu_hours=job.cost(sites[chosen], common.at(chosen)).gpu_hours.mid,
    )
    return way, why, tuple(_size_plan(job, sites[size], common.at(size), room) for size in common.sizes)


def _size_plan(job: _Job, site: Site, layout: Layout, room: int) -> SizePlan:
    cost = None if job.steps is None else job.cost(site, layout)
    return SizePlan(
        workers=layout.workers,
        has_room=layout.workers <= room,
        accumulation=job.spec.training.global_batch // layout.workers // layout.micro_batch,
        peak_gib=job.memory(layout).peak_gib,
        wall_hours=cost.wall_hours if cost else None,
        gpu_hours=cost.gpu_hours if cost else None,
        usd=cost.usd if cost else None,
    )


def _way(job: _Job, cluster: ClusterShape, workers: int) -> _Way:
    site = place_workers(job.spec, cluster, workers)
    precision, why_precision = choose_precision(job.spec, site.device)
    layout, why = choose_layout(
        job.spec,
        site,
        precision,
        estimate=job.memory,
        pace=lambda one: job.cost(site, one).wall_hours.mid,
    )
    memory = job.memory(layout)
    return _Way(
        site=site,
        layout=layout,
        reasons=(why_precision, *why),
        fits=fits(memory, site),
        peak_gib=memory.peak_gib.mid,
        gpu_hours=job.cost(site, layout).gpu_hours.mid,
    )


def _cheapest(ways: list[_Way]) -> tuple[_Way, str]:
    """Of the numbers of workers that surely fit, the largest that costs little more than the cheapest; and why."""
    if len(ways) == 1:
        return ways[0], ""
    fitting = [way for way in ways if way.fits]
    if not fitting:
        return min(ways, key=lambda way: way.peak_gib), f"; none of {len(ways)} numbers of workers surely fits"
    least = min(fitting, key=lambda way: way.gpu_hours)
    chosen = [way for way in fitting if way.gpu_hours <= AUTO_WORKERS_PREMIUM * least.gpu_hours][-1]
    why = f"; workers: auto takes the most that cost at most {100 * (AUTO_WORKERS_PREMIUM - 1):.0f} % more than the "
    why += f"cheapest, {least.site.workers} with {least.gpu_hours:.3g} device hours"
    more = [way for way in fitting if way.site.workers > chosen.site.workers]
    if more:
        extra = 100 * (more[0].gpu_hours / least.gpu_hours - 1)
        why += f"; next would be {more[0].site.workers}, {extra:.0f} % more device hours"
    return chosen, why


def check_samples(spec: RunSpec) -> None:
    """What can be known wrong without a cluster: raises ModelError when the samples are longer than the context, or the
    base cannot be trained so."""
    _shape(spec, None)


def about_length(spec: RunSpec, counts: DatasetCounts) -> tuple[str, ...]:
    """How long a training is and what its samples are, or what is asked instead, a sentence each. Raises what
    `make_plan` raises of them."""
    return _job(spec, counts).length.reasons


def plan_stage(
    spec: RunSpec,
    cluster: ClusterShape,
    *,
    counts: DatasetCounts | None,
    begins_with: str,
    measured: MeasuredSpeed | None = None,
) -> RunPlan:
    """`make_plan` for a stage whose base is not there yet: the spec's model stands in for it, and what would be told
    of that one's head is not true of the base. `begins_with` says in a sentence what it will be."""
    job = replace(_job(spec, counts), about_base=(), measured=measured)
    plan = _planned(job, cluster, counts=counts, workers=None, kept=None)
    return replace(plan, reasons=(*plan.reasons, begins_with))


def check_follows(spec: RunSpec, *, before: TrainedTask) -> None:
    """Raises ModelError where the model that a training for the task `before` leaves lacks a head that the next one, a
    language model, would take as it is drawn. The spec's model stands in for it."""
    if not spec.models_language or task_of(spec.task).auto_class == task_of(before).auto_class:
        return
    config = model_config(spec.model)
    if task_of(spec.task).hides_tokens:
        refuse_frozen_head(spec, str(config.get("model_type")))
    elif not model_shape(config, task=task_of(spec.task)).tied:
        raise ModelError(
            f"the model that task: {before} leaves has no output layer of its own, which would be drawn at random",
            got=f"{spec.name} with task: {spec.task}",
            do="put the stages that predict tokens first, or begin with a model whose output layer is its token table",
        )


def _shape(spec: RunSpec, counts: DatasetCounts | None) -> tuple[ModelShape, int, tuple[str, ...]]:
    """The model's shape, its trainable weights, and notes on its base.

    Raises ModelError when the samples are longer than its context, or the base cannot be trained so.
    """
    length, own_tokenizer = spec.data.sequence_length, spec.model.base is not None and spec.model.tokenizer == "auto"
    vocabulary = None if counts is None or own_tokenizer else counts.vocab_size
    config, method = model_config(spec.model, vocab_size=vocabulary, sequence_length=length), method_of(spec.method)
    method.check_architecture(str(config["model_type"]))
    task = method.model_task(spec)
    if config["model_type"] not in (*DECODERS, *ENCODERS):  # whose tasks are known
        check_supported(config, task)
    shape = model_shape(config, task=task, num_labels=None if counts is None else counts.num_labels)
    virtual = method.positions(spec)
    if shape.context is not None and length + virtual > shape.context:
        beside = f" and {virtual} virtual tokens" if virtual else ""
        room = shape.context - virtual
        raise ModelError(
            "the samples are longer than the model's context",
            got=f"data.sequence_length: {length}{beside}",
            allowed=f"at most {shape.context} tokens",
            do=f"set data.sequence_length={room}" if room > 0 else f"set {spec.method}.tokens below {shape.context}",
        )
    notes = base_notes(spec, config, shape, label_names=None if counts is None else counts.label_names)
    if counts is not None and counts.retained is not None:
        check_same_classes(counts.label_names, counts.retained.label_names)
    return shape, trainable_parameters(spec, shape), notes


def _notes(job: _Job, counts: DatasetCounts | None, kept: Kept | None) -> Iterator[str]:
    """What the figures rest on."""
    spec, shape, trainable = job.spec, job.shape, job.trainable
    about = "" if shape.exact else f"about (the architecture {shape.model_type} is counted as a standard transformer) "
    yield (
        f"parameters: {about}{human_count(shape.parameters)}, of which method {spec.method} trains "
        + (f"{human_count(trainable)} ({100 * trainable / shape.parameters:.3g} %)" if trainable else "none")
    )
    if not spec.models_language and (counts is None or counts.num_labels is None):
        yield "labels: 2 assumed until the data is read"
    yield from job.about_base
    if spec.of_general_data is not None:
        general = None if counts is None else counts.retained
        much = "the held-out part" if general is None else f"{general.validation_samples:,} held-out samples"
        yield f"forgetting: {much} of the general data evaluated before the first step and at every evaluation"
    if spec.retain is not None and spec.retain.l2sp:
        yield f"l2sp: {human_count(trainable)} weights are kept as they began, 4 bytes each, sharded like the optimizer"
    if kept is not None:
        micro_batch = spec.training.micro_batch
        same = (
            "" if micro_batch == kept.micro_batch else f", whose micro-batches of {kept.micro_batch} do not divide it"
        )
        stage = spec.deepspeed.zero_stage
        if stage != kept.zero_stage:
            yield (
                f"zero_stage: {stage}, as set; the run's earlier attempts had {kept.zero_stage}, whose checkpoints are "
                "converted: losses go on within the order of sums, not to the last bit"
            )
        also = f"ZeRO stage {stage} and " if stage == kept.zero_stage else ""
        yield f"kept: {also}micro_batch {micro_batch} from the run's earlier attempts{same}"
    if spec.search is not None:
        yield "search: this is the base training; every trial is planned on its own"


def _cost_notes(job: _Job, layout: Layout, cost: RunCost | None) -> Iterator[str]:
    """What is computed once, and a warning where the middle estimate is above the budget, which would stop the run
    early."""
    budget, steps, (once, each) = job.spec.parsed_budget, job.steps, job.flops(layout)
    if job.keeps_features(layout):
        yield "features: the frozen backbone reads every row once; after that a step costs the head alone"
    if budget is None or cost is None or steps is None:
        return
    needs = {
        "usd": cost.usd.mid if cost.usd else 0.0,  # no price was refused with the placement
        "gpu-hours": cost.gpu_hours.mid,
        "hours": cost.wall_hours.mid,
        "flops": once + each * steps,
    }[budget.unit]
    if needs > budget.amount:
        much = "reading all rows takes" if job.asking is not None else f"{steps:,} steps take"
        end = "before its end" if job.asking is not None else f"near step {int(steps * budget.amount / needs):,}"
        yield (
            f"budget: {budget} is less than the {needs:.3g}{budget.unit} that {much} in the middle "
            f"estimate; the run will stop {end}"
        )
