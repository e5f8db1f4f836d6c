from __future__ import annotations

import json
import math
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import locations
from orchestrator.commands.verify_resume import (
    Comparison,
    FirstDifference,
    Verdict,
    check_request,
    collect,
    compare_figures,
    describe,
    read_points,
    resumed_step,
    verify,
    verify_command,
)
from orchestrator.errors import SpecError
from orchestrator.scheduling import rehearsal
from orchestrator.spec import RunSpec
from tests import specs
from tests.end_to_end import runs
from tests.end_to_end.commands import ROOT

STEPS = 6


def pretraining(corpus: Path, **changes: Any) -> RunSpec:
    """Two workers under ZeRO-2, dropout and accumulation on, a decay that ends far beyond the rehearsal."""
    return specs.spec(specs.PRETRAIN, **raw_pretraining(corpus, **changes))


def raw_pretraining(corpus: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data__train": str(corpus),
        "training__steps": 60,
        "training__micro_batch": 2,
        "resources__workers": 2,
        "deepspeed__zero_stage": 2,
    }
    return values | changes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return specs.write_corpus(tmp_path_factory.mktemp("corpus"))


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_search_is_refused_with_the_overrides_of_its_first_training() -> None:
    space = {"training.learning_rate": {"grid": [1e-3, 2e-3]}, "method": {"choice": ["full"]}}
    spec = specs.spec(specs.CLASSIFY, search={"space": space, "scheduler": "none"})
    with pytest.raises(SpecError) as caught:
        check_request(spec, 8)
    assert caught.value.do == (
        'verify one of its trainings: add search=null training.learning_rate=0.001 method="full"'
    )


@pytest.mark.parametrize("steps", [-1, 0, 3])
def test_fewer_steps_than_a_death_and_a_resume_need_are_refused(steps: int) -> None:
    with pytest.raises(SpecError, match="too few steps"):
        check_request(specs.spec(specs.PRETRAIN), steps)


