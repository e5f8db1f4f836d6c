"""A cluster file -> all that can be known wrong with it before anything is started, and what it costs an hour.

Called by `orchestrator cluster check`. No cloud is asked and nothing is changed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.cluster_files import common_checks, kubernetes_checks, launcher_checks, skypilot_checks
from orchestrator.cluster_files.findings import Price, Problem, Report
from orchestrator.errors import SpecError
from orchestrator.yaml_file import read_yaml

CLOUDS = {
    "aws": ("boto3", "boto3"),
    "gcp": ("googleapiclient", "google-api-python-client"),
    "azure": (
        "azure.mgmt.compute",
        "azure-common azure-identity azure-mgmt-compute azure-mgmt-network azure-mgmt-resource<25",
    ),
}
"""Providers of `ray up` with prices: the module that Ray calls each cloud with, and what to install for it."""


def check_file(path: Path) -> Report:
    """Everything about one file. Raises SpecError for a file that cannot be read or is no cluster file."""
    if not path.is_file():
        raise SpecError("there is no such cluster file", got=path, do="give the path of one; cluster/ holds some")
    content = read_yaml(path)
    kind = content.get("kind")
    if kind in ("RayCluster", "RayJob"):
        problems, left_out, prices = _manifest(content)
        provider = f"kubernetes, {kind}"
    elif isinstance(content.get("provider"), Mapping):
        provider = str(content["provider"].get("type"))
        problems, left_out, prices = _launcher(content, provider)
    elif "run" in content and "resources" in content:
        provider = "skypilot"
        problems, left_out, prices = _skypilot(content)
    else:
        raise SpecError(
            "this is no cluster file",
            got=f"{path} with the keys {', '.join(map(str, content)) or 'none'}",
            allowed="a file for `ray up` (provider: ...), a RayCluster or RayJob, a SkyPilot task (resources, run)",
            do="`orchestrator cluster render --provider ...` writes one",
        )
    unfilled = tuple(common_checks.unfilled(content))
    return Report(
        file=str(path),
        provider=provider,
        problems=(*problems, *unfilled),
        left_out=tuple(left_out),
        prices=tuple(prices),
    )


_Found = tuple[list[Problem], list[str], list[Price]]


def _launcher(content: Mapping[str, Any], provider: str) -> _Found:
    prepared, problems = launcher_checks.ray_reads(content)
    left_out: list[str] = []
    prices: list[Price] = []
    types = content.get("available_node_types") or {}
    if isinstance(types, Mapping):
        shaped = {name: each for name, each in types.items() if isinstance(each, Mapping)}
        found, left_out = launcher_checks.node_config_problems(provider, shaped)
        problems += found
    machines = 1 + int(prepared.get("max_workers", 1))
    if provider in CLOUDS:
        prices = launcher_checks.prices(provider, prepared) if prepared else []
        left_out.append("credentials, quotas, images and zones: no cloud is asked")
        module, packages = CLOUDS[provider]
        if not _is_installed(module):
            left_out.append(f"whether `ray up` works from this machine, which needs `pip install {packages}`")
    elif provider == "local":
        problems += _on_premises(content)
    problems += common_checks.no_token(content, at="head_start_ray_commands")
    problems += common_checks.no_storage(content, at="setup_commands", machines=machines)
    problems += _missing_files(content)
    return problems, left_out, prices


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False


def _on_premises(content: Mapping[str, Any]) -> list[Problem]:
    """Machines that stand twice: Ray would start two nodes on them, or lose one."""
    given = content["provider"]
    workers = given.get("worker_ips")
    addresses = [given.get("head_ip"), *(workers if isinstance(workers, list) else ())]
    twice = sorted({str(one) for one in addresses if addresses.count(one) > 1})
    if not twice:
        return []
    return [
        Problem(
            at="provider.worker_ips",
            what="a machine stands twice",
            got=", ".join(twice),
            allowed="each address once, the head's not among the workers'",
            do="remove it from worker_ips",
        )
    ]


def _missing_files(content: Mapping[str, Any]) -> list[Problem]:
    """Local files that `ray up` sends or opens and that are not there; relative paths count from the current folder."""
    mounts, auth = (part if isinstance(part := content.get(key), Mapping) else {} for key in ("file_mounts", "auth"))
    wanted = {f"file_mounts.{there}": here for there, here in mounts.items()}
    wanted["auth.ssh_private_key"] = auth.get("ssh_private_key")
    return [
        Problem(
            at=at,
            what="this folder is not there, or has nothing in it" if here == _DIST else "this file is not there",
            got=here,
            do=_MAKES.get(here, "create it, or run this from the project's folder"),
        )
        for at, here in wanted.items()
        if isinstance(here, str) and not common_checks.PLACEHOLDER.search(here) and not _is_there(Path(here))
    ]


def _is_there(path: Path) -> bool:
    path = path.expanduser()
    return any(path.iterdir()) if path.is_dir() else path.exists()


_DIST = "dist"
_MAKES = {_DIST: "make wheel", "~/.ray/auth_token": "ray get-auth-token --generate"}


def _manifest(content: Mapping[str, Any]) -> _Found:
    problems = list(kubernetes_checks.manifest_problems(content))
    is_sound = not problems
    problems += common_checks.no_token(content, at="spec")
    if is_sound:
        problems += common_checks.no_storage(content, at="spec", machines=kubernetes_checks.most_pods(content))
    left_out = ["what stands inside of pod templates: `kubectl apply --dry-run=server -f FILE` asks your cluster"]
    return problems, left_out, kubernetes_checks.pod_prices(content) if is_sound else []


def _skypilot(content: Mapping[str, Any]) -> _Found:
    problems = list(skypilot_checks.task_problems(content))
    problems += common_checks.no_token(content, at="run")
    problems += common_checks.no_storage(content, at="envs", machines=skypilot_checks.nodes(content))
    left_out = ["which cloud has it, and at what price: `sky launch --dryrun FILE` asks"]
    return problems, left_out, skypilot_checks.task_prices(content)
