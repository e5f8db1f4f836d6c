"""`method: few_shot` in worker processes without Ray: tiny models with random weights, so that scores mean nothing
and are compared alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import locations
from orchestrator.errors import ModelError
from orchestrator.runs.file_exchange import exchange_at
from orchestrator.runs.job import TrainingJob, bucket_of
from orchestrator.scheduling.run_folder import SHARED
from tests import specs, training_runs
from tests.s3 import BUCKET

pytestmark = pytest.mark.slow

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256},
    "llama": {**training_runs.LLAMA, "max_position_embeddings": 256},
}
WORDS = {"bad": "the model reads", "good": "one line and the next"}
"""Of several tokens, and of different numbers of them."""


def base(kind: str) -> Path:
    folder = locations.home() / f"asked-{kind}"
    if not (folder / "model").exists():
        changes = {"model__config": kind, "model__overrides": SIZES[kind], "data__sequence_length": 64}
        training_runs.run(training_runs.pretrain(folder, training__steps=1, training__learning_rate=0.05, **changes))
    return folder / "model"


def asked(folder: Path, kind: str = "gpt2", **changes: Any) -> TrainingJob:
    values = {"method": "few_shot", "few_shot": {"examples": 3}, "model__base": str(base(kind)), "training": {}}
    values |= {"data__train": str(training_runs.rows()), "data__sequence_length": 32}
    return training_runs._job(folder, specs.CLASSIFY, **(values | changes))


def opening_of(job: TrainingJob) -> str:
    """What a run's prompts begin with, of the file that shows a whole one."""
    begins, _, _ = (job.run_folder / "prompt.txt").read_text().rpartition(job.spec.few_shot.template)
    return begins.strip()


def scores(job: TrainingJob) -> np.ndarray:
    found: np.ndarray = np.load(job.run_folder / "scores.npy")
    return found


