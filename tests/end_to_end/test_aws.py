"""`cluster/aws.yaml` as printed: from nothing to two spot workers, one of them taken away, idle, and down again."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.chaos import servers
from tests.end_to_end import played_hosts
from tests.end_to_end.aws import FILE, SAVED_EVERY, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.plays, pytest.mark.timeout(played_hosts.PLAY_S + 60)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a user sees who types the file's commands."""
    reason = played_hosts.why_not() or (None if servers.can_store_objects() else "AWS is played with moto: install it")
    if reason:
        pytest.skip(reason)
    return played_hosts.seen_by("tests.end_to_end.aws", file=FILE, folder=tmp_path_factory.mktemp("aws"))


def test_a_file_with_its_names_filled_in_is_found_right_and_brings_up_a_head_alone(seen: dict[str, Any]) -> None:
    assert seen["check"].startswith("cluster/aws.yaml: nothing is wrong (aws)\n")
    assert seen["after_up"] == ["head"]


def test_a_job_says_that_it_waits_and_spot_workers_come_for_it_together(seen: dict[str, Any]) -> None:
    waiting = re.findall(r"^waiting for room, 1800 s at most: 2 workers of 2 CPU cores(.*)$", seen["log"], re.MULTILINE)
    doing = [line for line in waiting if "gpu_workers" in line]
    assert doing[0].startswith("; 2 gpu_workers"), seen["log"]
    assert {lifecycle for _, lifecycle in seen["workers"]} == {"spot"}


def test_a_training_whose_worker_is_taken_away_goes_on_from_the_bucket_on_a_new_one(seen: dict[str, Any]) -> None:
    assert "a worker was lost; attempt 2 of" in seen["log"]
    assert seen["status"] == "SUCCEEDED", seen["log"]
    assert seen["resumed_step"] >= 2 * SAVED_EVERY
    assert seen["resumed_step"] % SAVED_EVERY == 0
    assert seen["curve"] == list(range(1, STEPS + 1)), "every step once"


def test_one_worker_is_started_for_each_that_is_needed_and_no_more(seen: dict[str, Any]) -> None:
    assert seen["victim"] in [name for name, _ in seen["workers"][:2]]
    assert len(seen["workers"]) == 3, "two, and one for the one that was lost"


def test_workers_that_nobody_uses_go_and_the_head_stays(seen: dict[str, Any]) -> None:
    assert seen["after_idle"] == ["head"]


def test_ray_down_ends_all_instances_and_the_model_stays_in_the_bucket(seen: dict[str, Any]) -> None:
    assert seen["running"] > 5
    assert seen["after_down"] == ["terminated"]
    (kept,) = re.findall(r"^kept in: +s3://\w+/(.*)$", seen["log"], re.MULTILINE)
    assert f"{kept}/model/model.safetensors" in seen["kept"]
