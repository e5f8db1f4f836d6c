"""`cluster/aws.yaml` as a user runs it, against moto's EC2 and S3: each instance is a played host while it lives.

    python -m tests.end_to_end.aws DIST

moto keeps the books, as AWS's control plane does, and `Cloud` gives each of its instances a machine: a host at the
address that moto gave it, let in by the key pair that Ray made, with the endpoint and credentials that an instance
profile would bring; an instance that is terminated takes its host along. What a run writes is on one host only: each
has a home folder of its own. Of two instances asked for together moto starts one (its `MinCount`, 5.2.5), which is what
EC2 does where it has no more spot capacity; the other has to be asked for again.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.autoscaler.tags import TAG_RAY_NODE_KIND

from orchestrator.runs.attempts import Attempts
from tests.chaos import hosts, processes
from tests.chaos.processes import ROOT
from tests.chaos.scene import RunFiles
from tests.chaos.servers import BUCKET, Bucket, Server, object_store
from tests.end_to_end import played_hosts, runs
from tests.end_to_end.played_hosts import AUTHORIZED_KEYS, PLACE, Play, ask, commands

FILE = ROOT / "cluster" / "aws.yaml"
PROFILE, NAME = "workers", "spot"
REGION, ZONE = "us-west-2", "us-west-2a"
STEPS, SAVED_EVERY = 400, 20
"""Fifteen seconds and more, so that a worker is taken away in time on a fast machine too."""
IDLE_MINUTES, ASK_AGAIN_S = 0.3, 15
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any-will-do", "AWS_SECRET_ACCESS_KEY": "any-will-do"}
OVERRIDES = {
    "name": NAME,
    "data.train": "sysconfig://stdlib/email/**/*.py",
    "data.sequence_length": 32,
    "model.vocab_size": 512,
    "model.overrides.n_layer": 2,
    "model.overrides.n_embd": 32,
    "training.tokens": "null",
    "training.steps": STEPS,
    "training.global_batch": 8,
    "training.eval_every_steps": 100,
    "checkpoint.every_steps": SAVED_EVERY,
    "resources.cpus_per_worker": 2,
}
"""What makes the demo a short one that needs two instances."""


def filled(image: str) -> dict[str, str]:
    """What a user fills in, and what the play needs: instances of two cores without GPUs, and little patience.

    moto's own public addresses lead nowhere, so the play types from inside the network.
    """
    return {
        "image: &image EDIT_IMAGE_ID": f"image: &image {image}",
        "role: &role EDIT_INSTANCE_PROFILE": f"role: &role {PROFILE}",
        "checkpoint.storage=s3://EDIT_BUCKET": f"checkpoint.storage=s3://{BUCKET}",
        "STORAGE=s3://EDIT_BUCKET": f"STORAGE=s3://{BUCKET}",
        "VENV=$HOME/orchestrator-venv": f"VENV={sys.prefix}",
        "type: aws": "type: aws\n  use_internal_ips: true",
        "InstanceType: g6.12xlarge": "InstanceType: m7i.large",
        "bash ~/orchestrator/worker.sh\n    ": "bash ~/orchestrator/worker.sh --num-cpus=2\n    ",
        "idle_timeout_minutes: 5": f"idle_timeout_minutes: {IDLE_MINUTES}",
        "REQUEST_STATUS_TIMEOUT_S=60": f"REQUEST_STATUS_TIMEOUT_S={ASK_AGAIN_S}",
    }


@dataclass
class Cloud:
    """moto's instances, and the hosts that play them."""

    play: Play
    ec2: Any
    failure: BaseException | None = None
    started: list[dict[str, Any]] = field(default_factory=list)
    """Every instance that there ever was, in order."""

    def instances(self) -> list[dict[str, Any]]:
        """All that moto knows, oldest first, those that are terminated too."""
        pages = self.ec2.get_paginator("describe_instances").paginate()
        found = [one for page in pages for reservation in page["Reservations"] for one in reservation["Instances"]]
        return sorted(found, key=lambda one: str(one["LaunchTime"]))

    def workers(self) -> list[str]:
        """Ids of the workers that are up."""
        return [one["InstanceId"] for one in self.instances() if _is_up(one) and _kind(one) == "worker"]

    def terminate(self, instance: str) -> None:
        """What EC2 does to a spot instance two minutes after its notice."""
        self.ec2.terminate_instances(InstanceIds=[instance])

    def follow(self, done: threading.Event) -> None:
        """Powers hosts on and off as instances come and go."""
        try:
            while not done.wait(0.3):
                self._catch_up()
        except BaseException as error:
            self.failure = error
            raise

    def _catch_up(self) -> None:
        up = {one["InstanceId"]: one for one in self.instances() if _is_up(one)}
        for name in set(self.play.machines) - set(up):
            self.play.kill_host(name)
        for name in [name for name in up if name not in self.play.machines]:
            (key,) = self.ec2.describe_key_pairs(KeyNames=[up[name]["KeyName"]], IncludePublicKey=True)["KeyPairs"]
            AUTHORIZED_KEYS.write_text(f"{key['PublicKey']}\n")
            self.play.start_host(name, number=int(up[name]["PrivateIpAddress"].rpartition(".")[2]))
            self.started.append(up[name])


def _is_up(instance: dict[str, Any]) -> bool:
    return instance["State"]["Name"] in ("pending", "running")