@pytest.mark.parametrize("examples", [0, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_those_of_whole_prompts_read_one_by_one(kind: str, examples: int, tmp_path: Path) -> None:
    """The reference reads each prompt with each name as one text, without kept keys and values."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orchestrator.samples.open_split import open_split

    job = asked(tmp_path, kind, few_shot={"examples": examples, "words": WORDS})
    training_runs.run(job)
    tokenizer = AutoTokenizer.from_pretrained(job.spec.model.base)
    model = AutoModelForCausalLM.from_pretrained(job.spec.model.base, dtype=torch.float32).eval()
    begins, rows = opening_of(job), open_split(job.data.path, "validation")
    assert begins.count("Label: ") == examples
    expected = np.zeros((len(rows), 2))
    for row in range(len(rows)):
        text = tokenizer.decode(rows.batch(np.array([row]))["input_ids"][0], skip_special_tokens=True).strip()
        prompt = f"{begins}\n\n" * bool(begins) + f"Text: {text}\nLabel: "
        for place, word in enumerate((WORDS["bad"], WORDS["good"])):
            ids = torch.tensor([tokenizer(prompt + word)["input_ids"]])
            # Up to where the names part: the space before them belongs to their first tokens.
            shared = len(tokenizer(prompt.rstrip(" "))["input_ids"])
            with torch.no_grad():
                each = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            expected[row, place] = each[shared - 1 :].sum()
    assert np.allclose(scores(job), expected, atol=1e-4)


def test_figures_are_the_tasks_own_over_the_rows_that_a_training_is_measured_on(tmp_path: Path) -> None:
    outcome = training_runs.run(asked(tmp_path))
    job = asked(tmp_path)
    labels = np.load(job.data.path / "validation.labels.npy")
    found = scores(job)
    logs = found - np.logaddexp(found[:, :1], found[:, 1:])
    assert outcome.metrics["eval/accuracy"] == pytest.approx(np.mean(found.argmax(1) == labels))
    assert outcome.metrics["eval/loss"] == pytest.approx(-np.mean(logs[np.arange(len(labels)), labels]), rel=1e-5)
    assert (outcome.status, outcome.model_path, outcome.checkpoint) == ("finished", None, None)
    trained = training_runs.classify(tmp_path / "trained", data__sequence_length=32)
    assert trained.data.held_out.fingerprint == job.data.held_out.fingerprint


def test_calibration_takes_out_what_texts_without_content_prefer(tmp_path: Path) -> None:
    """As Zhao et al. (2021) have it: probabilities over the mean of those for N/A, [MASK] and nothing."""
    plain, calibrated = (asked(tmp_path / str(on), few_shot={"examples": 3, "calibrate": on}) for on in (False, True))
    alone = asked(tmp_path / "alone", few_shot={"examples": 3})
    outcomes = [training_runs.run(job) for job in (plain, calibrated)]
    found, labels = scores(plain), np.load(plain.data.path / "validation.labels.npy")
    assert np.array_equal(found, scores(calibrated)), "what is kept are the base's own"
    free = np.array([free_scores(alone, text) for text in ("N/A", "[MASK]", "")])
    preferred = np.mean(np.exp(free) / np.exp(free).sum(1, keepdims=True), axis=0)
    expected = [np.mean((found - shift).argmax(1) == labels) for shift in (0, np.log(preferred))]
    assert [outcome.metrics["eval/accuracy"] for outcome in outcomes] == pytest.approx(expected)
    assert outcomes[0].metrics["eval/loss"] != outcomes[1].metrics["eval/loss"]


def free_scores(job: TrainingJob, text: str) -> list[float]:
    """What the base gives "bad" and "good" behind a prompt about a text, read whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training_runs.run(job)
    tokenizer = AutoTokenizer.from_pretrained(job.spec.model.base)
    model = AutoModelForCausalLM.from_pretrained(job.spec.model.base, dtype=torch.float32).eval()
    prompt = f"{opening_of(job)}\n\nText: {text}\nLabel:"
    shared, found = len(tokenizer(prompt)["input_ids"]), []
    for word in ("bad", "good"):
        ids = torch.tensor([tokenizer(f"{prompt} {word}")["input_ids"]])
        with torch.no_grad():
            each = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        found.append(float(each[shared - 1 :].sum()))
    return found


def test_any_number_of_workers_and_rows_at_a_time_gives_the_same_scores(tmp_path: Path) -> None:
    jobs = [
        asked(tmp_path / name, training__micro_batch=at_a_time, training__global_batch=24, resources__workers=workers)
        for name, workers, at_a_time in (("alone", 1, 12), ("two", 2, 12), ("few", 1, 1))
    ]
    for job in jobs:
        training_runs.run(job)
    assert np.array_equal(scores(jobs[0]), scores(jobs[1]))
    assert np.allclose(scores(jobs[0]), scores(jobs[2]), atol=1e-5)


def test_a_run_that_was_stopped_goes_on_with_the_rows_that_are_left(tmp_path: Path) -> None:
    whole, job = asked(tmp_path / "whole", training__micro_batch=1), asked(tmp_path / "cut", training__micro_batch=1)
    training_runs.run(whole)
    stopped = training_runs.run(job, stop_at=5)
    left = int(np.isnan(scores(job)).any(axis=1).sum())
    assert stopped.status == "interrupted"
    assert 0 < left < len(scores(job))
    (job.run_folder / "history.jsonl").unlink()
    ended = training_runs.run(job)
    first = json.loads((job.run_folder / "history.jsonl").read_text().splitlines()[0])
    assert first["step"] == len(scores(job)) - left, "rows that are known are not asked about again"
    assert ended.status == "finished"
    assert np.array_equal(scores(job), scores(whole))


def test_another_machine_goes_on_with_the_scores_that_lie_in_the_runs_bucket(s3: Any, tmp_path: Path) -> None:
    """Both machines are folders here; what the driver fetches in the end is there too."""
    whole = asked(tmp_path / "whole", training__micro_batch=1)
    training_runs.run(whole)

    def on(machine: str) -> TrainingJob:
        storage = f"s3://{BUCKET}/asked"
        job = asked(tmp_path / machine / "run", training__micro_batch=1, checkpoint__storage=storage)
        return replace(job, exchanged_at=bucket_of(job.spec, job.run_folder))

    second, events = on("second"), training_runs.Events
    group = training_runs.Workers(1)  # started now, so that the environment leads to the store
    try:
        assert group.run(on("first"), events(stop_at=5)).status == "interrupted"
        assert group.run(second, events()).status == "finished"
    finally:
        group.end()
    assert np.array_equal(scores(second), scores(whole))
    first = json.loads((second.run_folder / "history.jsonl").read_text().splitlines()[0])
    assert first["step"] > 0, "rows that are known are not asked about again"
    driver = tmp_path / "driver" / "run"
    exchange_at(driver, second.exchanged_at).fetch(*SHARED)
    assert np.array_equal(np.load(driver / "scores.npy"), scores(whole))
    assert {file.name for file in driver.iterdir()} >= {"outcome.json", "prompt.txt", "outbox"}


def test_scores_of_another_shape_or_torn_are_not_taken_up(tmp_path: Path) -> None:
    job = asked(tmp_path)
    (tmp_path / "scores.npy").write_bytes(b"torn")
    assert training_runs.run(job).status == "finished"
    whole = scores(job)
    np.save(tmp_path / "scores.npy", np.zeros((3, 2)))
    training_runs.run(job)
    assert np.array_equal(scores(job), whole)


def test_a_budget_ends_it_without_figures_of_a_part_of_the_rows(tmp_path: Path) -> None:
    outcome = training_runs.run(asked(tmp_path, budget="0.001hours", training__micro_batch=1))
    assert outcome.status == "stopped_by_budget"
    assert "budget 0.001hours" in outcome.notes[-1]
    assert not [name for name in outcome.metrics if name.startswith("eval/")]


def test_examples_that_do_not_fit_are_refused_with_the_way_out(tmp_path: Path) -> None:
    job = asked(tmp_path)
    long = replace(
        job, spec=job.spec.model_copy(update={"few_shot": job.spec.few_shot.model_copy(update={"examples": 30})})
    )
    with pytest.raises(ModelError, match="do not fit into the model's context") as caught:
        training_runs.run(long)
    assert "few_shot.examples" in str(caught.value)
