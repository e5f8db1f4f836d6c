"""Every kind of storage, on a real S3 server and on Azure's emulator, which fsspec opens."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoints import catalog, storage
from orchestrator.checkpoints.catalog import newest_good
from orchestrator.checkpoints.storage import FolderStorage, Storage, open_storage
from orchestrator.errors import StorageError
from orchestrator.runs.job import LoopState
from orchestrator.worker.engine import needed_by
from tests.azure_blobs import azure_server
from tests.s3 import BUCKET
from tests.test_async_writer import Weights, ended, eventually, forked, saver

pytestmark = pytest.mark.slow  # torch, and a server


@pytest.fixture(params=["folder", "object store", "through fsspec"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty place for checkpoints."""
    if request.param == "folder":
        return open_storage(tmp_path / "checkpoints")
    if request.param == "object store":
        return bucket(request.getfixturevalue("s3"), tmp_path)
    return open_storage(f"{request.getfixturevalue('azure')}/{tmp_path.name}", scratch=tmp_path / "scratch")


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azure_server(tmp_path_factory.mktemp("azure")) as uri:
        yield uri


def bucket(s3: Any, tmp_path: Path) -> Storage:
    return open_storage(f"s3://{BUCKET}/{tmp_path.name}", scratch=tmp_path / "scratch")


def save(place: Storage, step: int, *, weights: Weights | None = None, **more: Any) -> str | None:
    weights = weights or Weights()
    weights.set(step)
    saving = saver(weights, place, **more)
    saving.save(LoopState(step=step))
    try:
        return saving.wait()
    finally:
        saving.close()


def newest_step(place: Storage, *, rank: int = 0) -> int | None:
    """The step of the newest good checkpoint, whose every number must be that step in the files that a rank needs."""
    found = newest_good(place).checkpoint
    if found is None:
        return None
    folder = catalog.fetch(place, found, needed=partial(needed_by, rank))
    files = [file for file in folder.rglob("*.pt") if needed_by(rank, file.name)]
    assert files
    for file in files:
        for tensor in torch.load(file).values():
            assert tensor.unique().tolist() == [found.state.step]
    return found.state.step


def keys(s3: Any, tmp_path: Path) -> set[str]:
    """Names of the checkpoints that anything is left of."""
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{tmp_path.name}/step-").get("Contents", [])
    return {each["Key"].split("/")[1] for each in listed}


def test_what_is_saved_is_found_and_fetched(place: Storage) -> None:
    assert newest_step(place) is None
    assert "step-00000005" in str(save(place, 5))
    save(place, 10)
    assert newest_step(place) == 10


def test_all_ranks_make_one_checkpoint_and_each_fetches_what_it_needs(place: Storage, tmp_path: Path) -> None:
    leader = saver(Weights(), place, world_size=2)
    leader.save(LoopState(step=0))
    assert newest_step(place) is None
    there = place if isinstance(place, FolderStorage) else open_storage(str(place), scratch=tmp_path / "scratch")
    other = saver(Weights(rank=1), there, world_size=2)
    other.save(LoopState(step=0))
    other.wait()
    leader.wait()
    assert newest_step(place, rank=1) == 0
    for each in (leader, other):
        each.close()


def test_the_newest_are_kept(place: Storage) -> None:
    for step in (1, 2, 3):
        save(place, step, keep=2)
    assert [entry.step for entry in place.entries()] == [3, 2]


def test_the_newest_attempt_counts_where_two_have_saved_the_same_step(place: Storage) -> None:
    save(place, 5, attempt=1)
    save(place, 5, attempt=2)
    found = newest_good(place).checkpoint
    assert found is not None
    assert found.attempt == 2
    voided = newest_good(place, void=lambda attempt, step: attempt == 2).checkpoint
    assert voided is None or voided.attempt == 1


def test_going_back_discards_what_lies_ahead(place: Storage) -> None:
    for step in (5, 10):
        save(place, step, keep=2)
    catalog.discard_newer(place, 5)
    assert newest_step(place) == 5


