"""What a run is: one typed, frozen `RunSpec`. `load_spec` reads it from YAML; nothing below changes it.

Every cross-field rule that needs no file, model or cluster is checked here, at construction, because a mistake
found after nodes came up has cost money. Messages state the remedy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from orchestrator.credentials import hide
from orchestrator.method_names import AS_IS, EVALUATE
from orchestrator.quantities import Budget, divisors, parse_budget
from orchestrator.ranking import Goal
from orchestrator.spec_data import DataSpec
from orchestrator.spec_deepspeed import DeepSpeedSpec, step_elsewhere
from orchestrator.spec_methods import MethodChoice
from orchestrator.spec_numbers import Count, CountOrZero, Rate, RateOrZero, Samples, Seed
from orchestrator.spec_retain import RetainSpec
from orchestrator.spec_search import SearchSpec
from orchestrator.spec_survival import BadStepsSpec, Block, CheckpointSpec, ResourcesSpec, StopSpec
from orchestrator.tasks.names import ANSWERED_CHAT, TrainedTask
from orchestrator.tasks.registry import task_of

Kind = Literal["pretrain", "finetune", "evaluate"]
Task = TrainedTask
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
ClassWeights = Literal["none", "balanced"]

OF_CLASSES = ("label_smoothing", "class_weights")
"""Fields of `training` that are for classification."""
MASKING_RATE = 0.15
"""Share of the tokens that a masked language model predicts: Devlin et al. 2019, and nearly everyone since."""


class ModelSpec(Block):
    """Which model: new weights from an architecture (`config`), or pretrained ones (`base`)."""

    config: str | None = None
    """Architecture for new weights: `gpt2`, `llama`, `bert`, `roberta`, or the path of a Hugging Face `config.json`
    or its folder."""
    overrides: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Values that replace those of the architecture, by their Hugging Face names (`n_layer: 4`)."""
    base: str | None = None
    """Pretrained model: a folder, `package://NAME/path`, a hub name, or `runs:/ID` for a finished run's model."""
    adapter: str | None = None
    """For `kind: evaluate`: folder of peft's adapter that `base` is measured with, as `export: adapter` leaves it."""
    tokenizer: str = "auto"
    """`auto` is the base model's own, or for new weights a BPE trained on the corpus; else a folder or hub name."""
    vocab_size: Samples = 8192
    """Entries of a tokenizer trained on the corpus; not used when a tokenizer is given."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.config is None) == (self.base is None):
            raise ValueError("set exactly one of model.config (new weights) and model.base (pretrained weights)")
        if self.base is not None and self.overrides:
            raise ValueError(
                "model.overrides changes an architecture, and pretrained weights fit only their own: "
                "remove overrides, or use model.config for new weights"
            )
        return self


class TrainingSpec(Block):
    """How to train. Exactly one of `tokens`, `steps` and `epochs` gives the length."""

    tokens: Count | None = None
    """Length as tokens seen: special ones count, padding does not; rounded up to steps of the average batch."""
    steps: Count | None = None
    """Length as optimizer steps."""
    epochs: Rate | None = None
    """Length as passes over the training data; where they end within a batch, the next pass fills it up."""
    global_batch: Samples
    """Samples per optimizer step over all workers; it does not change with their number."""
    micro_batch: Literal["auto"] | Samples = "auto"
    """Samples per worker and forward pass; `auto` takes the largest that divides the batch and fits."""
    learning_rate: Rate
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: cosine or linear to `final_learning_rate_fraction`, or constant."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises linearly, from a first share of the peak to the peak."""
    final_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate that the decay has reached one step after the last, as a share of the peak; so the last step learns
    where this is 0."""
    weight_decay: RateOrZero = 0.01
    """AdamW's decoupled weight decay; biases and normalisation weights are left out."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay."""
    adam_epsilon: Rate = 1e-8
    """AdamW's denominator term."""
    gradient_clip: RateOrZero = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Precision = "auto"
    """Number format of the forward pass; `auto` is bf16 where the device has it, fp32 on a CPU."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, a third more time; `auto` where nothing else fits."""
    seed: Seed = 0
    """Seeds initial weights, dropout, data order and masks."""
    masking_rate: Annotated[float, Field(gt=0, lt=1)] = MASKING_RATE
    """Share of the tokens of each block that `task: masked-lm` predicts."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For classification, share of the target that is spread over all classes (Szegedy et al. 2016). Evaluations are
    without it."""
    class_weights: ClassWeights = "none"
    """For classification, `balanced` has all classes count alike in the loss, however few rows they have. Evaluations
    count rows."""
    eval_every_steps: Count | None = None
    """Evaluate on the held-out data every so many steps; always also at the end."""
    stop: StopSpec | None = None
    """Ends the run early where evaluations stop getting better: `{patience: 3}`."""
    bad_steps: BadStepsSpec = BadStepsSpec()
    """What to do about losses and gradients that are not finite, and about spikes of the loss."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"training.{name}" for name in given) or "none of them"
            raise ValueError(
                f"set exactly one of training.tokens, training.steps and training.epochs; got {found}. "
                "On the command line, training.tokens=null clears a field"
            )
        return self

    @model_validator(mode="after")
    def _is_evaluated(self) -> Self:
        if self.stop is not None and self.eval_every_steps is None:
            raise ValueError("training.stop judges evaluations on the way: set training.eval_every_steps")
        return self

    def workers_between(self, least: int, most: int | None = None) -> list[int]:
        """The numbers of workers in a range over which the global batch splits, the smallest first."""
        micro_batch = 1 if self.micro_batch == "auto" else self.micro_batch
        if self.global_batch % micro_batch:
            return []
        return divisors(self.global_batch // micro_batch, least=least, most=most)

    def splits_over(self, workers: int) -> bool:
        """Whether the global batch is a whole number of micro-batches for each of so many workers."""
        micro_batch = 1 if self.micro_batch == "auto" else self.micro_batch
        return self.global_batch % (workers * micro_batch) == 0


class UntrainedSpec(TrainingSpec):
    """What is left of it for a method that trains nothing."""

    steps: CountOrZero | None = 0
    """There are none."""
    learning_rate: RateOrZero = 0.0
    """Of no steps."""


class TrackingSpec(Block):
    """Where results go."""

    enabled: bool = True
    """Off logs nothing to MLflow; results stay in the run's folder."""
    uri: Annotated[str, AfterValidator(hide)] | None = None
    """MLflow store; none given is `$MLFLOW_TRACKING_URI`, or a SQLite file below `$ORCHESTRATOR_HOME`. A password in it
    is used to connect, and neither shown nor stored with the run."""
    experiment: str = "default"
    """MLflow experiment."""


