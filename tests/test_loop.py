from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoints.file_sums import file_crc32
from orchestrator.data.splits import Split
from orchestrator.errors import DivergedError, FencedError, StorageError
from orchestrator.planning.checkpoint_interval import FIRST_INTERVAL_STEPS
from orchestrator.runs.attempts import Attempts, Held
from orchestrator.runs.job import Outcome, TrainingJob
from orchestrator.samples.open_split import open_split
from orchestrator.worker.best_weights import BestWeights
from orchestrator.worker.recovery import INTERVAL_METRIC
from tests import training_runs
from tests.training_runs import ROBERTA, WorkerDied, classify, continued, curve, fill_gaps, history, pretrain, retained

pytestmark = pytest.mark.slow

MakeJob = Callable[..., TrainingJob]
EVERY = {"checkpoint__every_steps": 3, "training__eval_every_steps": 2}


def again(job: TrainingJob, **changes: Any) -> TrainingJob:
    """The same run with another budget, or another field that does not change what is computed."""
    return replace(job, spec=job.spec.model_copy(update=changes))


def assert_same_curves(resumed: TrainingJob, uninterrupted: TrainingJob) -> None:
    for name in training_runs.SAME_AFTER_RESUME:
        assert curve(resumed, name) == curve(uninterrupted, name), name


def evaluations(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in outcome.metrics.items() if name.startswith("eval/")}


CASES: list[tuple[MakeJob, dict[str, Any]]] = [
    *((pretrain, {"resources__workers": 2, "deepspeed__zero_stage": stage}) for stage in range(4)),
    (pretrain, {"training__precision": "bf16", "deepspeed__zero_stage": 0}),
    (classify, {"method": "full"}),
    (classify, {"method": "lora", "resources__workers": 2, "deepspeed__zero_stage": 3}),
    (classify, {"method": "lora", "deepspeed__zero_stage": 3, "training__precision": "bf16"}),
    (classify, {"method": "qlora", "resources__workers": 2, "deepspeed__zero_stage": 2}),
    (classify, {"method": "head", "deepspeed__zero_stage": 2}),
    (classify, {"method": "head", "resources__workers": 2}),
    (classify, {"method": "ia3", "resources__workers": 2, "deepspeed__zero_stage": 3}),
    (classify, {"method": "last_layers", "last_layers": {"layers": 1}, "layerwise": {"decay": 0.5}}),
    (fill_gaps, {"resources__workers": 2, "deepspeed__zero_stage": 2}),
    (fill_gaps, {"resources__workers": 2, "deepspeed__zero_stage": 3, "training__micro_batch": 2}),
    (retained, {"training__precision": "bf16", "deepspeed__zero_stage": 0}),
    (retained, {"resources__workers": 2, "deepspeed__zero_stage": 3}),
]


