"""`cluster/on-premises.yaml` as printed: three hosts over ssh, a training on both workers, stopped, taken up, ended."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from tests import specs
from tests.chaos.processes import ROOT
from tests.end_to_end import played_hosts
from tests.end_to_end.on_premises import FILE, STEPS
from tests.end_to_end.played_hosts import commands

pytestmark = [pytest.mark.slow, pytest.mark.plays, pytest.mark.timeout(played_hosts.PLAY_S + 60)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a user sees who types the file's commands."""
    if reason := played_hosts.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("on-premises")
    corpus = specs.write_corpus(folder / "corpus")
    return played_hosts.seen_by("tests.end_to_end.on_premises", file=FILE, folder=folder, arguments=[str(corpus)])


def test_the_readme_has_the_commands_on_top_of_the_file() -> None:
    text = re.sub(r"[ \t]+# .*", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    section = text.partition("### A cluster of your own")[2].partition("\n#")[0]
    assert [line for line in commands(FILE).values() if f"    {line}\n" not in section] == []
    assert FILE.name in section


def test_a_file_with_its_names_filled_in_is_found_right(seen: dict[str, Any]) -> None:
    assert seen["check"] == "cluster/on-premises.yaml: nothing is wrong (local)\n"


def test_the_head_and_both_workers_are_in_the_cluster(seen: dict[str, Any]) -> None:
    assert seen["nodes"] == ["10.77.0.2", "10.77.0.3", "10.77.0.4"]


def test_a_training_waits_for_machines_that_are_still_being_set_up(seen: dict[str, Any]) -> None:
    assert re.search(r"^waiting for [12] machines? of the cluster file to join, 1800 s at most$", seen["said"], re.M)
    assert "starting workers" in seen["said"].partition("to join")[2]


def test_ray_is_on_the_path_of_every_shell_that_ray_uses(seen: dict[str, Any]) -> None:
    assert len(seen["shells"]) == 3
    for shell, printed in seen["shells"].items():
        assert printed.endswith(f"{sys.prefix}/bin/ray\n"), shell


def test_a_training_runs_on_both_workers_and_not_on_the_head(seen: dict[str, Any]) -> None:
    assert seen["ranks"] == ["worker1", "worker2"]


def test_a_stopped_training_goes_on_at_the_next_step_and_ends(seen: dict[str, Any]) -> None:
    assert seen["stopped"] == "STOPPED"
    assert seen["steps"]["before"] < STEPS
    assert seen["steps"]["first_after"] == seen["steps"]["before"] + 1
    assert seen["taken"] == seen["steps"]["last"] == STEPS
    assert "succeeded" in seen["resumed"]


def test_ray_down_leaves_no_process_on_any_host(seen: dict[str, Any]) -> None:
    assert seen["running"] > 10
    assert seen["left"] == []
