"""The shipped cluster files, and the scripts that nodes run, without a cloud and without a second machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster_files.check import check_file
from orchestrator.cluster_files.common_checks import PLACEHOLDER
from orchestrator.cluster_files.shipped import SHIPPED

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
NODE = CLUSTER / "node"
LAUNCHED = [CLUSTER / f"{name}.yaml" for name in ("on-premises", "aws", "gcp", "azure")]
"""Files for `ray up`."""
ALL = [CLUSTER / file for file in SHIPPED.values()]
MLFLOW = CLUSTER / "kubernetes" / "mlflow.yaml"
"""Beside a cluster on Kubernetes; no cluster itself."""
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def stem(path: Path) -> str:
    return path.stem


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder and a home as they are after `make wheel` and `ray get-auth-token --generate`."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "orchestrator-0.1.0-py3-none-any.whl").touch()
    for file in (".ray/auth_token", ".ssh/id_ed25519"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_file_is_shipped_and_no_other() -> None:
    assert sorted([*ALL, MLFLOW]) == sorted(CLUSTER.rglob("*.yaml"))


@pytest.mark.parametrize("path", ALL, ids=stem)
def test_nothing_is_wrong_with_a_file_once_its_names_are_filled_in(path: Path, folder: Path) -> None:
    # The head's address and the workers' must differ, as all names do.
    filled = PLACEHOLDER.sub(lambda name: name[0].lower().replace("_", "-"), path.read_text(encoding="utf-8"))
    (folder / "filled.yaml").write_text(filled, encoding="utf-8")
    report = check_file(folder / "filled.yaml")
    assert [line for problem in report.problems for line in problem.lines()] == []


@pytest.mark.parametrize("path", ALL, ids=stem)
def test_the_names_to_fill_in_stand_above_all_else(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    body = re.sub(r"\A(#.*\n)+", "", text)
    last = max(body.rindex(name) for name in PLACEHOLDER.findall(body))
    marks = ("# Nothing below needs an edit", "spec:\n", "num_nodes:")
    assert last < min(body.index(mark) for mark in marks if mark in body)


@pytest.mark.parametrize("path", [*ALL, MLFLOW], ids=stem)
def test_the_commands_on_top_name_the_file(path: Path) -> None:
    comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert comment is not None
    assert f"cluster/{path.relative_to(CLUSTER)}" in comment[0]


@pytest.mark.parametrize("path", LAUNCHED, ids=stem)
def test_every_command_is_valid_shell(path: Path) -> None:
    config = load(path)
    for command in [command for key in (*COMMANDS, *START_COMMANDS) for command in config.get(key, ())]:
        done = subprocess.run(["bash", "-n", "-c", f"({command})"], capture_output=True, text=True, check=False)
        # A here-document that does not end is only a warning to bash.
        assert not done.stderr, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("script", sorted(NODE.iterdir()), ids=stem)
def test_the_scripts_of_nodes_are_valid_shell(script: Path) -> None:
    shell = "sh" if script.name == "env.sh" else "bash"
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", LAUNCHED, ids=stem)
def test_each_node_gets_the_wheel_its_names_and_the_token(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"] == {"~/orchestrator": "dist", "~/.ray/auth_token": "~/.ray/auth_token"}
    assert "bash ~/orchestrator/setup.sh head" in config["head_setup_commands"]
    assert config["worker_setup_commands"] == ["bash ~/orchestrator/setup.sh worker"]
    for key in START_COMMANDS:
        assert config[key][0] == ". ~/orchestrator/env.sh; ray stop"
        assert "HEAD_IP=" in config[key][1]
        assert config[key][1].endswith("> ~/orchestrator.head")
        assert config[key][2].startswith(". ~/orchestrator/env.sh;")
        assert "--node-ip-address=$NODE_IP" in config[key][2]
        assert "--object-store-memory=2147483648" in config[key][2]


@pytest.mark.parametrize("path", LAUNCHED, ids=stem)
def test_the_head_takes_no_training_and_is_on_demand(path: Path) -> None:
    config = load(path)
    assert "--num-cpus=0" in config["head_start_ray_commands"][2]
    if path.stem == "on-premises":
        return
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not re.search("spot|preemptible", str(head), re.IGNORECASE)
    assert re.search("spot|preemptible", str(config["available_node_types"]["gpu_workers"]), re.IGNORECASE)


@pytest.mark.parametrize("path", LAUNCHED[1:], ids=stem)
def test_a_cloud_costs_nothing_but_the_head_until_asked(path: Path) -> None:
    types = load(path)["available_node_types"]
    assert all(node_type.get("min_workers", 0) == 0 for node_type in types.values())


def test_the_files_of_clouds_share_the_commands_that_start_ray() -> None:
    aws, *others = (load(path) for path in LAUNCHED[1:])
    for other in others:
        assert {key: other[key] for key in START_COMMANDS} == {key: aws[key] for key in START_COMMANDS}


def node(home: Path, script: str) -> str:
    """What a script prints on a node whose names are written, by a shell that shares nothing with this one."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", LAUNCHED, ids=stem)
