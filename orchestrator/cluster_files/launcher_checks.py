"""Checks of a file for `ray up`: Ray's own reading of it, the cloud's settings of its machines, and their prices.

The only module of this room that imports Ray and botocore, both late: Ray's schema takes 0.4 s to load. Nothing is
asked of a cloud.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from orchestrator.cluster_files.common_checks import unknown_fields
from orchestrator.cluster_files.findings import Price, Problem
from orchestrator.cluster_files.machine_types import MachineType, find_machine_type
from orchestrator.errors import one_line

TYPE_FIELDS = {
    "aws": ("InstanceType",),
    "gcp": ("machineType",),
    "azure": ("azure_arm_parameters", "vmSize"),
}
"""Where `node_config` names the machine type."""

_GCE_FIELDS = frozenset(
    [
        "advancedMachineFeatures",
        "canIpForward",
        "confidentialInstanceConfig",
        "deletionProtection",
        "description",
        "disks",
        "displayDevice",
        "guestAccelerators",
        "hostname",
        "instanceEncryptionKey",
        "keyRevocationActionType",
        "labels",
        "machineType",
        "metadata",
        "minCpuPlatform",
        "name",
        "networkInterfaces",
        "networkPerformanceConfig",
        "params",
        "privateIpv6GoogleAccess",
        "reservationAffinity",
        "resourcePolicies",
        "scheduling",
        "serviceAccounts",
        "shieldedInstanceConfig",
        "sourceInstanceTemplate",
        "sourceMachineImage",
        "tags",
    ]
)
"""Settable fields of an instance in Google's Compute API v1 (instances.insert, from memory), and the two that Ray reads
beside them."""


def ray_reads(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """(the file with Ray's defaults filled in, what Ray would refuse). Empty where it refuses to fill them in."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with redirect_stderr(io.StringIO()):  # Ray prints there, in colour, what it also raises
            prepared: dict[str, Any] = prepare_config(copy.deepcopy(dict(config)))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        return {}, [_schema_problem(error)]
    except Exception as error:
        # Ray's launcher ends some checks by click's exceptions, and others by a KeyError of its own.
        what = one_line(error) or type(error).__name__
        return {}, [Problem(at="", what="`ray up` refuses the file", got=what, do=_remedy(config))]
    return prepared, []


def _remedy(config: Mapping[str, Any]) -> str:
    if config.get("provider", {}).get("type") == "local":
        return "give provider.head_ip and provider.worker_ips, and no available_node_types"
    return "compare the file with the shipped one of its provider (`orchestrator cluster render --provider ...`)"


def _schema_problem(error: Any) -> Problem:
    at = ".".join(str(part) for part in error.absolute_path)
    known = sorted(error.schema.get("properties", {}))
    extra = sorted(set(error.instance) - set(known)) if error.validator == "additionalProperties" else []
    near = [match for name in extra for match in difflib.get_close_matches(name, known, n=1)]
    return Problem(
        at=at,
        what=f"no such key: {', '.join(extra)}" if extra else one_line(error.message),
        got=None if extra else one_line(error.instance, most=100),
        allowed=", ".join(known) or None,
        do=f"did you mean {near[0]}?" if near else "remove or correct it; Ray's schema takes nothing else here",
    )


def node_config_problems(cloud: str, types: Mapping[str, Any]) -> tuple[list[Problem], list[str]]:
    """(what the cloud would refuse in any `node_config`, which check was left out and why)."""
    problems: list[Problem] = []
    left_out: dict[str, None] = {}
    for name, node_type in types.items():
        at, config = f"available_node_types.{name}.node_config", node_type.get("node_config")
        known = cloud in _CHECKS and isinstance(config, Mapping)
        found, why_not = _CHECKS[cloud](config, at) if known else ([], None)
        problems += found
        left_out |= {why_not: None} if why_not else {}
    return problems, list(left_out)


def _aws(config: Mapping[str, Any], at: str) -> tuple[list[Problem], str | None]:
    """By botocore's own model of EC2's RunInstances: names and kinds of fields, and the instance type."""
    try:
        shape = run_instances()
    except ModuleNotFoundError:
        return [], "the fields of node_config, for want of botocore (pip install boto3)"
    validate = importlib.import_module("botocore.validate")
    counts = {"MinCount": 1, "MaxCount": 1}
    report = validate.ParamValidator().validate({**counts, **config}, shape)
    said = report.generate_report().splitlines()
    problems = [
        Problem(at=at, what="EC2's RunInstances has no such setting", got=one_line(line), do=_near_aws(line))
        for line in said
    ]
    wanted, known = config.get("InstanceType"), shape.members["InstanceType"].enum
    if isinstance(wanted, str) and wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=5)
        problems.append(
            Problem(
                at=f"{at}.InstanceType",
                what=f"botocore {importlib.import_module('botocore').__version__} knows no such instance type",
                got=wanted,
                allowed=", ".join(near) or "see `aws ec2 describe-instance-types`",
                do="correct it, or `pip install -U boto3` for one that is newer",
            )
        )
    return problems, None


