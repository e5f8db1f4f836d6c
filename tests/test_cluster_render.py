"""Cluster files written for a wish, and the patching that they come from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.cluster_files.check import check_file
from orchestrator.cluster_files.common_checks import PLACEHOLDER
from orchestrator.cluster_files.kubernetes_checks import autoscaling_config
from orchestrator.cluster_files.machine_types import choose_machines
from orchestrator.cluster_files.patching import patch
from orchestrator.cluster_files.render import render
from orchestrator.cluster_files.shipped import SHIPPED, shipped_text
from orchestrator.errors import SpecError
from orchestrator.planning.growth import grown, limits_of
from orchestrator.planning.hardware import find_device

ROOT = Path(__file__).parents[1]


def rendered(provider: str, gpu: str = "H100", gpus: int = 16) -> dict[str, Any]:
    content = yaml.safe_load(render(provider, gpu=gpu, gpus=gpus).text)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("provider", SHIPPED)
def test_a_rendered_file_is_right_but_for_its_names(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = "A100-80GB"  # which every provider has
    for file in ("dist/wheel", ".ray/auth_token", ".ssh/id_ed25519"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(
        cli.app, ["cluster", "render", "--provider", provider, "--gpu", gpu, "--gpus", "16", "--out", "own.yaml"]
    )
    assert done.exit_code == 0, done.output
    report = check_file(tmp_path / "own.yaml")
    assert {problem.what for problem in report.problems} == {"a name that only you know is not filled in"}
    if report.prices:
        assert report.prices[-1].usd_per_hour == pytest.approx(16 * 1.75, abs=0.21)


@pytest.mark.parametrize(("provider", "field"), [("aws", "InstanceType"), ("gcp", "machineType")])
def test_sixteen_h100_are_two_machines_of_eight_in_a_cloud(provider: str, field: str) -> None:
    content = rendered(provider)
    workers = content["available_node_types"]["gpu_workers"]
    assert workers["node_config"][field] in ("p5.48xlarge", "a3-highgpu-8g")
    assert (content["max_workers"], workers["max_workers"], workers["min_workers"]) == (2, 2, 0)
    ours = {"CPU": 208, "GPU": 8, "accelerator_type:H100-80GB": 1}
    assert provider == "aws" or workers["resources"] == ours, "AWS's provider finds them"


@pytest.mark.parametrize("provider", ["gcp", "azure", "kubernetes", "kubernetes-job"])
def test_a_job_can_be_planned_for_what_a_rendered_file_may_start(provider: str) -> None:
    content = rendered(provider)
    if provider.startswith("kubernetes"):
        spec = content["spec"]
        content = autoscaling_config(spec if provider == "kubernetes" else spec["rayClusterSpec"])
    (shape,) = grown([], limits_of(content))
    assert (shape.gpus, find_device(shape.device_name).name) == (16, "H100-80GB")


def test_what_is_rendered_elsewhere_counts_on_machines_of_eight() -> None:
    assert len(rendered("on-premises")["provider"]["worker_ips"]) == 2
    task = rendered("skypilot")
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    group = rendered("kubernetes")["spec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 2)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_a_job_in_a_queue_asks_for_all_its_pods_at_once() -> None:
    job = rendered("kubernetes-kueue")["spec"]
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    shipped = yaml.safe_load(shipped_text("kubernetes-kueue"))["spec"]["entrypoint"]
    assert job["entrypoint"] == shipped == f"{shipped.rpartition('=')[0]}=16", "a worker for each GPU"


def test_a_rendered_file_keeps_the_comments_and_names_itself_in_its_commands() -> None:
    text = render("aws", gpu="H100", gpus=16).text
    assert text.startswith("# 2 x p5.48xlarge (8 H100-80GB) at most.")
    assert "ray up -y aws.local.yaml" in text
    assert "# On demand, for the drivers of jobs run here." in text
    assert "cluster/aws.yaml" not in text


@pytest.mark.parametrize(
    ("gpu", "gpus", "name", "count"),
    [
        ("L4", 1, "g6.xlarge", 1),
        ("L4", 3, "g6.12xlarge", 1),
        ("L4", 16, "g6.48xlarge", 2),
        ("T4", 5, "g4dn.12xlarge", 2),
    ],
)
def test_the_fewest_machines_are_chosen_and_of_them_the_smallest(gpu: str, gpus: int, name: str, count: int) -> None:
    machines = choose_machines("aws", gpu=gpu, gpus=gpus)
    assert (machines.type.name, machines.count) == (name, count)


@pytest.mark.parametrize(
    ("provider", "gpu", "gpus", "what"),
    [
        ("nimbus", "H100", 8, "no cluster file is shipped for this provider"),
        ("aws", "H1000", 8, "no such device"),
        ("azure", "L4", 8, "no machine type of azure with this GPU"),
        ("aws", "H100", 0, "no number of GPUs"),
        ("kubernetes", "cpu", 8, "no GPU"),
        ("gcp", "TPUv4", 8, "no GPU"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(provider: str, gpu: str, gpus: int, what: str) -> None:
    with pytest.raises(SpecError, match=what) as caught:
        render(provider, gpu=gpu, gpus=gpus)
    assert caught.value.allowed


def test_a_refused_wish_is_a_mistake_of_the_users() -> None:
    done = CliRunner().invoke(cli.app, ["cluster", "render", "--provider", "aws", "--gpu", "H100", "--gpus", "-1"])
    assert done.exit_code == 2


# -- patching --------------------------------------------------------------------------------------------------------

TEXT = """\
# On top.
a: &one 1  # one
b: {c: [x, y], d: *one}
e:
  - f: old
"""


def test_values_are_replaced_where_they_stand() -> None:
    assert patch(TEXT, {"b.c.1": "longer", "e.0.f": [1, 2]}) == TEXT.replace("y]", "longer]").replace("old", "[1, 2]")


def test_text_that_reads_as_something_else_is_quoted() -> None:
    assert yaml.safe_load(patch(TEXT, {"e.0.f": "8"}))["e"][0]["f"] == "8"


def test_a_path_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"b\.g is not in the file"):
        patch(TEXT, {"b.g": 1})


def test_the_printed_commands_render_a_file_and_check_it(tmp_path: Path) -> None:
    """As the README has them, in an empty folder; between them the names are filled in."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    make, check = (
        line.strip() for line in lines if line.startswith("    orchestrator cluster ") and "aws.local" in line
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def typed(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    for made in ("dist/orchestrator-0.1.0-py3-none-any.whl", ".ray/auth_token"):
        (tmp_path / made).parent.mkdir()
        (tmp_path / made).touch()
    assert typed(make).returncode == 0
    file = tmp_path / "aws.local.yaml"
    assert typed(check).returncode == 2, "the names are missing"
    file.write_text(PLACEHOLDER.sub(lambda name: name[0].lower().replace("_", "-"), file.read_text(encoding="utf-8")))
    done = typed(check)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is wrong" in done.stdout
