"""What all tests share: a state folder of their own, few threads, no hub, and one Ray cluster for those that ask."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.s3 import s3_server

# Read by the libraries when they are imported, so before any test module is.
os.environ.update(
    OMP_NUM_THREADS="1",  # the tests' models are tiny, and workers share the machine's cores
    TOKENIZERS_PARALLELISM="false",  # tests fork after tokenizing
    MPLBACKEND="Agg",
    HF_HUB_OFFLINE="1",  # a hub name typed into a test fails at once instead of after retries
    RAY_AUTH_MODE="disabled",  # a token in the developer's home would otherwise turn authentication on
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # as in a run: at Ray's own 15 anything else on the machine starves the workers
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # Ray's coming default; it warns until it is chosen
)
# What a developer's shell points at is not for tests to write to.
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_TMPDIR"):
    os.environ.pop(name, None)


_NOT_OURS = (
    # peft 0.21 asks models for a property that transformers 5.23 has renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils",
)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except those that one library raises about another."""
    for entry in _NOT_OURS:
        config.addinivalue_line("filterwarnings", entry)


_WHOLLY_SLOW = re.compile(r"^pytestmark = (\[.*)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of slow tests alone are not imported for the fast ones: they load torch and Ray."""
    if config.getoption("markexpr") != "not slow" or collection_path.suffix != ".py":
        return None
    return True if _WHOLLY_SLOW.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a cluster have all cores to themselves; the other slow ones share them, and plays of hosts, which wait
    most of their time, are among those."""
    for item in items:
        plays = item.get_closest_marker("plays") is not None
        if "ray_cluster" in getattr(item, "fixturenames", ()) or ("end_to_end" in item.path.parts and not plays):
            item.add_marker(pytest.mark.cluster)


# A slow machine is no counterexample; pytest-timeout ends what hangs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def orchestrator_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs, caches and the default MLflow store of this test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server with an empty bucket, `s3.BUCKET`; the environment leads to it."""
    with s3_server() as client:
        yield client


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four logical CPUs, started when the first test asks for it and shared by all that do."""
    import ray

    # pytest's own folders are too long for Ray's Unix sockets (107 bytes).
    temp = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=temp)
    yield
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
