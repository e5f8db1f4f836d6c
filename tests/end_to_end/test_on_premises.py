"""`cluster/on-premises.yaml` as printed: three hosts over ssh, a training on both workers, stopped, taken up, ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests import specs
from tests.chaos import hosts
from tests.chaos.processes import ROOT
from tests.end_to_end.on_premises import FILE, STEPS, commands

NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "nsenter", "make")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a user sees who types the file's commands."""
    missing = [name for name in NEEDED if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        pytest.skip(f"hosts are played with {', '.join(missing)}: not installed")
    if sys.prefix == sys.base_prefix:
        pytest.skip("each host has a layer of its own on a virtual environment: use one")
    if not hosts.available():
        pytest.skip("hosts are played in namespaces with mounts of their own: be root")
    folder = tmp_path_factory.mktemp("on-premises")
    corpus = specs.write_corpus(folder / "corpus")
    build = [*commands()["make wheel"].split("&&")[0].split(), f"DIST={folder / 'dist'}", f"PYTHON={sys.executable}"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "tests.end_to_end.on_premises", str(folder / "dist"), str(corpus)]
    environment = os.environ | {"PATH": SYSTEM_PATH}
    dist = ROOT / "dist"  # where the wheel is mounted, for the file's own path to be true
    was_there = dist.exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=540)
    if not was_there:
        dist.rmdir()
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-20000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    print(answer["seconds"], file=sys.stderr)
    return answer


def test_the_readme_has_the_commands_on_top_of_the_file() -> None:
    text = re.sub(r"[ \t]+# .*", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    section = text.partition("### A cluster of your own")[2].partition("\n#")[0]
    assert [line for line in commands().values() if f"    {line}\n" not in section] == []
    assert FILE.name in section


def test_a_file_with_its_names_filled_in_is_found_right(seen: dict[str, Any]) -> None:
    assert seen["check"] == "cluster/on-premises.yaml: nothing is wrong (local)\n"


def test_the_head_and_both_workers_are_in_the_cluster(seen: dict[str, Any]) -> None:
    assert seen["nodes"] == ["10.77.0.2", "10.77.0.3", "10.77.0.4"]


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