def test_whoever_only_looks_needs_no_room_here_and_learns_where_the_newest_one_is(place: Storage) -> None:
    published = [save(place, step) for step in (5, 10)]
    looking = str(place)
    assert catalog.steps(looking) == [10]
    assert catalog.newest_location(looking) == published[1]
    assert catalog.newest_location(looking, void=lambda attempt, step: step > 5) is None


def test_an_upload_that_was_killed_does_not_count(s3: Any, tmp_path: Path) -> None:
    place = bucket(s3, tmp_path)
    save(place, 5)
    large = Weights(elements=10_000_000)  # 40 MB: several parts

    def upload() -> None:
        # A client of its own: the threads of the one that was opened above have not come along.
        save(bucket(s3, tmp_path), 10, weights=large)

    child = forked(upload)
    eventually(lambda: bool(s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads")))
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert newest_step(place) == 5


def test_what_an_earlier_attempt_uploaded_in_part_is_removed(s3: Any, tmp_path: Path) -> None:
    place = bucket(s3, tmp_path)
    torn = saver(Weights(), place, world_size=2)
    torn.save(LoopState(step=10))
    eventually(lambda: "step-00000010.a1" in keys(s3, tmp_path))
    torn.close()
    assert newest_step(place) is None
    save(place, 15, attempt=2)
    assert keys(s3, tmp_path) == {"step-00000015.a2"}
    assert not list((tmp_path / "scratch").rglob("*15*")), "the upload frees its space here"


def test_an_object_that_arrives_damaged_is_named_and_the_one_before_is_taken(s3: Any, tmp_path: Path) -> None:
    place = bucket(s3, tmp_path)
    for step in (5, 10):
        save(place, step, keep=2)
    key = f"{tmp_path.name}/step-00000010.a1/state/model.pt"
    content = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))
    found = newest_good(place).checkpoint
    assert found is not None
    with pytest.raises(StorageError, match=r"step-00000010\.a1 arrived damaged: state/model\.pt has another checksum"):
        catalog.fetch(place, found, needed=partial(needed_by, 0))
    second = newest_good(place, without={found.path})
    assert second.checkpoint is not None
    assert second.checkpoint.state.step == 5


def test_a_truncated_object_is_passed_over(s3: Any, tmp_path: Path) -> None:
    place = bucket(s3, tmp_path)
    for step in (5, 10):
        save(place, step, keep=2)
    s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/step-00000010.a1/state/model.pt", Body=b"short")
    found = newest_good(place)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 5
    assert "model.pt has 5 bytes instead of" in found.rejected[0]


def test_a_bucket_that_is_not_there_is_a_storage_error(s3: Any, tmp_path: Path) -> None:
    place = open_storage("s3://no-such-bucket/runs", scratch=tmp_path)
    with pytest.raises(StorageError, match="no-such-bucket"):
        save(place, 5)


def test_a_uri_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the object store cannot be opened"):
        open_storage("gopher://somewhere/else", scratch=tmp_path)


class FailingAtFirst:
    """A bucket that is away at the first call of each kind, and there at the next."""

    def __init__(self, files: Any) -> None:
        self._files, self._failed = files, set[str]()

    def __getattr__(self, name: str) -> Any:
        if name in self._failed:
            return getattr(self._files, name)
        self._failed.add(name)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("AWS Error NETWORK_CONNECTION during an operation: connection refused")

        return fail


def test_a_training_bears_a_bucket_that_is_away_for_a_while_and_a_look_at_it_does_not(s3: Any, tmp_path: Path) -> None:
    place = bucket(s3, tmp_path)
    place._files = FailingAtFirst(place._files)  # type: ignore[attr-defined]
    assert save(place, 10) is not None
    assert newest_step(place) == 10
    looking = open_storage(f"s3://{BUCKET}/{tmp_path.name}")
    looking._files = FailingAtFirst(looking._files)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        looking.entries()


def test_a_server_that_is_gone_fails_the_checkpoint_and_does_not_hold_up_the_training(s3: Any, tmp_path: Path) -> None:
    with socket.socket() as nobody, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PATIENCE_S", 1.0)
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        place = bucket(s3, tmp_path)
        saving = saver(Weights(), place)
        started = time.monotonic()
        saving.save(LoopState(step=5))
        assert time.monotonic() - started < 1
        eventually(lambda: saving.failure() is not None)
        saving.close()
