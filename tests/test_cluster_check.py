"""What `cluster check` finds in files that are wrong in one thing each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator import cli
from orchestrator.cluster_files import kubernetes_checks, launcher_checks
from orchestrator.cluster_files.check import check_file
from orchestrator.cluster_files.common_checks import PLACEHOLDER
from orchestrator.cluster_files.findings import Problem, Report
from orchestrator.cluster_files.machine_types import MACHINE_TYPES
from orchestrator.cluster_files.patching import patch
from orchestrator.cluster_files.shipped import shipped_text
from orchestrator.errors import SpecError


def filled(provider: str) -> str:
    """A shipped file with some name in each place for one."""
    return PLACEHOLDER.sub(lambda name: name[0].lower().replace("_", "-"), shipped_text(provider))


def check(folder: Path, text: str) -> Report:
    (folder / "cluster.yaml").write_text(text, encoding="utf-8")
    return check_file(folder / "cluster.yaml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in ("dist/orchestrator-0.1.0-py3-none-any.whl", ".ray/auth_token", ".ssh/id_ed25519"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def only(report: Report) -> Problem:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


WRONG = {
    "a key that Ray's schema has not": (
        "aws",
        ("idle_timeout_minutes: 5", "idle_timeout_minuets: 5"),
        ("", "no such key: idle_timeout_minuets", "did you mean idle_timeout_minutes?"),
    ),
    "a value of the wrong kind": (
        "gcp",
        ("upscaling_speed: 4.0", "upscaling_speed: fast"),
        ("upscaling_speed", "'fast' is not of type 'number'", "schema"),
    ),
    "a typo in an EC2 setting": (
        "aws",
        ("MarketType: spot", "MarketTyp: spot"),
        ("available_node_types.gpu_workers.node_config", "RunInstances", "did you mean MarketType?"),
    ),
    "an instance type that EC2 has not": (
        "aws",
        ("g6.12xlarge", "g6.12xlrage"),
        ("available_node_types.gpu_workers.node_config.InstanceType", "no such instance type", "correct it"),
    ),
    "a typo in a setting of Azure's": (
        "azure",
        ("priority: Spot", "prioritty: Spot"),
        ("available_node_types.gpu_workers.node_config.azure_arm_parameters", "no field", "did you mean priority?"),
    ),
    "a typo in a setting of Google's": (
        "gcp",
        ("      serviceAccounts:", "      serviceAccount:"),
        ("available_node_types.gpu_workers.node_config", "no field", "did you mean serviceAccounts?"),
    ),
    "a head that is no node type": (
        "gcp",
        ("head_node_type: head", "head_node_type: leader"),
        ("", "`ray up` refuses the file", "shipped one"),
    ),
    "no storage that all machines see": (
        "on-premises",
        ("SHARED=edit-shared-folder", "SHARED="),
        ("setup_commands", "up to 3 machines", "name one of them"),
    ),
    "a head among its workers": (
        "on-premises",
        ("worker_ips: [edit-worker-address-1", "worker_ips: [edit-head-address"),
        ("provider.worker_ips", "a machine stands twice", "remove it"),
    ),
    "a key file that is not there": (
        "on-premises",
        ("~/.ssh/id_ed25519", "~/.ssh/id_rsa"),
        ("auth.ssh_private_key", "not there", "create it"),
    ),
    "a field that KubeRay has not": (
        "kubernetes",
        ("      maxReplicas: 4", "      maxReplicas: 4\n      minReplica: 0"),
        ("spec.workerGroupSpecs.0.minReplica", "KubeRay has no such field", "did you mean minReplicas?"),
    ),
    "a size that is none": (
        "kubernetes-job",
        ("maxReplicas: 4", "maxReplicas: many"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "whole number", "set maxReplicas"),
    ),
    "a job whose cluster stays, in a queue": (
        "kubernetes-kueue",
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        ("spec.shutdownAfterJobFinishes", "Kueue admits no RayJob", "set it to true"),
    ),
    "a job without a command": (
        "kubernetes-job",
        ("  entrypoint: python -m jobs.pretrain --config configs/pretrain/demo.yaml\n", ""),
        ("spec.entrypoint", "no command", "jobs.pretrain"),
    ),
    "a cluster without authentication": (
        "kubernetes",
        ("authOptions: {mode: token}", "authOptions: {mode: disabled}"),
        ("spec", "nothing turns token authentication on", "RAY_AUTH_MODE"),
    ),
    "a field that SkyPilot has not": (
        "skypilot",
        ("use_spot: true", "spot: true"),
        ("resources.spot", "SkyPilot has no such field", "use_spot"),
    ),
    "a GPU that the catalogue has not": (
        "skypilot",
        ("accelerators: L4:4", "accelerators: L5:4"),
        ("resources.accelerators", "not in the device catalogue", "devices.yaml"),
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_named_with_its_place_and_its_remedy(case: Any, folder: Path) -> None:
    provider, (right, wrong), (at, what, do) = case
    text = filled(provider)
    assert right in text
    problem = only(check(folder, text.replace(right, wrong)))
    assert problem.at == at
    assert what in problem.what
    assert do in (problem.do or "")


def test_names_that_are_not_filled_in_are_listed_once_each(folder: Path) -> None:
    report = check(folder, shipped_text("aws"))
    assert [problem.got for problem in report.problems] == ["EDIT_IMAGE_ID", "EDIT_INSTANCE_PROFILE", "EDIT_BUCKET"]
    assert report.problems[0].at == "provider.names.image"


def test_a_name_in_a_comment_of_a_command_is_none_to_fill_in(folder: Path) -> None:
    text = filled("on-premises").replace("PYTHON=python3", "PYTHON=python3\n    # such as EDIT_PYTHON")
    assert check(folder, text).problems == ()


def test_a_cluster_without_a_token_is_told_of(folder: Path) -> None:
    text = filled("on-premises").replace("~/orchestrator/env.sh", "~/own.sh")
    assert "token authentication" in only(check(folder, text)).what
    assert check(folder, text.replace("~/own.sh; ray", "~/own.sh; export RAY_AUTH_MODE=token; ray")).problems == ()


@pytest.mark.parametrize(
    ("file", "do"),
    [("dist/orchestrator-0.1.0-py3-none-any.whl", "make wheel"), (".ray/auth_token", "ray get-auth-token")],
)
def test_what_is_not_built_yet_is_named_with_its_command(folder: Path, file: str, do: str) -> None:
    (folder / file).unlink()
    assert do in (only(check(folder, filled("on-premises"))).do or "")


def test_a_file_is_priced_for_its_head_alone_and_for_all_that_it_allows(folder: Path) -> None:
    text = patch(filled("aws"), {"available_node_types.gpu_workers.node_config.InstanceType": "p4d.24xlarge"})
    alone, most = check(folder, text).prices
    # The catalogue's 0.05 usd a core, and 2.74 usd for an A100 of 40 GB.
    assert (alone.machines, alone.usd_per_hour) == (("1 x m7i.xlarge",), 0.2)
    assert most.machines == ("1 x m7i.xlarge", "4 x p4d.24xlarge (8 A100-40GB)")
    assert most.usd_per_hour == pytest.approx(0.2 + 4 * 8 * 2.74)


def test_the_dearest_machines_are_counted_up_to_the_size_of_the_whole() -> None:
    types = {
        "head": {"node_config": {"InstanceType": "m7i.xlarge"}, "max_workers": 0},
        "small": {"node_config": {"InstanceType": "m7i.xlarge"}, "max_workers": 4},
        "big": {"node_config": {"InstanceType": "p5.48xlarge"}, "max_workers": 3},
    }
    prepared = {"head_node_type": "head", "available_node_types": types, "max_workers": 4}
    assert launcher_checks.prices("aws", prepared)[1].machines == (
        "1 x m7i.xlarge",
        "3 x p5.48xlarge (8 H100-80GB)",
        "1 x m7i.xlarge",
    )


def test_a_machine_without_a_known_price_leaves_no_sum(folder: Path) -> None:
    most = check(folder, filled("aws").replace("g6.12xlarge", "p3dn.24xlarge")).prices[1]
    assert most.usd_per_hour is None
    assert most.why_not == "the catalogue has no price of V100-32GB"


def test_pods_are_priced_by_the_gpu_that_an_annotation_names(folder: Path) -> None:
    (price,) = check(folder, filled("kubernetes").replace("orchestrator/gpu: L4", "orchestrator/gpu: H100")).prices
    assert price.usd_per_hour == pytest.approx(4 * 4 * 4.2)
    (price,) = check(folder, filled("kubernetes").replace("    orchestrator/gpu: L4\n", "")).prices
    assert price.usd_per_hour is None


def test_without_botocore_the_rest_is_checked_and_what_was_not_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    launcher_checks.run_instances.cache_clear()
    report = check(folder, filled("aws").replace("MarketType: spot", "MarketTyp: spot"))
    assert report.problems == ()
    assert any("botocore" in why for why in report.left_out)


def test_machine_types_of_aws_are_ones_that_ec2_has() -> None:
    names = {one.name: {"InstanceType": one.name} for one in MACHINE_TYPES if one.cloud == "aws"}
    types = {name: {"node_config": config} for name, config in names.items()}
    assert launcher_checks.node_config_problems("aws", types)[0] == []


def test_the_fields_of_the_shipped_manifests_are_what_rays_autoscaler_reads() -> None:
    spec = yaml.safe_load(shipped_text("kubernetes"))["spec"]
    types = kubernetes_checks.autoscaling_config(spec)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu-workers"]["resources"]["GPU"] == 4
    assert (types["gpu-workers"]["min_workers"], types["gpu-workers"]["max_workers"]) == (0, 4)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: tiny\nkind: pretrain\n", "no cluster file"),
        ("provider: [aws]\n", "no cluster file"),
        ("cluster_name: [\n", "not valid YAML"),
    ],
)
def test_what_is_no_cluster_file_is_refused(folder: Path, text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        check(folder, text)


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(SpecError, match="no such cluster file"):
        check_file(folder / "nowhere.yaml")


def test_the_command_answers_in_json_and_its_code_tells(folder: Path) -> None:
    (folder / "good.yaml").write_text(filled("gcp"))
    (folder / "bad.yaml").write_text(shipped_text("gcp"))
    runner = CliRunner()
    good = runner.invoke(cli.app, ["cluster", "check", "good.yaml", "--json"])
    assert good.exit_code == 0
    answer = json.loads(good.stdout)
    assert (answer["ok"], answer["provider"], answer["problems"]) == (True, "gcp", [])
    assert [price["of"] for price in answer["prices"]] == ["the head alone", "at most"]
    bad = runner.invoke(cli.app, ["cluster", "check", "bad.yaml"])
    assert bad.exit_code == 2
    assert "provider.project_id: a name that only you know is not filled in\n  got:     EDIT_PROJECT" in bad.stdout