def test_every_process_of_a_node_has_the_token_time_to_stop_and_the_way_to_the_head(path: Path, tmp_path: Path) -> None:
    (write,) = [command for command in load(path)["setup_commands"] if "cat >" in command]
    names = "RAY_AUTH_MODE RAY_JOB_STOP_WAIT_TIME_S RAY_ADDRESS GLOO_SOCKET_IFNAME NODE_IP"
    written = f"({write})\necho HEAD_IP=localhost > ~/orchestrator.head\n"
    script = f"{written}. {NODE}/env.sh; for name in {names}; do printenv $name; done; echo $PATH"
    assert node(tmp_path, script).splitlines() == [
        "token",
        "120",
        "127.0.0.1:6379",
        "lo",
        "127.0.0.1",
        f"{tmp_path}/orchestrator-venv/bin:{os.environ['PATH']}",
    ]


def test_passwords_of_services_come_from_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.names").write_text("VENV=/nowhere\n")
    (tmp_path / "orchestrator.secrets").write_text("export MLFLOW_TRACKING_USERNAME=ana\n")
    assert node(tmp_path, f". {NODE}/env.sh; printenv MLFLOW_TRACKING_USERNAME") == "ana\n"


def test_runs_are_kept_in_the_shared_folder_where_there_is_one(tmp_path: Path) -> None:
    script = f"echo SHARED=/mnt/all > ~/orchestrator.names; echo VENV=/v >> ~/orchestrator.names; . {NODE}/env.sh; "
    assert node(tmp_path, f"{script} printenv ORCHESTRATOR_HOME") == "/mnt/all/orchestrator\n"
    assert node(tmp_path, f"{script.replace('/mnt/all', '')} printenv ORCHESTRATOR_HOME || echo none") == "none\n"


@pytest.mark.parametrize("path", LAUNCHED, ids=stem)
def test_commands_survive_the_quoting_of_rays_launcher(path: Path, tmp_path: Path) -> None:
    from ray.autoscaler._private.command_runner import _with_interactive

    (tmp_path / ".bashrc").touch()
    write = next(command for command in load(path)["setup_commands"] if "cat >" in command)
    launched = shlex.split(" ".join(_with_interactive(write)))
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(launched, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert "VENV=$HOME/orchestrator-venv" in (tmp_path / "orchestrator.names").read_text(encoding="utf-8")


def test_the_head_of_an_on_premises_cluster_finds_its_own_address_in_rays_file(tmp_path: Path) -> None:
    command = load(CLUSTER / "on-premises.yaml")["head_start_ray_commands"][1]
    text = '{"cluster_name": "c", "provider": {"type": "local", "head_ip": "10.1.2.3", "worker_ips": ["10.1.2.4"]}}'
    (tmp_path / "ray_bootstrap_config.yaml").write_text(text)
    assert node(tmp_path, f"{command}; cat ~/orchestrator.head") == "HEAD_IP=10.1.2.3"


def test_the_head_of_an_on_premises_cluster_is_no_worker_and_all_machines_stay_up() -> None:
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(load(CLUSTER / "on-premises.yaml"))
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(prepared["provider"]["worker_ips"])