class RunSpec(MethodChoice):
    """One training, or with `search` a search of trainings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run and its folder: letters, digits, `.`, `_` and `-`."""
    kind: Kind
    """`pretrain` trains every weight on raw text; `finetune` adapts a base model to a task; `evaluate` trains nothing
    and measures `model.base` on `data.validation`, or on what a training on `data.train` would hold out."""
    model: ModelSpec
    """Which model."""
    task: Task = "causal-lm"
    """What is learnt: the next token (`causal-lm`), tokens that are hidden from an encoder (`masked-lm`), the class of
    a text (`text-classification`), or what an assistant answers (`chat`)."""
    data: DataSpec
    """Which examples."""
    training: TrainingSpec
    """How to train."""
    retain: RetainSpec | None = None
    """Measures and limits what the training forgets of what its base knew."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """`auto`, `{zero_stage: 2, ...raw DeepSpeed keys}`, or the path of a JSON file with DeepSpeed keys."""
    resources: ResourcesSpec = ResourcesSpec()
    """What each training gets from the cluster."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When and where the run is saved."""
    budget: Annotated[str, Field(pattern=r"^[0-9.]")] | None = None
    """`50usd`, `100gpu-hours`, `1e20flops` or `8hours`: the run stops cleanly before that, evaluated, with a checkpoint
    and its model; a larger budget goes on from there. A search spends one budget over all its trials (`hours` are those
    of the whole search): trials begin while there is enough for them, pruned ones give back what they did not need."""
    tracking: TrackingSpec = TrackingSpec()
    """Where results go."""
    search: SearchSpec | None = None
    """Turns the training into a search of trainings."""

    @field_validator("budget")
    @classmethod
    def _budget_parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_budget(value)
        return value

    @model_validator(mode="after")
    def _kind_task_and_method_agree(self) -> Self:
        if self.kind == "pretrain" and not task_of(self.task).reads_raw_text:
            raise ValueError(
                f"kind: pretrain learns task: causal-lm or masked-lm; for task: {self.task} use kind: finetune"
            )
        if (self.kind == EVALUATE) != (self.method == AS_IS):
            raise ValueError(
                f"kind: {EVALUATE} measures a model as it is: remove method: {self.method}"
                if self.kind == EVALUATE
                else f"method: {AS_IS} trains nothing, and is for kind: {EVALUATE} alone"
            )
        if self.kind != EVALUATE and self.model.adapter is not None:
            raise ValueError(f"model.adapter is for kind: {EVALUATE}: merge it (export: merged) to train on it")
        if self.kind == EVALUATE and self.model.base is None:
            raise ValueError(f"kind: {EVALUATE} needs model.base, the model that is measured")
        if self.kind == "finetune" and self.model.base is None:
            raise ValueError("kind: finetune needs model.base; to compare with new weights use method: scratch")
        if self.models_language and self.data.label_column is not None:
            raise ValueError("data.label_column is for task: text-classification; remove it, or set that task")
        return self

    @model_validator(mode="after")
    def _fields_are_of_the_task(self) -> Self:
        if not task_of(self.task).is_classification:
            for name in OF_CLASSES:
                if getattr(self.training, name) != TrainingSpec.model_fields[name].default:
                    raise ValueError(f"training.{name} is for classification, and this is task: {self.task}: remove it")
        if task_of(self.task).form != "chats":
            for name in ("chat_template", "too_long"):
                if getattr(self.data, name) != DataSpec.model_fields[name].default:
                    raise ValueError(f"data.{name} is for task: {ANSWERED_CHAT}: remove it, or set that task")
        return self

    @model_validator(mode="after")
    def _masks_can_be_drawn(self) -> Self:
        if not task_of(self.task).hides_tokens:
            if self.training.masking_rate != MASKING_RATE:
                raise ValueError(
                    f"training.masking_rate is for task: masked-lm, and this is task: {self.task}: remove it, or set "
                    "that task"
                )
        elif self.data.sequence_length < 3:
            raise ValueError(
                "task: masked-lm needs data.sequence_length of at least 3: each block begins and ends with a special "
                "token"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits(self) -> Self:
        training, workers = self.training, self.resources.workers
        if isinstance(workers, tuple):
            self._some_size_splits(*workers)
        elif workers != "auto" and training.global_batch % workers:
            lower = training.global_batch // workers * workers
            near = f"{lower} or {lower + workers}" if lower else f"{workers}"
            raise ValueError(
                f"training.global_batch {training.global_batch} cannot be split over {workers} workers: "
                f"use {near}, or other resources.workers"
            )
        elif workers != "auto" and not training.splits_over(workers):
            raise ValueError(
                f"training.micro_batch {training.micro_batch} does not divide the {training.global_batch // workers} "
                "samples that each worker gets per step: use one of its divisors, or auto"
            )
        return self

    def _some_size_splits(self, least: int, most: int) -> None:
        sizes = self.training.workers_between(1)
        if any(least <= count <= most for count in sizes):
            return
        batch, micro_batch = self.training.global_batch, self.training.micro_batch
        near = sorted({*[n for n in sizes if n < least][-1:], *[n for n in sizes if n > most][:1]})
        wider = f"let resources.workers reach {' or '.join(map(str, near))}, or " if near else ""
        multiple = least * (1 if micro_batch == "auto" else micro_batch)
        set_micro_batch = "" if micro_batch == "auto" else f" in micro-batches of {micro_batch}"
        raise ValueError(
            f"training.global_batch {batch} cannot be split{set_micro_batch} over any number of workers from {least} "
            f"to {most}: {wider}use training.global_batch={-(-batch // multiple) * multiple}"
        )

    @model_validator(mode="after")
    def _best_can_be_told(self) -> Self:
        if self.checkpoint.keep == "best" and self.training.eval_every_steps is None:
            raise ValueError("checkpoint.keep: best compares evaluations: set training.eval_every_steps")
        return self

    @model_validator(mode="after")
    def _something_can_be_retained(self) -> Self:
        retain, training = self.retain, self.training
        if retain is None:
            return self
        if self.model.base is None:
            raise ValueError(
                "retain keeps what a base knows, and new weights know nothing: set model.base, or remove it"
            )
        if self.models_language and retain.label_column is not None:
            raise ValueError("retain.label_column is for task: text-classification; remove it, or set that task")
        if self.replayed == training.global_batch:
            raise ValueError(
                f"retain.replay {retain.replay:g} of training.global_batch {training.global_batch} leaves no sample of "
                "the training data: lower retain.replay, or use a larger training.global_batch"
            )
        if training.learning_rate * retain.l2sp >= 1:
            raise ValueError(
                f"retain.l2sp {retain.l2sp:g} x training.learning_rate {training.learning_rate:g} would pull weights "
                f"past their values in the base: use retain.l2sp below {1 / training.learning_rate:g}"
            )
        if retain.l2sp and (past := step_elsewhere(self.deepspeed.raw)):
            raise ValueError(
                f"retain.l2sp acts within the optimizer's step, which deepspeed.{past} replaces: remove one"
            )
        return self

    @model_validator(mode="after")
    def _search_can_prune(self) -> Self:
        trains = not isinstance(self.training, UntrainedSpec)
        if (
            trains
            and self.search is not None
            and self.search.scheduler == "asha"
            and self.training.eval_every_steps is None
        ):
            raise ValueError("search.scheduler: asha compares trials at evaluations: set training.eval_every_steps")
        if self.search is not None and self.resources.is_elastic:
            raise ValueError("a search's trials keep their size: set resources.workers to a number or auto")
        return self

    @property
    def models_language(self) -> bool:
        """Whether tokens of the examples themselves are predicted, by the output layer that a base has."""
        return task_of(self.task).models_language

    @property
    def data_key(self) -> str:
        """Equal for specs whose data is encoded alike."""
        return self.model_dump_json(include={"data", "model", "task", "retain"})

    @property
    def keeps_best(self) -> bool:
        """Whether the model that is left is that of the best evaluation."""
        keep = self.checkpoint.keep
        return keep == "best" or (keep == "auto" and self.training.eval_every_steps is not None)

    @property
    def replayed(self) -> int:
        """Samples of each global batch that are general data: the share rounded, at least one unless it is 0."""
        share = 0.0 if self.retain is None else self.retain.replay
        return max(1, round(share * self.training.global_batch)) if share else 0

    @property
    def of_general_data(self) -> RunSpec | None:
        """The spec whose data is the general data of `retain`, to prepare it alike; None where none is given."""
        if self.retain is None or self.retain.data is None:
            return None
        return self.model_copy(update={"data": self.retain.data_spec(self.data), "retain": None})

    @property
    def parsed_budget(self) -> Budget | None:
        """The budget as a value, or None."""
        return None if self.budget is None else parse_budget(self.budget)

    @property
    def goal(self) -> Goal:
        """What ranks the result: the metric that a search names, else that of the task."""
        named = (None, "auto") if self.search is None else (self.search.metric, self.search.mode)
        return Goal.of(named[0] or task_of(self.task).ranked_by, named[1])

    def fingerprint(self) -> str:
        """Eight hex digits over what `identity` gives: equal for a run and its resumption."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the result, as plain JSON values.

        Left out: where results and checkpoints go, the number of workers, failures, bad steps, price and budget; what
        the model is measured on once it is there; and what is not used or not set, so that runs keep the fingerprint
        they had before there was such a field.
        """
        left_out: dict[str, Any] = dict.fromkeys(
            ("tracking", "checkpoint", "resources", "budget", "deepspeed", "name"), True
        )
        unused = set() if task_of(self.task).hides_tokens else {"masking_rate"}
        unused |= set() if self.training.stop else {"stop"}
        unused |= {
            name for name in OF_CLASSES if getattr(self.training, name) == TrainingSpec.model_fields[name].default
        }
        usual = type(self.data).model_fields
        later = ("split_seed", "delimiter", "incomplete_rows", "validation_split", "chat_template", "too_long")
        unset = {name for name in later if getattr(self.data, name) == usual[name].default} | {"test", "test_split"}
        left_out |= {
            "training": {"bad_steps", *unused},
            "data": unset,
            "model": {"adapter"} if self.model.adapter is None else set(),
            **dict.fromkeys(MethodChoice.model_fields, True),
        }
        if self.retain is None:
            left_out["retain"] = True
        if isinstance(self.training, UntrainedSpec):
            left_out["training"] = set(TrainingSpec.model_fields) - ({"precision", "seed", "masking_rate"} - unused)
        kept = self.model_dump(mode="json", exclude=left_out) | self.method_identity()
        kept["data"]["text_column"] = self.data.text_column or "text"  # as when that was the default
        return kept


class UntrainedRunSpec(RunSpec):
    """A run whose method trains nothing."""

    training: UntrainedSpec
    """What counts of a training without steps: seed, precision, and how many rows are read together."""