def test_more_steps_than_the_plan_has_are_refused_before_ray_starts(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.scheduling import session

    monkeypatch.setattr(session, "ray_session", lambda: pytest.fail("Ray was asked for"))
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    with pytest.raises(SpecError, match="shorter than what should be verified") as caught:
        verify(pretraining(corpus, training__steps=7), runs.listener(), steps=8)
    assert caught.value.allowed == "4 to 7, the plan's steps"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/tune/demo.yaml"], "verify-resume takes one training"),
        (["configs/pretrain/demo.yaml", "--steps", "3"], "too few steps"),
        (["configs/pretrain/demo.yaml", "training.stepz=3"], "stepz"),
    ],
)
def test_the_command_ends_with_2_and_the_promised_object_after_a_mistake(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "orchestrator", "verify-resume", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["status"] == "failed"


# -- figures ---------------------------------------------------------------------------------------------------------


def figures(losses: list[float]) -> dict[tuple[int, str], list[float]]:
    return {(step, "train/loss"): [loss] for step, loss in enumerate(losses, start=1)}


def test_equal_figures_are_identical() -> None:
    (found,) = compare_figures(figures([3.0, 2.0]), figures([3.0, 2.0]), steps=[1, 2])
    assert found == Comparison(label="steps 1 to 2, train/loss", unit="steps", compared=2, different=0, first=None)


def test_the_smallest_difference_of_a_figure_counts_and_has_its_step() -> None:
    off = math.nextafter(2.0, 3.0)
    (found,) = compare_figures(figures([3.0, 2.0, 1.0]), figures([3.0, off, 1.5]), steps=[1, 2, 3])
    assert found.different == 2
    assert found.first is not None
    assert (found.first.name, found.first.step) == ("train/loss", 2)
    assert found.first.largest_absolute == 0.5
    assert found.first.largest_relative == pytest.approx(1 / 3)


def test_a_step_that_was_taken_twice_must_be_the_same_both_times() -> None:
    twice = collect([(1, "train/loss", 3.0), (2, "train/loss", 2.0), (2, "train/loss", 2.5)])
    (found,) = compare_figures(figures([3.0, 2.0]), twice, steps=[1, 2])
    assert found.first is not None
    assert found.first.step == 2


def test_a_missing_step_is_a_difference_and_two_infinite_losses_are_none() -> None:
    (found,) = compare_figures(figures([3.0, 2.0]), figures([3.0]), steps=[1, 2])
    assert found.different == 1
    (found,) = compare_figures(figures([math.inf, math.nan]), figures([math.inf, math.nan]), steps=[1, 2])
    assert found.different == 0


@pytest.mark.parametrize(
    ("steps", "resumed_from"),
    [([1, 2, 3, 4], None), ([1, 2, 3, 4, 5, 6, 5, 6], 4), ([1, 2, 1, 2, 3], 0), ([1, 2, 3, 3, 4, 3, 4], 2)],
)
def test_where_a_run_went_on_is_seen_by_the_steps_it_took_again(steps: list[int], resumed_from: int | None) -> None:
    points = [(step, metric, 1.0) for step in steps for metric in ("train/loss", "eval/loss")]
    assert resumed_step(points) == resumed_from


def test_points_are_read_attempt_after_attempt(tmp_path: Path) -> None:
    for attempt, steps in ((10, [7]), (2, [3, 4]), (1, [1, 2])):
        file = tmp_path / "outbox" / "metrics" / f"a{attempt}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"key": "train/loss", "value": 0.5, "step": step, "timestamp_ms": 1} for step in steps]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_points(tmp_path) == [(step, "train/loss", 0.5) for step in (1, 2, 3, 4, 7)]


# -- words -----------------------------------------------------------------------------------------------------------


def test_a_person_reads_what_differs_first_by_how_much_and_whose_fault_it_is() -> None:
    first = FirstDifference(
        what="first moments", name="h.0.weight", step=4, largest_absolute=1e-9, largest_relative=0.25
    )
    verdict = Verdict(
        identical=False,
        steps=8,
        resumed_from=4,
        first_difference=first,
        restarts=1,
        workers=2,
        zero_stage=2,
        cause="resume",
        killed="process 7 on 10.0.0.1, after step 6",
        folder="/runs/verify",
        comparisons=(
            Comparison(label="steps 1 to 4, train/loss", unit="steps", compared=4, different=0, first=None),
            Comparison(
                label="checkpoint of step 4, first moments", unit="tensors", compared=9, different=2, first=first
            ),
        ),
    )
    text = "\n".join(describe(verdict))
    assert "steps 1 to 4, train/loss                4 steps identical" in text
    assert "2 of 9 tensors differ, first h.0.weight, by at most 1e-09 (0.25 relative)" in text
    assert "different: first at step 4 in h.0.weight (first moments)" in text
    assert "the resume is at fault" in text
    assert "/runs/verify" in text


# -- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[str]:
    """Where runs go; nothing of a rehearsal may be left in it, and nothing in the cluster."""
    yield str(tmp_path / "runs")
    assert runs.leftovers() == {}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_and_resumed_training_is_the_undisturbed_one_bit_for_bit(
    corpus: Path, storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.yaml"
    values = raw_pretraining(corpus, checkpoint__storage=storage, resources__max_failures=0, budget="1usd")
    file.write_text(yaml.safe_dump(specs.raw(specs.PRETRAIN, **values)))
    store = Path(locations.default_tracking_uri().removeprefix("sqlite:///"))
    before = store.exists()
    assert verify_command(str(file), steps=STEPS, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (
        answer.items()
        >= {
            "identical": True,
            "steps": STEPS,
            "resumed_from": 3,
            "first_difference": None,
            "restarts": 1,
            "workers": 2,
            "zero_stage": 2,
            "cause": None,
        }.items()
    )
    assert answer["killed"].startswith("process ")
    labels = {comparison["label"] for comparison in answer["comparisons"]}
    assert {
        "steps 1 to 3, train/loss",
        "steps 4 to 6, train/grad_norm",
        "checkpoint of step 3, weights",
        "checkpoint of step 6, fp32 masters",
        "checkpoint of step 6, second moments",
        "checkpoint of step 6, step counters",
    } <= labels
    assert list(Path(storage).iterdir()) == []
    assert store.exists() == before, "a rehearsal is tracked nowhere"


def spoil(checkpoint: Path) -> None:
    """Flips one bit of an element of a first moment on rank 1, and makes the manifest fit.

    Not the lowest: three steps later the moment has decayed, and rounding may have swallowed that one.
    """
    import torch

    name = "state/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(checkpoint / name, weights_only=False)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"].view(torch.int32)[-1] ^= 1 << 12
    torch.save(state, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / name).read_bytes()
    manifest["files"][name] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_one_flipped_bit_in_the_checkpoint_is_found_and_named(
    corpus: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = rehearsal.kill_a_worker

    def kill_and_spoil() -> str:
        (checkpoint,) = Path(storage).glob("verify-*/killed/checkpoints/step-00000003")
        spoil(checkpoint)
        return kill()

    monkeypatch.setattr(rehearsal, "kill_a_worker", kill_and_spoil)
    verdict = verify(pretraining(corpus, checkpoint__storage=storage), runs.listener(), steps=STEPS)
    assert not verdict.identical
    assert verdict.cause == "resume"
    first = verdict.first_difference
    assert first is not None
    assert (first.what, first.name, first.step) == ("first moments", "transformer.ln_f.bias", 3)
    assert 0 < first.largest_relative < 1e-3
    later = {c.label for c in verdict.comparisons if c.first is not None}
    assert "checkpoint of step 6, first moments" in later, "the resumed training went on from the spoiled state"
    assert Path(str(verdict.folder), "killed", "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_training_that_does_not_repeat_itself_is_not_the_resumes_fault(
    corpus: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_of, seeds = rehearsal._job, iter(range(3))

    def with_another_seed(*arguments: Any, **options: Any) -> Any:
        job = job_of(*arguments, **options)
        training = job.spec.training.model_copy(update={"seed": next(seeds)})
        return job.__class__(**{**vars(job), "spec": job.spec.model_copy(update={"training": training})})

    monkeypatch.setattr(rehearsal, "_job", with_another_seed)
    spec = pretraining(corpus, checkpoint__storage=storage, resources__workers=1, deepspeed__zero_stage=0)
    verdict = verify(spec, runs.listener(), steps=4)
    assert verdict.cause == "training"
    assert verdict.first_difference is not None
    assert (verdict.first_difference.name, verdict.first_difference.step) == ("train/loss", 1)
