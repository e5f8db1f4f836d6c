from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it calls a cloud; raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def check_run_instances(node_config: dict[str, Any]) -> str:
    """What EC2's own client says about a node's configuration; empty when it is well-formed."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    counts = {"MinCount": 1, "MaxCount": 1}
    return str(
        botocore.validate.ParamValidator().validate({**counts, **node_config}, model.input_shape).generate_report()
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_every_cluster_file(path: Path) -> None:
    prepared = check(load(path))
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_refuses_a_cluster_file_with_a_typo(path: Path) -> None:
    config = load(path)
    config["idle_timeout_minuets"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        check(config)


def test_the_head_of_an_on_premises_cluster_is_no_worker_and_all_machines_stay_up() -> None:
    prepared = check(load(ROOT / "cluster/on-premises.yaml"))
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(prepared["provider"]["worker_ips"])


def test_ec2_accepts_every_node_type_and_refuses_a_typo() -> None:
    types = load(ROOT / "cluster/aws.yaml")["available_node_types"]
    for name, node_type in types.items():
        assert check_run_instances(node_type["node_config"]) == "", name
    typo = types["l4_spot"]["node_config"] | {"InstanceMarketOptions": {"MarketTyp": "spot"}}
    assert "MarketTyp" in check_run_instances(typo)


def test_aws_cluster_costs_nothing_but_the_head_until_asked() -> None:
    types = load(ROOT / "cluster/aws.yaml")["available_node_types"]
    assert all(node_type.get("min_workers", 0) == 0 for node_type in types.values())
    assert types["a100_on_demand"]["max_workers"] == 0


def test_aws_nodes_share_one_placeholder_for_the_image() -> None:
    text = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8")
    images = {t["node_config"]["ImageId"] for t in load(ROOT / "cluster/aws.yaml")["available_node_types"].values()}
    assert images == {"ami-00000000000000000"}
    assert f"s/{images.pop()}/$AMI/" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_is_valid_shell(path: Path) -> None:
    config = load(path)
    for command in [command for key in (*COMMANDS, *START_COMMANDS) for command in config.get(key, ())]:
        done = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        # A here-document that does not end is only a warning to bash.
        assert not done.stderr, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_mounted_file_is_there_and_what_the_build_needs_is_mounted(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    local = [source for source in mounts.values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in local), local
    # The last two are named by pyproject.toml as the readme and the licence file: no build without them.
    assert {"pyproject.toml", "constraints.txt", "orchestrator", "jobs", "configs", "README.md", "LICENSE"} <= set(
        local
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_start_commands_bind_to_the_node_address_with_token_authentication(path: Path, tmp_path: Path) -> None:
    config = load(path)
    for key in START_COMMANDS:
        (start,) = [command for command in config[key] if "ray start" in command]
        assert "--node-ip-address=" in start
        assert "--object-store-memory=" in start
        assert start.startswith(". ~/orchestrator.env;")
    # The environment file is written and read as on a node, by a shell that shares nothing with this one.
    (write,) = [command for command in config["setup_commands"] if "orchestrator.env" in command and "cat >" in command]
    script = f"({write})\n. ~/orchestrator.env; echo $RAY_AUTH_MODE $PATH"
    node = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-e", "-c", script], env=node, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"token {tmp_path}/orchestrator-venv/bin:")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_on_top_name_the_file(path: Path) -> None:
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert comment is not None
    assert "ray up" in comment[0]
    assert f"cluster/{path.name}" in comment[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_survive_the_quoting_of_rays_launcher(path: Path, tmp_path: Path) -> None:
    from ray.autoscaler._private.command_runner import _with_interactive

    (tmp_path / ".bashrc").touch()
    write = next(command for command in load(path)["setup_commands"] if "cat >" in command)
    launched = shlex.split(" ".join(_with_interactive(write)))
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(launched, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert "export RAY_AUTH_MODE=token" in (tmp_path / "orchestrator.env").read_text(encoding="utf-8")
