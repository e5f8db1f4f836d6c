"""`cluster/aws.yaml` taken by Ray's own AWS provider, against moto's AWS in this process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from moto import mock_aws

from orchestrator.cluster_files.common_checks import PLACEHOLDER
from orchestrator.cluster_files.shipped import shipped_text

pytestmark = pytest.mark.slow

REGION = "us-west-2"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of botocore and moto about each other
def test_rays_provider_starts_what_the_file_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler import tags
    from ray.autoscaler._private import commands

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a key pair there
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", REGION)):
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        ec2, iam = boto3.client("ec2", region_name=REGION), boto3.client("iam", region_name=REGION)
        iam.create_instance_profile(InstanceProfileName="workers")
        names = {
            "EDIT_IMAGE_ID": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
            "EDIT_INSTANCE_PROFILE": "workers",
            "EDIT_BUCKET": "bucket",
        }
        text = PLACEHOLDER.sub(lambda name: names[name[0]], shipped_text("aws"))
        config = commands._bootstrap_config(yaml.safe_load(text), no_config_cache=True)
        workers = config["available_node_types"]["gpu_workers"]
        assert (workers["resources"]["CPU"], workers["resources"]["GPU"]) == (48, 4), "looked up by Ray"
        provider = commands._get_node_provider(config["provider"], config["cluster_name"])
        provider.create_node(
            workers["node_config"],
            {tags.TAG_RAY_NODE_KIND: "worker", tags.TAG_RAY_NODE_NAME: "w", tags.TAG_RAY_NODE_STATUS: "uninitialized"},
            1,
        )
        (reservation,) = ec2.describe_instances()["Reservations"]
        (instance,) = reservation["Instances"]
        assert (instance["InstanceType"], instance["InstanceLifecycle"]) == ("g6.12xlarge", "spot")
        assert instance["IamInstanceProfile"]["Arn"].endswith("/workers")


def test_instances_that_ec2_did_not_give_are_asked_for_again_after_a_minute() -> None:
    (export,) = re.findall(r"^ +export (RAY_AUTOSCALER_\w+=\d+)$", shipped_text("aws"), re.MULTILINE)
    reads = "from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig as Its"
    command = ["env", export, sys.executable, "-c", f"{reads}; print(Its.request_status_timeout_s)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "60\n"