@pytest.mark.parametrize(("make", "changes"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(
    tmp_path: Path, make: MakeJob, changes: dict[str, Any]
) -> None:
    uninterrupted, resumed = (make(tmp_path / name, **EVERY, **changes) for name in ("uninterrupted", "resumed"))
    whole = training_runs.run(uninterrupted)
    stopped = training_runs.run(resumed, stop_at=4)
    assert (stopped.status, stopped.step, stopped.model_path) == ("interrupted", 4, None)
    assert not resumed.outcome_file.exists()
    rest = training_runs.run(resumed)
    assert (rest.status, rest.step) == ("finished", 6)
    assert_same_curves(resumed, uninterrupted)
    assert evaluations(rest) == evaluations(whole)


def test_a_run_that_was_killed_goes_on_from_its_checkpoint_to_the_last_bit(tmp_path: Path) -> None:
    changes = {"resources__workers": 2, "deepspeed__zero_stage": 2, "checkpoint__every_steps": 2}
    uninterrupted, killed = (pretrain(tmp_path / name, **changes) for name in ("uninterrupted", "killed"))
    training_runs.run(uninterrupted)
    with pytest.raises(WorkerDied):
        training_runs.run(killed, kill_at=5)
    training_runs.run(killed)
    steps = [json.loads(line)["step"] for line in (killed.run_folder / "history.jsonl").read_text().splitlines()]
    # The one of step 4 was still being written, or not.
    assert steps[steps.index(5) + 1] in (2, 4), "it went on from the newest complete checkpoint"
    assert_same_curves(killed, uninterrupted)


def test_under_auto_checkpoints_are_as_far_apart_as_was_decided_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    changes = {"checkpoint__every_steps": "auto", "training__steps": 40, "resources__workers": 2}
    whole, resumed = (pretrain(tmp_path / name, **changes) for name in ("whole", "resumed"))
    # After so many deaths the next is expected in seconds, and checkpoints are wanted every few steps.
    attempts = Attempts(resumed.run_folder)
    old, new = [attempts.open(workers=2, cause="a death") for _ in range(200)][-1], 201
    training_runs.run(whole)
    with pytest.raises(WorkerDied):
        training_runs.run(replace(resumed, attempt=old), kill_at=35)
    decided = decided_intervals(resumed)
    assert decided[0][0] == FIRST_INTERVAL_STEPS
    assert len(decided) > 1, "the second by what the first has cost"
    for (step, interval), following in zip(decided, saved_steps(resumed)[1:], strict=False):
        assert following == step + interval
    assert attempts.open(workers=2, cause="a kill") == new
    training_runs.run(replace(resumed, attempt=new))
    assert attempts.resumed_step(new) in (0, *saved_steps(resumed))
    assert_same_curves(resumed, whole)


def decided_intervals(job: TrainingJob) -> list[tuple[int, int]]:
    """(step, steps to the next checkpoint), as it was logged."""
    points = [
        json.loads(line) for file in job.run_folder.glob("outbox/a*.jsonl") for line in file.read_text().splitlines()
    ]
    return [(point["step"], int(point["value"])) for point in points if point["key"] == INTERVAL_METRIC]


def saved_steps(job: TrainingJob) -> list[int]:
    news = [json.loads(line) for line in (job.run_folder / "history.jsonl").read_text().splitlines()]
    return sorted({each["step"] for each in news if each["phase"] == "saving" and each["step"] < each["steps"]})


def test_costs_go_on_where_they_were(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    stopped = training_runs.run(job, stop_at=3)
    finished = training_runs.run(job)
    for name in ("cost/gpu_hours", "train/tokens", "cost/flops"):
        assert finished.metrics[name] > stopped.metrics[name], name
    assert finished.metrics["cost/flops"] == pytest.approx(6 * job.plan.flops_per_step)
    assert finished.metrics["train/tokens"] == 6 * job.plan.tokens_per_step


def test_a_finished_run_that_runs_again_takes_no_step_and_gives_the_same_outcome(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    first = training_runs.run(job)
    lines = len((tmp_path / "history.jsonl").read_text().splitlines())
    second = training_runs.run(job)
    assert second == first == Outcome.from_dict(json.loads(job.outcome_file.read_text()))
    news = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()[lines:]]
    assert {item["phase"] for item in news} == {"training", "saving", "exporting"}
    assert {item["step"] for item in news} == {6}


def test_a_stop_in_the_last_step_is_finished_by_the_same_command(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    assert training_runs.run(job, stop_at=6).status == "interrupted"
    finished = training_runs.run(job)
    assert finished.status == "finished"
    assert "eval/loss" in finished.metrics
    assert len(curve(job)) == 6


def damage(checkpoint: Path) -> None:
    file = max((checkpoint / "state").rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_passed_over_with_a_note_and_without_a_trace_in_the_curve(tmp_path: Path) -> None:
    uninterrupted, job = (pretrain(tmp_path / name, checkpoint__every_steps=2) for name in ("whole", "damaged"))
    training_runs.run(uninterrupted)
    training_runs.run(job, stop_at=5)
    damage(job.checkpoints / "step-00000005")
    finished = training_runs.run(job)
    assert_same_curves(job, uninterrupted)
    assert [note for note in finished.notes if "step-00000005 is damaged" in note]
    assert sorted(path.name[-1] for path in job.checkpoints.iterdir()) == ["2", "4", "6"]


def test_without_a_good_checkpoint_the_run_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    job = pretrain(tmp_path, checkpoint__every_steps=2)
    training_runs.run(job, stop_at=3)
    before = sorted(job.checkpoints.iterdir())
    for checkpoint in before:
        damage(checkpoint)
    with pytest.raises(StorageError, match="--fresh"):
        training_runs.run(job)
    assert sorted(job.checkpoints.iterdir()) == before


@pytest.mark.parametrize("make", [pretrain, fill_gaps, retained])
def test_a_run_goes_on_at_another_number_of_workers_on_the_same_samples_and_masks(
    tmp_path: Path, make: MakeJob
) -> None:
    def job(name: str, workers: int) -> TrainingJob:
        changes = {"training__micro_batch": 2, "deepspeed__zero_stage": 2}
        return make(tmp_path / name, resources__workers=workers, **changes)

    training_runs.run(job("fixed", 2))
    training_runs.run(job("resized", 1), stop_at=2)
    training_runs.run(job("resized", 2), stop_at=4)
    training_runs.run(job("resized", 1))
    resized, fixed = curve(job("resized", 1)), curve(job("fixed", 2))
    assert len(fixed) == 6
    assert resized == pytest.approx(fixed, abs=1e-5)


def test_hidden_tokens_are_the_same_at_any_number_of_workers_and_any_micro_batch(tmp_path: Path) -> None:
    """Without dropout, whose draws follow micro-batches, the losses are equal then: each of them predicts as many."""
    steady = {"model__overrides": ROBERTA | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    curves = []
    for workers, micro_batch in ((1, 8), (1, 2), (2, 4), (2, 1)):
        split = {"resources__workers": workers, "training__micro_batch": micro_batch}
        job = fill_gaps(tmp_path / f"{workers}-{micro_batch}", **steady, **split, **EVERY)
        training_runs.run(job)
        curves.append(curve(job))
    assert len(curves[0]) == 6
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], abs=1e-5)


def test_held_out_tokens_are_hidden_alike_at_every_evaluation_and_for_every_seed(tmp_path: Path) -> None:
    still = {"task": "masked-lm", "training__learning_rate": 1e-12}
    base = fill_gaps(tmp_path / "base", **EVERY)
    training_runs.run(base)
    found = []
    for seed in (0, 5):
        changes = {**still, "training__seed": seed, "data__validation": str(training_runs.corpus())}
        job = continued(tmp_path / str(seed), base.model_folder, **changes, **EVERY)
        found.append(training_runs.run(job).metrics["eval/loss"])
        news = [json.loads(line)["metrics"] for line in (job.run_folder / "history.jsonl").read_text().splitlines()]
        found += [metrics["eval/loss"] for metrics in news if "eval/loss" in metrics]
    assert found == pytest.approx([found[0]] * len(found), abs=1e-6)


def test_a_base_without_a_masked_lm_head_gets_a_new_one_and_the_run_says_so(tmp_path: Path) -> None:
    rows = {"data__train": str(training_runs.rows()), "data__sequence_length": 16}
    job = continued(tmp_path, training_runs.bert(), task="masked-lm", training__learning_rate=1e-2, **rows)
    training_runs.run(job, stop_at=3)
    outcome = training_runs.run(job)
    assert [note for note in outcome.notes if "comes without a masked-LM head" in note]
    losses = curve(job)
    assert losses[-1] < losses[0] - 0.1, "it is trained"


def test_a_run_goes_on_under_another_zero_stage_when_its_spec_asks_for_it(tmp_path: Path) -> None:
    def job(name: str, stage: int) -> TrainingJob:
        return pretrain(tmp_path / name, resources__workers=2, deepspeed__zero_stage=stage)

    training_runs.run(job("same", 2))
    training_runs.run(job("other", 2), stop_at=2)
    training_runs.run(job("other", 3), stop_at=4)
    training_runs.run(job("other", 0))
    same, other = curve(job("same", 2)), curve(job("other", 0))
    assert len(other) == 6
    assert other == pytest.approx(same, abs=1e-5)


def test_adapters_beside_tied_embeddings_go_on_under_any_zero_stage(tmp_path: Path) -> None:
    """DeepSpeed leaves the frozen token table out of a checkpoint, but not its other name, the output layer's."""
    base = pretrain(tmp_path / "base", training__steps=1)
    training_runs.run(base)

    def job(name: str, stage: int) -> TrainingJob:
        changes = {"method": "lora", "resources__workers": 2, "training__learning_rate": 1e-2}
        return continued(tmp_path / name, base.model_folder, deepspeed__zero_stage=stage, **changes)

    training_runs.run(job("same", 3))
    for steps, stage in ((1, 3), (2, 2), (3, 3), (4, 0), (5, 3), (None, 3)):
        training_runs.run(job("other", stage), stop_at=steps)
    same, other = curve(job("same", 3)), curve(job("other", 3))
    assert len(other) == 6
    assert other == pytest.approx(same, abs=1e-5)


class _Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(("written", "read"), [(0, 0), (2, 2), (3, 3), (2, 3), (3, 0)])
def test_a_planted_checkpoint_file_that_would_run_code_is_refused(tmp_path: Path, written: int, read: int) -> None:
    import torch

    job = pretrain(tmp_path / "run", deepspeed__zero_stage=written)
    training_runs.run(job, stop_at=2)
    checkpoint = job.checkpoints / "step-00000002"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        file, trap = checkpoint / name, _Trap(tmp_path / "sprung")
        torch.save({**torch.load(file, weights_only=False), "extra": trap}, file)
        manifest["files"][name] |= {"bytes": file.stat().st_size, "crc32": file_crc32(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="cannot be loaded"):
        training_runs.run(pretrain(tmp_path / "run", deepspeed__zero_stage=read))
    assert not (tmp_path / "sprung").exists()


# -- bad steps -----------------------------------------------------------------------------------------------------


def test_a_step_whose_loss_is_not_finite_is_undone_and_its_samples_are_left_out(tmp_path: Path) -> None:
    changes = {"resources__workers": 2, "deepspeed__zero_stage": 2, "checkpoint__every_steps": 2}
    healthy, job = (pretrain(tmp_path / name, **changes) for name in ("healthy", "ill"))
    training_runs.run(healthy)
    outcome = training_runs.run(job, spoil_at=4)
    assert outcome.status == "finished"
    assert any("step 5: the loss is nan" in note for note in outcome.notes)
    (rewind,) = json.loads((job.run_folder / "rewinds.json").read_text())
    assert (rewind["to_step"], rewind["skipped"]) == (2, [3, 4])
    assert len(rewind["samples"]) == 2 * job.plan.global_batch
    taken, expected = history(job), history(healthy)
    assert [taken[step] for step in (1, 2, 3)] == [expected[step] for step in (1, 2, 3)]
    assert all(math.isfinite(figures["train/loss"]) for each in taken.values() for figures in each)
    assert taken[5] != expected[5], "its samples were left out"


@pytest.mark.parametrize("make", [pretrain, retained])
def test_bad_weights_without_a_checkpoint_mean_back_to_the_start(tmp_path: Path, make: MakeJob) -> None:
    healthy, job = (make(tmp_path / name) for name in ("healthy", "ill"))
    training_runs.run(healthy)
    outcome = training_runs.run(job, spoil_at=2)
    assert outcome.status == "finished"
    assert history(job)[1] == history(healthy)[1]
    (rewind,) = json.loads((job.run_folder / "rewinds.json").read_text())
    assert (rewind["to_step"], rewind["skipped"]) == (0, [1, 2])


def test_bad_steps_that_come_back_end_the_run_with_advice(tmp_path: Path) -> None:
    job = pretrain(tmp_path, training__bad_steps__max_rewinds=0)
    with pytest.raises(DivergedError, match="diverges") as caught:
        training_runs.run(job, spoil_at=2)
    assert "learning_rate" in str(caught.value.do)


# -- zombies -------------------------------------------------------------------------------------------------------


def test_a_worker_of_an_old_attempt_writes_neither_checkpoint_nor_metric(tmp_path: Path) -> None:
    job = pretrain(tmp_path, checkpoint__every_steps=2)
    attempts = Attempts(tmp_path)
    old = replace(job, attempt=attempts.open(workers=1, cause="first start"))
    attempts.open(workers=1, cause="another driver")
    with pytest.raises(FencedError):
        training_runs.run(old)
    assert not list(tmp_path.glob("checkpoints/step-" + "[0-9]" * 8))
    assert all(not file.read_text() for file in tmp_path.glob("outbox/*.jsonl"))


# -- budget --------------------------------------------------------------------------------------------------------


def of_steps(job: TrainingJob, steps: float) -> str:
    return f"{steps * job.plan.flops_per_step:.6e}flops"


def test_a_run_has_cost_what_its_start_and_its_earlier_attempts_took(tmp_path: Path) -> None:
    job = pretrain(tmp_path, training__steps=2)
    job = replace(job, started_s=time.time() - 100.0, held_before=Held(wall_seconds=50.0, device_seconds=60.0))
    finished = training_runs.run(job)
    spent_s = 3600 * finished.metrics["cost/gpu_hours"]
    assert 160.0 < spent_s < 160.0 + 60.0
    assert 3600 * finished.metrics["measured/gpu_hours"] >= spent_s


def test_a_budget_stops_the_run_before_it_is_overrun_with_checkpoint_evaluation_and_model(tmp_path: Path) -> None:
    job = pretrain(tmp_path, resources__workers=2)
    job = again(job, budget=of_steps(job, 3.5))
    stopped = training_runs.run(job)
    assert (stopped.status, stopped.step) == ("stopped_by_budget", 3)
    assert stopped.metrics["cost/flops"] <= 3.5 * job.plan.flops_per_step
    assert "eval/loss" in stopped.metrics
    assert stopped.checkpoint == str(job.checkpoints / "step-00000003")
    assert (job.model_folder / "model.safetensors").is_file()
    assert "budget" in stopped.notes[-1]


def test_a_spent_budget_allows_nothing_and_a_raised_one_the_rest(tmp_path: Path) -> None:
    whole, job = pretrain(tmp_path / "whole"), pretrain(tmp_path / "stopped")
    training_runs.run(whole)
    job = again(job, budget=of_steps(job, 3.5))
    first = training_runs.run(job)
    exported = (job.model_folder / "model.safetensors").stat().st_mtime_ns
    assert training_runs.run(job) == first, "the same command again says the same"
    assert len(curve(job)) == 3
    assert (job.model_folder / "model.safetensors").stat().st_mtime_ns == exported
    finished = training_runs.run(again(job, budget=of_steps(job, 100)))
    assert (finished.status, finished.step) == ("finished", 6)
    assert_same_curves(job, whole)


def test_a_budget_below_one_step_takes_none(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    stopped = training_runs.run(again(job, budget=of_steps(job, 0.5)))
    assert (stopped.status, stopped.step) == ("stopped_by_budget", 0)
    assert "eval/loss" in stopped.metrics


def test_a_budget_that_just_suffices_finishes_the_run(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    assert training_runs.run(again(job, budget=of_steps(job, 6.01))).status == "finished"


# -- evaluation ------------------------------------------------------------------------------------------------------


def plain_evaluation(job: TrainingJob) -> dict[str, float]:
    """The figures of the exported model: sample by sample, without padding, in numpy's float64."""
    from sklearn.metrics import f1_score

    counts = job.data.counts
    losses, true, predicted = plain_predictions(job, "validation", range(counts.validation_samples))
    some = np.linspace(0, counts.train_samples - 1, counts.validation_samples).astype(int)
    learnt, *_ = plain_predictions(job, "train", some)
    mean = float(np.mean(losses))
    found = {"eval/loss": mean, "eval/generalization_gap": mean - float(np.mean(learnt))}
    if job.spec.task == "text-classification":
        correct = float(np.mean(np.array(true) == np.array(predicted)))
        return found | {"eval/accuracy": correct, "eval/macro_f1": float(f1_score(true, predicted, average="macro"))}
    found |= {"eval/perplexity": float(np.exp(mean))}
    return found | ({"eval/bits_per_byte": bits_per_byte(job, losses)} if job.spec.task == "causal-lm" else {})


def plain_predictions(
    job: TrainingJob, split: Split, numbers: Iterable[int]
) -> tuple[list[float], list[int], list[int]]:
    """Of the exported model for samples of a split: losses, what was true, what was predicted."""
    import torch

    from orchestrator.worker.models import auto_class

    model = auto_class(job.spec.task).from_pretrained(job.model_folder).eval()
    samples = open_split(job.data.path, split)
    losses: list[float] = []
    true: list[int] = []
    predicted: list[int] = []
    for index in numbers:
        batch = samples.batch(np.array([index]), pad_to=int(samples.lengths(np.array([index]))[0]))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(batch["input_ids"])).logits[0].double().numpy()
        logits, labels = np.atleast_2d(logits), batch["labels"].reshape(-1)
        if "positions" in batch:
            logits = logits[batch["positions"][0]]
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels])
        true, predicted = [*true, *labels], [*predicted, *logits.argmax(-1)]
    return losses, true, predicted


def bits_per_byte(job: TrainingJob, losses: list[float]) -> float:
    """By hand: all nats in bits, over the bytes that the predicted tokens of a byte-level BPE stand for."""
    from tokenizers import Tokenizer

    parsed = Tokenizer.from_file(str(job.data.tokenizer_folder / "tokenizer.json"))
    samples = open_split(job.data.path, "validation")
    predicted = samples.batch(np.arange(len(samples)))["labels"].ravel()
    text = b"".join(parsed.decode([token]).encode() for token in predicted if token != job.data.eos_id)
    assert len(text) < job.data.validation_bytes, "of the last block a part is dropped"
    return sum(losses) / math.log(2) / len(text)


def with_short_tokens(folder: Path, **changes: Any) -> TrainingJob:
    return pretrain(folder, model__vocab_size=270, **changes)


@pytest.mark.parametrize("make", [pretrain, with_short_tokens, classify, fill_gaps])
def test_evaluation_is_exact_and_does_not_depend_on_workers_or_micro_batch(tmp_path: Path, make: MakeJob) -> None:
    rate = {"training__learning_rate": 1e-12}  # steps round differently; what is compared is the evaluation
    found = []
    for number, (workers, micro, stage) in enumerate([(1, 8, 0), (1, 1, 0), (2, 3, 3)]):
        job = make(
            tmp_path / str(number),
            **rate,
            resources__workers=workers,
            training__global_batch=workers * micro,
            training__micro_batch=micro,
            deepspeed__zero_stage=stage,
        )
        assert job.data.counts.validation_samples % (workers * micro) or micro == 1, "no batch is cut short"
        found.append(evaluations(training_runs.run(job)))
    exact = plain_evaluation(job)
    for figures in found:
        assert figures == pytest.approx(exact, abs=2e-6, rel=2e-6)


def test_forgetting_is_the_rise_of_the_loss_on_the_held_out_general_text(tmp_path: Path) -> None:
    job = retained(tmp_path / "run", resources__workers=2, deepspeed__zero_stage=3)
    found = training_runs.run(job).metrics
    assert job.data.retained is not None
    general = replace(job, data=job.data.retained)
    base = Path(str(job.spec.model.base)).parent
    before, after = (plain_evaluation(replace(general, run_folder=at))["eval/loss"] for at in (base, job.run_folder))
    assert found["eval/retained_loss"] == pytest.approx(after, abs=2e-6)
    assert found["eval/forgetting"] == pytest.approx(after - before, abs=4e-6)
    first = next(line for line in (job.run_folder / "history.jsonl").read_text().splitlines() if '"step": 1' in line)
    assert json.loads(first)["metrics"]["eval/forgetting"] == 0
    assert json.loads(first)["metrics"]["eval/retained_loss"] == pytest.approx(before, abs=2e-6)


def test_rungs_are_evaluated_besides_the_usual_steps_and_change_nothing_of_the_training(tmp_path: Path) -> None:
    plain, ranked = (pretrain(tmp_path / name, training__eval_every_steps=4) for name in ("plain", "ranked"))
    training_runs.run(plain)
    training_runs.run(replace(ranked, rungs=(1, 3, 4)))
    assert (evaluated_steps(plain), evaluated_steps(ranked)) == ([4, 6], [1, 3, 4, 6])
    assert_same_curves(ranked, plain)


def evaluated_steps(job: TrainingJob) -> list[int]:
    news = [json.loads(line) for line in (job.run_folder / "history.jsonl").read_text().splitlines()]
    return [item["step"] for item in news if item["phase"] == "evaluating"]


# -- the best weights ------------------------------------------------------------------------------------------------

WORSE = {**EVERY, "training__learning_rate": 3.0, "training__warmup_fraction": 0.99}
"""Steps that are far too large, each larger than the one before: the last evaluation is not the best."""


def misled(folder: Path, **changes: Any) -> TrainingJob:
    """A classifier that learns which class is common from rows where it is the other one than among those held out: the
    more it learns, the worse it gets."""
    folder.mkdir(parents=True)
    for name, common, rare in (("train", "good", "bad"), ("held-out", "bad", "good")):
        rows = [f"the film number {number},{rare if number % 10 == 0 else common}" for number in range(60)]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    data = {"data__train": str(folder / "train.csv"), "data__validation": str(folder / "held-out.csv")}
    learns = {"training__learning_rate": 0.01, "training__warmup_fraction": 0.0, "training__schedule": "constant"}
    return classify(folder, **{**changes, **data, **learns})


KINDS: list[tuple[MakeJob, dict[str, Any]]] = [
    (pretrain, {"resources__workers": 2, "deepspeed__zero_stage": 3}),
    (pretrain, {"training__precision": "bf16", "deepspeed__zero_stage": 0}),
    (misled, {"method": "lora", "resources__workers": 2, "deepspeed__zero_stage": 2}),
    (misled, {"method": "head"}),
]


def evaluated(job: TrainingJob) -> dict[int, dict[str, float]]:
    """Figures by step, as they were logged."""
    found: dict[int, dict[str, float]] = {}
    for file in job.run_folder.glob("outbox/a*.jsonl"):
        for point in map(json.loads, file.read_text().splitlines()):
            if point["key"].startswith("eval/"):
                found.setdefault(point["step"], {})[point["key"]] = point["value"]
    return found


def best_step(job: TrainingJob) -> int:
    goal, found = job.spec.goal, evaluated(job)
    return max(found, key=lambda step: (goal.goodness(found[step][goal.metric]), -found[step]["eval/loss"], -step))


@pytest.mark.parametrize(("make", "changes"), KINDS)
def test_the_model_of_the_best_evaluation_is_left_also_after_a_stop(
    tmp_path: Path, make: MakeJob, changes: dict[str, Any]
) -> None:
    job, stopped = (make(tmp_path / name, **{**WORSE, **changes}) for name in ("whole", "stopped"))
    whole = training_runs.run(job)
    best = best_step(job)
    assert whole.model_step == best < 6
    assert evaluations(whole) == evaluated(job)[best]
    tolerance = 0.02 if job.plan.precision == "bf16" else 2e-6
    assert evaluations(whole) == pytest.approx(plain_evaluation(job), abs=tolerance, rel=tolerance)
    assert any(f"the model is that of step {best}" in note for note in whole.notes)
    assert training_runs.run(stopped, stop_at=5).status == "interrupted"
    rest = training_runs.run(stopped)
    assert (rest.model_step, evaluations(rest)) == (whole.model_step, evaluations(whole))
    assert plain_evaluation(stopped) == plain_evaluation(job)


def test_of_equal_evaluations_the_one_with_the_smaller_loss_is_best_and_none_without_a_loss(tmp_path: Path) -> None:
    job = classify(tmp_path, training__eval_every_steps=1)
    recovery: Any = None  # nothing is written
    best = BestWeights(job, recovery, leads=True, agree=lambda value: value, compared={})
    engine: Any = None  # an evaluation that is the last leaves its weights there
    for step, accuracy, loss in ((1, 0.5, 0.7), (2, 0.5, 0.6), (3, 0.5, 0.6), (4, 0.9, math.nan), (5, 0.4, 0.1)):
        best.judge(engine, step, {"eval/accuracy": accuracy, "eval/loss": loss}, is_last=True)
    assert (best.step, best.metrics) == (2, {"eval/accuracy": 0.5, "eval/loss": 0.6})


def test_a_number_of_checkpoints_to_keep_leaves_the_last_weights(tmp_path: Path) -> None:
    job = pretrain(tmp_path, **WORSE, checkpoint__keep=2)
    outcome = training_runs.run(job)
    assert (outcome.model_step, outcome.step) == (None, 6)
    assert best_step(job) < 6
    assert evaluations(outcome) == pytest.approx(plain_evaluation(job), abs=2e-6, rel=2e-6)


def test_a_best_evaluation_whose_weights_are_lost_does_not_count(tmp_path: Path) -> None:
    job = pretrain(tmp_path, **WORSE)
    training_runs.run(job, stop_at=5)
    shutil.rmtree(tmp_path / "best")
    outcome = training_runs.run(job)
    assert outcome.model_step is None
    assert evaluations(outcome) == evaluated(job)[6]


# -- endings ---------------------------------------------------------------------------------------------------------


def test_a_trial_stopped_out_of_a_report_leaves_cleanly_and_another_training_follows(tmp_path: Path) -> None:
    stopped, other = pretrain(tmp_path / "stopped", **EVERY), pretrain(tmp_path / "other", **EVERY)
    with pytest.raises(SystemExit):
        training_runs.run(stopped, exit_at_report=4)
    (file,) = stopped.run_folder.glob("outbox/*.jsonl")
    points = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"train/loss", "eval/loss"} <= {point["key"] for point in points if point["step"] == 4}
    assert not stopped.outcome_file.exists()
    assert training_runs.run(other).status == "finished"
    assert history(stopped)[4] == history(other)[4]
