from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from orchestrator.runs.job import TrainingJob
from orchestrator.samples.masking import Masking
from orchestrator.worker import models
from orchestrator.worker.features import HeadAlone
from orchestrator.worker.model_inputs import ModelInputs
from orchestrator.worker.objectives import logits_of
from tests.training_runs import classify


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """A group of this process alone, unless an earlier test has left one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Told:
    """What a training is told by its inputs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.batches = 0

    def count(self) -> None:
        self.batches += 1


def inputs_of(job: TrainingJob, told: Told) -> ModelInputs:
    masking = Masking(rate=job.spec.training.masking_rate, seed=0)
    return ModelInputs(job, masking=masking, device=torch.device("cpu"), say=told.notes.append, before_batch=told.count)


def built(job: TrainingJob) -> Any:
    return models.build_model(job.spec, job.plan, job.data).eval()


@pytest.mark.slow
def test_a_backbone_reads_the_rows_once_and_the_head_gives_the_same_for_what_it_read(tmp_path: Path) -> None:
    job, told = classify(tmp_path, method="head"), Told()
    inputs, whole = inputs_of(job, told), built(job)
    rows = inputs.train
    model = built(job)
    inputs.cache_features(model)
    assert told.batches > 0
    some = np.arange(5)
    assert set(inputs.train.batch(some)) == {"inputs_embeds", "attention_mask", "labels"}
    assert (inputs.train.lengths(some) == rows.lengths(some)).all()
    given, as_rows = inputs.compared(), inputs.compared_rows()
    assert set(given) == {"inputs_embeds", "attention_mask"}
    assert set(as_rows) == {"input_ids", "attention_mask"}
    assert torch.allclose(logits_of(model, given), logits_of(whole, as_rows), atol=1e-5)

    read = told.batches
    again = built(job)
    inputs.cache_features(again)
    assert told.batches == read, "a training that goes back to its start keeps what was read"
    assert torch.equal(logits_of(again, given), logits_of(model, given))


def test_an_exported_state_has_the_backbone_again_beside_what_was_trained(tmp_path: Path) -> None:
    job = classify(tmp_path, method="head")
    inputs, model = inputs_of(job, Told()), built(job)
    untrained = built(job).state_dict()
    assert inputs.whole(untrained).keys() == untrained.keys()
    inputs.cache_features(model)
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    assert model.state_dict().keys() < untrained.keys()
    state = inputs.whole(model.state_dict())
    assert state.keys() == untrained.keys()
    changed = {name for name, weight in state.items() if not torch.equal(weight, untrained[name])}
    assert changed == {"classifier.bias"}


def test_rows_are_compared_whole_where_features_stand_for_them_however_large_the_model(tmp_path: Path) -> None:
    job = classify(tmp_path, method="head")
    job = replace(job, plan=replace(job.plan, parameters=700_000_000_000))
    inputs = inputs_of(job, Told())
    assert inputs.compared_rows()["input_ids"].shape == inputs.compared()["input_ids"].shape == (4, 8)
    longest = inputs.validation.lengths(np.arange(4)).max()
    inputs.cache_features(built(job))
    assert inputs.compared_rows()["input_ids"].shape[1] >= longest > 8


def test_where_a_head_reads_every_position_the_rows_stay_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadAlone, "reading", lambda self, samples: None)
    job, told = classify(tmp_path, method="head"), Told()
    inputs, model = inputs_of(job, told), built(job)
    rows, names = inputs.train, set(model.state_dict())
    inputs.cache_features(model)
    assert len(told.notes) == 1
    assert told.notes[0].startswith("features: the head does not read one vector of a row")
    assert inputs.train is rows
    assert set(model.state_dict()) == names
    assert "input_ids" in inputs.compared()