def _kind(instance: dict[str, Any]) -> str:
    return next(str(tag["Value"]) for tag in instance["Tags"] if tag["Key"] == TAG_RAY_NODE_KIND)


def start_moto() -> Server:
    """EC2, IAM and S3 at the hosts' gateway."""
    server = object_store(folder=PLACE, port=processes.free_port(), machine=hosts.SUITE)
    server.environment = {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    server.start()
    return server


def prepare_account() -> str:
    """What a user has before the file: a bucket, an instance profile, a network. Gives an image's id."""
    import boto3

    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName=PROFILE)
    for subnet in ec2.describe_subnets()["Subnets"]:  # those of the default network lead nowhere
        ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    vpc = ec2.create_vpc(CidrBlock=hosts.NETWORK)["Vpc"]["VpcId"]
    ec2.create_subnet(VpcId=vpc, CidrBlock=hosts.NETWORK, AvailabilityZone=ZONE)
    return str(ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"])


@contextmanager
def cloud_of(play: Play) -> Iterator[Cloud]:
    """Instances have hosts meanwhile."""
    import boto3

    cloud, done = Cloud(play=play, ec2=boto3.client("ec2")), threading.Event()
    thread = threading.Thread(target=cloud.follow, args=(done,), name="cloud")
    thread.start()
    try:
        yield cloud
    finally:
        done.set()
        thread.join()
    if cloud.failure is not None:
        raise cloud.failure


def prepare(dist: Path) -> tuple[Play, Bucket]:
    """The account with its bucket, and a checkout with the names filled in."""
    network = played_hosts.make_place()
    given = {**CREDENTIALS, "AWS_ENDPOINT_URL": start_moto().uri}
    os.environ.update(given, AWS_DEFAULT_REGION=REGION)
    bucket = Bucket(given["AWS_ENDPOINT_URL"])
    text = played_hosts.filled_in(FILE, filled(prepare_account()))
    play = played_hosts.lay_out(network, file=FILE, text=text, dist=dist, user="ubuntu", environment=given)
    return play, bucket


def act(play: Play, bucket: Bucket, seen: dict[str, Any]) -> None:
    """Up, a training, its worker taken away, its end, an idle cluster, down. Writes what it sees into `seen`."""
    typed = commands(FILE)
    play.type_in(typed["make wheel"].partition("&& ")[2])
    seen["check"] = play.type_in(typed["cluster check"])
    with cloud_of(play) as cloud:
        play.type_in(typed["ray up"])
        seen["after_up"] = [_kind(one) for one in cloud.started]
        with played_hosts.dashboard(play):
            _train(cloud, bucket, typed["ray job submit"], seen)
            play.await_true(lambda: not cloud.workers(), "workers go")
            seen["after_idle"] = [_kind(one) for one in cloud.instances() if _is_up(one)]
        seen["running"] = len(play.left())
        seen["down"] = play.type_in(typed["ray down"])[-1000:]
        play.await_true(lambda: not played_hosts.on_hosts(), "hosts end after ray down", within_s=20)
        seen["after_down"] = sorted({one["State"]["Name"] for one in cloud.instances()})


def _train(cloud: Cloud, bucket: Bucket, submit: str, seen: dict[str, Any]) -> None:
    """The demo, made short, on workers of which one is taken away."""
    play, head = cloud.play, cloud.started[0]["InstanceId"]
    state = play.home(head) / ".orchestrator"
    files = RunFiles(runs=state / "runs", name=NAME, bucket=bucket)
    options = "submit --no-wait --submission-id first"
    play.type_in(
        " ".join([submit.replace("submit", options, 1), *(f"'{key}={value}'" for key, value in OVERRIDES.items())])
    )
    play.await_true(lambda: "waiting for room" in _log() or _ended(), "the job waits for room")
    play.await_true(lambda: len(cloud.workers()) == 2 or _ended(), "workers are requested")
    play.await_true(lambda: files.is_saved(2 * SAVED_EVERY) or _ended(), "the second checkpoint")
    victim = cloud.workers()[0]
    cloud.terminate(victim)
    play.await_true(_ended, "the job ends")
    seen["log"], seen["status"] = _log(), ask("/api/jobs/first")["status"]
    seen["workers"] = [(one["InstanceId"], one.get("InstanceLifecycle")) for one in cloud.started[1:]]
    seen["victim"] = victim
    assert files.folder is not None, seen["log"]
    seen["resumed_step"] = Attempts(files.folder).resumed_step(2)
    (run,) = re.findall(r"^MLflow run: (\w+)$", seen["log"], re.MULTILINE)
    seen["curve"] = sorted(runs.curve(run, "train/loss", uri=f"sqlite:///{state / 'mlflow.db'}"))
    seen["kept"] = bucket.names()


def _log() -> str:
    return str(ask("/api/jobs/first/logs")["logs"])


def _ended() -> bool:
    return ask("/api/jobs/first")["status"] not in ("PENDING", "RUNNING")


def main(dist: Path) -> int:
    """Plays it; see `played_hosts.perform`."""
    if not hosts.inside():
        hosts.enter("tests.end_to_end.aws", [str(dist)])
    play, bucket = prepare(dist)
    return played_hosts.perform(play, lambda seen: act(play, bucket, seen))


if __name__ == "__main__":
    sys.exit(main(*(Path(argument).absolute() for argument in sys.argv[1:])))
