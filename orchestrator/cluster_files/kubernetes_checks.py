"""Checks of KubeRay's manifests, RayCluster and RayJob: names of fields, what the autoscaler reads, sizes and prices.

The fields are those of KubeRay's definitions, version 1.7.0 (helm-chart/kuberay-operator/crds). What stands inside of a
pod's template is Kubernetes' own, and not looked at but for the first container's resources, which Ray reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.cluster_files.common_checks import unknown_fields
from orchestrator.cluster_files.findings import Price, Problem
from orchestrator.errors import SpecError, one_line
from orchestrator.planning.hardware import find_device

GPU_ANNOTATION = "orchestrator/gpu"
"""Annotation by which a manifest tells the device of its GPU pods, for their price."""
_CLUSTER = frozenset(
    [
        "upgradeStrategy",
        "authOptions",
        "suspend",
        "managedBy",
        "autoscalerOptions",
        "headServiceAnnotations",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "historyServerOptions",
        "networkPolicy",
        "tlsOptions",
        "headGroupSpec",
        "rayVersion",
        "workerGroupSpecs",
    ]
)
_JOB = frozenset(
    [
        "activeDeadlineSeconds",
        "backoffLimit",
        "rayClusterSpec",
        "submitterPodTemplate",
        "metadata",
        "clusterSelector",
        "submitterConfig",
        "managedBy",
        "deletionStrategy",
        "entrypoint",
        "runtimeEnvYAML",
        "jobId",
        "submissionMode",
        "entrypointResources",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "ttlSecondsAfterFinished",
        "preRunningDeadlineSeconds",
        "shutdownAfterJobFinishes",
        "suspend",
    ]
)
_HEAD = frozenset(
    [
        "template",
        "rayStartParams",
        "headService",
        "enableIngress",
        "resources",
        "labels",
        "serviceType",
        "ingressOptions",
    ]
)
_GROUP = frozenset(
    [
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "numOfHosts",
        "rayStartParams",
        "template",
        "scaleStrategy",
        "suspend",
        "resources",
        "labels",
        "idleTimeoutSeconds",
        "priority",
    ]
)
_QUEUE = "kueue.x-k8s.io/queue-name"


def manifest_problems(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """All that is wrong with a RayCluster or RayJob; where its shape is none of theirs, that alone."""
    if shapeless := list(_shapeless(manifest)):
        yield from shapeless
        return
    kind, spec = manifest.get("kind"), manifest.get("spec") or {}
    if kind == "RayJob":
        yield from _unknown(spec, _JOB, at="spec")
        yield from _job_problems(manifest)
    cluster, at = _cluster_of(manifest)
    if cluster is None:
        if not spec.get("clusterSelector"):
            yield Problem(
                at="spec", what=f"a {kind} without a cluster", do="give spec.rayClusterSpec, or spec.clusterSelector"
            )
        return
    yield from _unknown(cluster, _CLUSTER, at=at)
    yield from _unknown(cluster.get("headGroupSpec") or {}, _HEAD, at=f"{at}.headGroupSpec")
    sizes: list[Problem] = []
    for number, group in enumerate(cluster.get("workerGroupSpecs") or ()):
        where = f"{at}.workerGroupSpecs.{number}"
        yield from _unknown(group, _GROUP, at=where)
        sizes += _size_problems(group, at=where)
    yield from sizes
    if not sizes:
        yield from _unreadable(cluster, at=at)


def _shapeless(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Parts that are no mapping or list where all that follows counts on one."""
    cluster, at = _cluster_of(manifest)
    groups = cluster.get("workerGroupSpecs") if isinstance(cluster, Mapping) else None
    parts: list[tuple[str, Any, type]] = [
        ("metadata", manifest.get("metadata"), Mapping),
        ("spec", manifest.get("spec"), Mapping),
        (at, cluster, Mapping),
        (f"{at}.headGroupSpec", (cluster if isinstance(cluster, Mapping) else {}).get("headGroupSpec"), Mapping),
        (f"{at}.workerGroupSpecs", groups, list),
        *((f"{at}.workerGroupSpecs.{n}", group, Mapping) for n, group in enumerate(_listed(groups))),
        *(
            (f"{at}.workerGroupSpecs.{n}.template", _of(group, "template"), Mapping)
            for n, group in enumerate(_listed(groups))
        ),
    ]
    for where, value, kind in parts:
        if value is not None and not isinstance(value, kind):
            yield Problem(
                at=where,
                what=f"this is no {'list' if kind is list else 'mapping'}",
                got=one_line(value, most=100),
                do="see cluster/kubernetes/ray-cluster.yaml",
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _cluster_of(manifest: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """(the cluster's spec in a manifest, where it stands)."""
    if manifest.get("kind") == "RayCluster":
        return manifest.get("spec"), "spec"
    return _of(manifest.get("spec"), "rayClusterSpec"), "spec.rayClusterSpec"


def _job_problems(manifest: Mapping[str, Any]) -> Iterator[Problem]:
    spec, labels = manifest.get("spec") or {}, _of(manifest.get("metadata"), "labels")
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        yield Problem(
            at="spec.entrypoint", what="the job has no command", do="such as `python -m jobs.pretrain --config ...`"
        )
    if not _of(labels, _QUEUE):
        return
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield Problem(
            at="spec.shutdownAfterJobFinishes",
            what="Kueue admits no RayJob whose cluster stays when it ends",
            got=str(spec.get("shutdownAfterJobFinishes")),
            allowed="true",
            do="set it to true",
        )
    if spec.get("clusterSelector"):
        yield Problem(
            at="spec.clusterSelector",
            what="Kueue admits no RayJob that runs on a cluster which is there already",
            do="give spec.rayClusterSpec instead",
        )


def _size_problems(group: Mapping[str, Any], *, at: str) -> Iterator[Problem]:
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    for name, value in (("minReplicas", low), ("maxReplicas", high)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield Problem(
                at=f"{at}.{name}",
                what="Ray's autoscaler needs a whole number here",
                got=str(value),
                allowed="0 or more",
                do=f"set {name}",
            )
            return
    if low > high:  # type: ignore[operator]
        yield Problem(at=at, what="minReplicas is above maxReplicas", got=f"{low} > {high}", do="exchange them")


def _unreadable(cluster: Mapping[str, Any], *, at: str) -> Iterator[Problem]:
    """What Ray's autoscaler would fail on, by its own reading of the manifest."""
    if "headGroupSpec" not in cluster or not cluster.get("workerGroupSpecs"):
        missing = "headGroupSpec" if "headGroupSpec" not in cluster else "workerGroupSpecs"
        yield Problem(at=f"{at}.{missing}", what="it is missing", do="see cluster/kubernetes/ray-cluster.yaml")
        return
    try:
        autoscaling_config(cluster)
    except KeyError as error:
        yield Problem(at=at, what="Ray's autoscaler misses a field", got=str(error), do="add it to each group")
    except Exception as error:  # its own checks raise ValueError, AssertionError and jsonschema's errors
        yield Problem(at=at, what="Ray's autoscaler cannot read this", got=one_line(error), do="correct it")


def autoscaling_config(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of a RayCluster's spec; raises what it raises."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    whole = {"metadata": {"name": "cluster", "namespace": "default"}, "spec": copy.deepcopy(dict(cluster))}
    made: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(whole)
    return made


def most_pods(manifest: Mapping[str, Any]) -> int:
    """Pods at the largest, the head counted."""
    cluster, _ = _cluster_of(manifest)
    groups = (cluster or {}).get("workerGroupSpecs") or ()
    return 1 + sum(group.get("maxReplicas") or 0 for group in groups if isinstance(group.get("maxReplicas"), int))


def pod_prices(manifest: Mapping[str, Any]) -> list[Price]:
    """What the GPUs of the pods would cost at the catalogue's price of the device that an annotation names."""
    cluster, _ = _cluster_of(manifest)
    groups = (cluster or {}).get("workerGroupSpecs") or ()
    name = _of(_of(manifest.get("metadata"), "annotations"), GPU_ANNOTATION)
    gpus = [(group.get("groupName"), group.get("maxReplicas") or 0, _gpus(group)) for group in groups]
    machines = tuple(f"{count} x {group} ({each} GPU)" for group, count, each in gpus)
    if name is None:
        return [_unpriced(machines, f"the annotation {GPU_ANNOTATION} does not name the GPU")]
    try:
        device = find_device(str(name))
    except SpecError:
        return [_unpriced(machines, f"{GPU_ANNOTATION}: {name} is not in the catalogue")]
    if device.usd_per_hour is None:
        return [_unpriced(machines, f"the catalogue has no price of {device.name}")]
    total = device.usd_per_hour * sum(count * each for _, count, each in gpus)
    return [Price(of="GPU pods at most", machines=machines, usd_per_hour=round(total, 2))]


def _unpriced(machines: tuple[str, ...], why_not: str) -> Price:
    return Price(of="GPU pods at most", machines=machines, usd_per_hour=None, why_not=why_not)


def _gpus(group: Mapping[str, Any]) -> int:
    containers = _listed(_of(_of(group.get("template"), "spec"), "containers"))
    limits = _of(_of(containers[0], "resources"), "limits") if containers else None
    wanted = str(_of(limits, "nvidia.com/gpu"))
    return int(wanted) if wanted.isdigit() else 0


def _unknown(given: Mapping[str, Any], known: frozenset[str], *, at: str) -> Iterator[Problem]:
    return unknown_fields(given, known, what="KubeRay has no such field here", at=lambda name: f"{at}.{name}")
