from __future__ import annotations

import pytest

from orchestrator.errors import SpecError
from orchestrator.progress_line import standing
from orchestrator.submission.job_server import Job
from orchestrator.submission.job_table import cells, check_name_is_free, ending_of, find_job, job_name, row_of

PLAIN = "python -m jobs.pretrain --config configs/pretrain/demo.yaml training.steps=3"
COMMANDS = {"logs": "orchestrator logs x --follow", "stop": "orchestrator stop x"}
STOPPED = """step 48/400  loss 6.2  spent 0.1usd of 1usd
error: stopped at step 48 of 400, with a checkpoint
  got:     /runs/demo/checkpoints/step-00000048
  do:      the same command goes on from there"""


def job(identity: str, status: str = "running", **more: object) -> Job:
    return Job(submission_id=identity, status=status, entrypoint=PLAIN, **more)  # type: ignore[arg-type]


def test_a_row_says_where_a_job_stands() -> None:
    log = ["starting workers", "step 40/200  loss 3.2100  12.3k tokens/s  ETA 1m05s  spent 0.12usd of 5usd"]
    row = row_of(job("a-1", metadata={"name": "a", "owner": "ada", "kind": "pretrain"}), standing(log))
    assert cells(row) == ("a", "a-1", "ada", "running", "", "40/200", "1m05s", "0.12usd", "4.88usd", "")


def test_a_search_stands_by_its_trials() -> None:
    log = ["trial 0 step 4: eval/loss 3", "trials 1/4  ETA 3m00s  spent 0.5usd of 2usd", "trial 1 step 4: eval/loss 3"]
    row = row_of(job("s-1", metadata={"name": "s"}), standing(log))
    assert cells(row) == ("s", "s-1", "", "running", "", "1/4 trials", "3m00s", "0.5usd", "1.5usd", "")
    assert (row.trials, row.trial, row.step) == ("1/4", "1 step 4", None)
    assert cells(row_of(job("s-1"), standing(log[:1])))[5] == "0 step 4"


def test_a_job_that_waits_has_its_place_and_one_that_is_over_waits_for_nothing() -> None:
    waiting = standing(["waiting for room: 8 GPUs; place 3 in the queue"])
    assert (row_of(job("a-1"), waiting).state, row_of(job("a-1"), waiting).place) == ("waiting for room", 3)
    ended = row_of(job("a-1", "failed"), waiting)
    assert (ended.state, ended.place, ended.doing) == ("failed", None, "")


def test_a_job_that_is_over_has_no_time_left() -> None:
    assert row_of(job("a-1", "stopped"), standing(["step 4/9  loss 1.0  9 tokens/s  ETA 1m00s"])).eta_s is None


def test_a_job_of_rays_own_command_is_known_by_its_file_and_any_other_by_itself() -> None:
    assert job_name(job("raysubmit_x")) == "demo"
    assert (
        job_name(Job(submission_id="other", status="running", entrypoint="python train.py --config a.yaml")) == "other"
    )
    assert job_name(Job(submission_id="other", status="running", entrypoint="echo 'torn")) == "other"


def test_a_name_means_the_job_that_is_alive_else_the_newest() -> None:
    jobs = [job(f"demo-{n}", "stopped", metadata={"name": "demo"}) for n in (3, 2, 1)]
    assert find_job("demo", jobs).submission_id == "demo-3"
    jobs[1] = job("demo-2", metadata={"name": "demo"})
    assert find_job("demo", jobs).submission_id == "demo-2"
    assert find_job("demo-1", jobs).submission_id == "demo-1"
    with pytest.raises(SpecError, match=r"no such job[\s\S]*allowed: demo\n"):
        find_job("dem", jobs)


def test_a_name_is_free_once_its_jobs_are_over() -> None:
    check_name_is_free("demo", [job("demo-1", "stopped"), job("x", metadata={"name": "other"})], COMMANDS)
    for alive in (job("a", metadata={"name": "demo", "owner": "ada"}), job("demo", "pending", metadata={"name": "b"})):
        with pytest.raises(SpecError, match=r"a job named demo is [\s\S]*orchestrator stop x"):
            check_name_is_free("demo", [alive], COMMANDS)


def test_a_stopped_job_says_where_it_goes_on_from() -> None:
    ending = ending_of(job("a-1", "stopped"), STOPPED)
    assert (ending.code, ending.checkpoint) == (1, "/runs/demo/checkpoints/step-00000048")
    assert ending.sentence == "a-1 stopped at step 48 of 400, with a checkpoint"
    cut_short = ending_of(job("a-1", "stopped"), "step 48/400")
    assert (cut_short.checkpoint, "before it said how" in cut_short.sentence) == (None, True)


def test_the_code_of_a_job_is_zero_where_it_succeeded_alone() -> None:
    assert ending_of(job("a-1", "succeeded"), "").code == 0
    failed = ending_of(job("a-1", "failed", message="exit code 2"), "error: unknown key training.lr\n  do: remove it")
    assert (failed.code, failed.sentence) == (1, "a-1 failed: unknown key training.lr")
    assert ending_of(job("a-1", "failed", message="node died"), "").sentence == "a-1 failed: node died"
    assert ending_of(job("a-1"), "").code == 1