@functools.cache
def run_instances() -> Any:
    """botocore's shape of what EC2's RunInstances takes; 0.5 s to load. Raises ModuleNotFoundError without botocore."""
    session = importlib.import_module("botocore.session").get_session()
    return session.get_service_model("ec2").operation_model("RunInstances").input_shape


def _near_aws(line: str) -> str:
    """`Unknown parameter in input: "X", must be one of: A, B` -> which one it may have meant."""
    _, _, allowed = line.partition("must be one of: ")
    unknown = line.partition('"')[2].partition('"')[0]
    near = difflib.get_close_matches(unknown, allowed.split(", "), n=1)
    return f"did you mean {near[0]}?" if near else "see the request of EC2's RunInstances"


def _azure(config: Mapping[str, Any], at: str) -> tuple[list[Problem], str | None]:
    """By the parameters of the template that Ray deploys machines with."""
    autoscaler = importlib.import_module("ray.autoscaler._private")
    template = Path(autoscaler.__path__[0], "_azure", "azure-vm-template.json")
    known = {*json.loads(template.read_text(encoding="utf-8"))["parameters"], "availability_zone"}
    given = config.get("azure_arm_parameters")
    if not isinstance(given, Mapping):
        return [Problem(at=f"{at}.azure_arm_parameters", what="it is missing", do="see cluster/azure.yaml")], None
    problems = list(_unknown(given, known, at=f"{at}.azure_arm_parameters", of="Ray's template of an Azure machine"))
    problems += _unknown(config, {"azure_arm_parameters", "azure_arm_template"}, at=at, of="an Azure node_config")
    return problems, "values in azure_arm_parameters, which Azure alone knows"


def _gcp(config: Mapping[str, Any], at: str) -> tuple[list[Problem], str | None]:
    """By the names of an instance's fields; what is inside of them Google alone knows."""
    if "acceleratorType" in config or "acceleratorConfig" in config:
        return [], "TPU machines"
    return list(_unknown(config, _GCE_FIELDS, at=at, of="an instance of Google's Compute API")), (
        "values inside of node_config, which Google alone knows"
    )


_CHECKS = {"aws": _aws, "azure": _azure, "gcp": _gcp}


def _unknown(given: Mapping[str, Any], known: set[str] | frozenset[str], *, at: str, of: str) -> Iterator[Problem]:
    return unknown_fields(given, known, what=f"{of} has no field of this name", at=lambda name: at)


def machine_type_of(cloud: str, node_config: Mapping[str, Any]) -> str | None:
    """The machine type that a `node_config` names."""
    value: Any = node_config
    for field in TYPE_FIELDS.get(cloud, ()):
        value = value.get(field) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def prices(cloud: str, prepared: Mapping[str, Any]) -> list[Price]:
    """What the head costs alone, and with as many workers as the file allows, the dearest first."""
    head_name, types = prepared["head_node_type"], prepared["available_node_types"]
    named = {name: machine_type_of(cloud, each["node_config"]) for name, each in types.items()}
    known = {name: find_machine_type(cloud, text or "") for name, text in named.items()}
    room, most = int(prepared["max_workers"]), {head_name: 1}
    dearest = sorted((name for name in types if name != head_name), key=lambda name: -_cost(known[name]))
    for name in dearest:
        taken = min(room, int(types[name]["max_workers"]))
        room -= taken
        most |= {name: taken} if taken else {}
    sizes = (("the head alone", {head_name: 1}), ("at most", most))
    return [_price(of, counts, named, known) for of, counts in sizes]


def _cost(machine: MachineType | None) -> float:
    return (machine.usd_per_hour if machine else None) or 0.0


def _price(
    of: str, counts: Mapping[str, int], named: Mapping[str, str | None], known: Mapping[str, MachineType | None]
) -> Price:
    machines, total, why_not = [], 0.0, None
    for name, count in counts.items():
        machine = known[name]
        devices = "" if machine is None or not machine.gpus else f" ({machine.gpus} {machine.device})"
        machines.append(f"{count} x {named[name] or name}{devices}")
        if machine is None:
            why_not = f"the machine type {named[name]} is not in this project's table"
        elif machine.usd_per_hour is None:
            why_not = f"the catalogue has no price of {machine.device}"
        else:
            total += count * machine.usd_per_hour
    return Price(of=of, machines=tuple(machines), usd_per_hour=None if why_not else round(total, 2), why_not=why_not)
