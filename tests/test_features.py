from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.methods.registry import method_of
from orchestrator.planning.plan import make_plan
from orchestrator.runs.job import TrainingJob
from orchestrator.samples.forms.labelled_texts import LabelledSamples
from orchestrator.samples.open_split import open_split
from orchestrator.worker.features import FeatureSamples, HeadAlone
from tests import training_runs
from tests.test_families import CASES, spec
from tests.training_runs import CLUSTER, classify

CLASSIFIERS = [config for config, task in CASES if task == "text-classification"]
CPU = torch.device("cpu")


def rows(vocab: int) -> LabelledSamples:
    """Twelve rows of 5 to 16 tokens."""
    lengths = np.array([5, 16, 9, 12, 7, 16, 5, 11, 8, 6, 14, 10])
    tokens = np.random.default_rng(0).integers(5, vocab, lengths.sum())
    return LabelledSamples(tokens, lengths=lengths, labels=np.arange(12) % 3, pad_id=1, longest=16)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CLASSIFIERS, ids=lambda config: config["model_type"])
def test_a_head_of_every_known_architecture_reads_one_vector_of_a_row(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    values = {name: value for name, value in config.items() if name != "model_type"}
    torch.manual_seed(0)
    made = AutoConfig.for_model(config["model_type"], **{**values, "num_labels": 3, "pad_token_id": 1})
    model: Any = AutoModelForSequenceClassification.from_config(made)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # so that positions and rows differ by much
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.to(dtype)
    samples, asked = rows(config["vocab_size"]), spec("head", "text-classification")
    model = method_of("head").adapt(model.eval(), asked)
    batch = samples.batch(np.arange(12))
    with torch.no_grad():
        whole = model(**{name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}).logits
    alone = HeadAlone(model, dtype=dtype, device=CPU)
    read = alone.reading(samples)
    assert read is not None
    alone_or_together = [np.array([row]) for row in range(12)] if dtype == torch.float32 else [np.arange(12)]
    vectors = torch.cat([read(*alone._seen(samples, some)).float() for some in alone_or_together])
    features = FeatureSamples(samples, vectors)
    alone.cut()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, _ in model.named_parameters()} == trained, "the backbone is gone"
    given = features.batch(np.arange(12))
    assert (given["labels"] == batch["labels"]).all()
    with torch.no_grad():
        again = model(**{name: torch.from_numpy(given[name]) for name in ("inputs_embeds", "attention_mask")}).logits
    assert again.dtype == dtype
    apart = 1e-4 if dtype == torch.float32 else 0.02
    assert torch.allclose(again, whole, rtol=apart, atol=apart * float(whole.abs().max()))


def test_rows_of_features_count_as_the_rows_that_they_are() -> None:
    samples = rows(100)
    features = FeatureSamples(samples, torch.arange(24.0).view(12, 2))
    assert (features.token_count, len(features)) == (samples.token_count, 12)
    some = np.array([3, 0, 3])
    assert (features.lengths(some) == samples.lengths(some)).all()
    assert features.padded_length(some) == samples.padded_length(some)
    batch = features.batch(some, pad_to=16)
    assert batch["inputs_embeds"].tolist() == [[[6.0, 7.0]], [[0.0, 1.0]], [[6.0, 7.0]]]
    assert (batch["labels"] == samples.batch(some)["labels"]).all()


# -- what is planned -------------------------------------------------------------------------------------------------


def planned(job: TrainingJob, **changes: Any) -> Any:
    return make_plan(job.spec.model_copy(update=changes), CLUSTER, counts=job.data.counts)


@pytest.mark.slow
def test_features_are_planned_where_rows_are_seen_again_and_cost_one_pass(tmp_path: Path) -> None:
    job = classify(tmp_path, method="head")
    training = job.spec.training

    def plan(steps: int, stage: int = 0) -> Any:
        deepspeed = job.spec.deepspeed.model_copy(update={"zero_stage": stage})
        return planned(job, training=training.model_copy(update={"steps": steps}), deepspeed=deepspeed)

    rows = job.data.counts.train_samples
    enough = rows // training.global_batch + 1
    once, often, short, split = plan(enough), plan(10 * enough), plan(enough - 1), plan(enough, stage=3)
    assert short.flops_once == split.flops_once == 0
    assert once.flops_once == often.flops_once == pytest.approx(short.flops_per_step / 8 * rows, rel=0.1)
    assert often.flops_per_step < short.flops_per_step / 10
    assert any(reason.startswith("features: ") for reason in often.reasons)
    assert job.data.counts.train_samples * 32 * 4 / 2**30 < often.peak_gib.mid - short.peak_gib.mid


@pytest.mark.slow
def test_a_step_on_kept_features_runs_no_backbone(tmp_path: Path) -> None:
    jobs = {steps: classify(tmp_path / str(steps), method="head", training__steps=steps) for steps in (5, 40)}
    outcomes = {steps: training_runs.run(job) for steps, job in jobs.items()}
    assert jobs[5].plan.flops_once == 0 < jobs[40].plan.flops_once
    assert outcomes[40].metrics["cost/flops"] < 3 * outcomes[5].metrics["cost/flops"]
    assert "measured/tokens_per_second" in outcomes[5].metrics
    assert "measured/tokens_per_second" not in outcomes[40].metrics, "a head's pace says nothing of a backbone's"


@pytest.mark.slow
def test_a_head_that_reads_every_position_is_trained_with_its_backbone(tmp_path: Path) -> None:
    job = classify(tmp_path, method="head")
    samples = open_split(job.data.path, "train")

    class EveryPosition(torch.nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body = Body()
            self.score = torch.nn.Linear(4, 2)

        def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None) -> Any:
            hidden = self.body(input_ids=input_ids, inputs_embeds=inputs_embeds).last_hidden_state
            return of_logits(self.score(hidden.amax(1)))

    model = EveryPosition()
    alone = HeadAlone(model, dtype=torch.float32, device=CPU)
    assert alone.reading(samples) is None
    assert isinstance(model.body, Body)


class Body(torch.nn.Module):
    config = None

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1000, 4).requires_grad_(False)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.table(input_ids) if inputs_embeds is None else inputs_embeds)


def of_logits(logits: torch.Tensor) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits)
