"""The Kubernetes manifests, shipped and rendered, against schemas that others publish.

Pods are checked against Kubernetes' own, strictly (kubernetes-validate carries them). KubeRay publishes its schemas in
its repository alone: with KUBERAY_CRDS naming a folder that holds its custom resource definitions
(`helm-chart/kuberay-operator/crds`), whole manifests are checked, and our own lists of KubeRay's fields. Last done on
KubeRay 1.7.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from orchestrator.cluster_files import kubernetes_checks
from orchestrator.cluster_files.common_checks import PLACEHOLDER
from orchestrator.cluster_files.render import render
from orchestrator.cluster_files.shipped import SHIPPED, folder, shipped_text

KUBERNETES = "1.37"
MANIFESTS = [name for name in SHIPPED if name.startswith("kubernetes")]
CRDS = os.environ.get("KUBERAY_CRDS", "")
needs_crds = pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")


def manifest(name: str) -> dict[str, Any]:
    """As shipped, or rendered for 16 GPUs, with its names filled in."""
    shipped, _, is_rendered = name.partition(" ")
    text = render(shipped, gpu="H100", gpus=16).text if is_rendered else shipped_text(shipped)
    made = yaml.safe_load(PLACEHOLDER.sub(lambda found: found[0].lower().replace("_", "-"), text))
    assert isinstance(made, dict)
    return made


def pod_templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every template of a pod in a manifest."""
    if isinstance(value, Mapping):
        if "containers" in (value.get("spec") or {}):
            yield dict(value)
        for inner in value.values():
            yield from pod_templates(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_templates(inner)


def check_pods(made: dict[str, Any]) -> int:
    """The number of them, all found right."""
    templates = list(pod_templates(made))
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    return len(templates)


every_manifest = pytest.mark.parametrize("name", [*MANIFESTS, *(f"{name} rendered" for name in MANIFESTS)])


@every_manifest
def test_pods_are_what_kubernetes_takes(name: str) -> None:
    assert check_pods(manifest(name)) >= 2, "the head's and the workers'"


def mlflow() -> list[dict[str, Any]]:
    """The documents of the server's manifest."""
    text = (folder() / "kubernetes" / "mlflow.yaml").read_text(encoding="utf-8")
    filled = PLACEHOLDER.sub(lambda found: found[0].lower().replace("_", "-"), text)
    return list(yaml.safe_load_all(filled))


def test_the_tracking_server_is_what_kubernetes_takes() -> None:
    for made in mlflow():
        kubernetes_validate.validate(made, KUBERNETES, strict=True)
    assert check_pods(mlflow()[0]) == 1


@every_manifest
def test_pods_find_the_tracking_server_by_its_secret_and_name(name: str) -> None:
    server, service = mlflow()
    (secret,) = server["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    for template in pod_templates(manifest(name)):
        (taken,) = template["spec"]["containers"][0]["envFrom"]
        assert taken["secretRef"] == {**secret["secretRef"], "optional": True}
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    top = (folder() / "kubernetes" / "mlflow.yaml").read_text(encoding="utf-8").partition("apiVersion")[0]
    assert f"MLFLOW_TRACKING_URI={address}" in top


def test_the_image_has_the_servers_script_where_its_pod_looks_for_it() -> None:
    command = mlflow()[0]["spec"]["template"]["spec"]["containers"][0]["command"]
    image = (folder() / "kubernetes" / "Dockerfile").read_text(encoding="utf-8")
    assert command[1] == "/home/ray/tracking-server.sh"
    assert "WORKDIR /home/ray" in image
    assert "COPY dist/tracking-server.sh tracking-server.sh" in image


def test_a_mistake_in_a_pod_would_be_found() -> None:
    made = manifest("kubernetes")
    made["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        check_pods(made)


# -- against KubeRay's definitions -----------------------------------------------------------------------------------


def schema(kind: str) -> dict[str, Any]:
    """The definition's schema of version v1, with fields refused that it does not name."""
    definition = yaml.safe_load(Path(CRDS, f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    made: dict[str, Any] = closed(version["schema"]["openAPIV3Schema"])
    return made


def closed(value: Any) -> Any:
    """As a Kubernetes server prunes: what a schema does not name is no part of the object."""
    if isinstance(value, list):
        return [closed(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: closed(each) for key, each in value.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = made.get("x-kubernetes-preserve-unknown-fields", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@needs_crds
@every_manifest
def test_a_manifest_is_what_kuberay_takes(name: str) -> None:
    made = manifest(name)
    wanted = schema(made["kind"])
    wanted["properties"].pop("metadata")  # Kubernetes' own, for every object
    jsonschema.validate({key: value for key, value in made.items() if key != "metadata"}, wanted)


@needs_crds
def test_our_lists_of_kuberays_fields_are_its_own() -> None:
    cluster = schema("RayCluster")["properties"]["spec"]["properties"]
    assert set(cluster) == kubernetes_checks._CLUSTER
    assert set(cluster["headGroupSpec"]["properties"]) == kubernetes_checks._HEAD
    assert set(cluster["workerGroupSpecs"]["items"]["properties"]) == kubernetes_checks._GROUP
    assert set(schema("RayJob")["properties"]["spec"]["properties"]) == kubernetes_checks._JOB
