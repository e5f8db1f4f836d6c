"""Which checkpoints count, whatever state a folder is in."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.catalog import Checkpoint
from orchestrator.checkpoints.file_sums import FileSum
from orchestrator.checkpoints.storage import FolderStorage
from orchestrator.errors import StorageError
from orchestrator.runs.job import LoopState


def save(folder: Path, step: int, *, attempt: int = 1) -> Path:
    """A checkpoint of two ranks, published."""
    storage = FolderStorage(folder)
    writing = storage.begin(step, attempt)
    (writing / "state").mkdir(exist_ok=True)
    files = {}
    for rank in range(2):
        content = bytes(range(256)) * (rank + 1)
        (writing / "state" / f"rank{rank}.pt").write_bytes(content)
        files[f"state/rank{rank}.pt"] = FileSum(bytes=len(content), crc32=zlib.crc32(content), rank=rank)
    storage.hand_in(step, attempt, files)
    told = catalog.manifest(
        Checkpoint(
            path=Path(),
            state=LoopState(step=step, tokens=10 * step),
            world_size=2,
            zero_stage=2,
            attempt=attempt,
            micro_batch=4,
            files=files,
        )
    )
    return Path(storage.publish(step, attempt, told))


def steps_of(folder: Path) -> list[int]:
    return [entry.step for entry in reversed(FolderStorage(folder).entries())]


def test_the_newest_complete_checkpoint_is_found_with_its_state(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10, attempt=3)
    found = catalog.newest_good(tmp_path)
    assert found.rejected == ()
    assert found.checkpoint is not None
    assert found.checkpoint.path == newest == tmp_path / "step-00000010"
    assert found.checkpoint.state == LoopState(step=10, tokens=100)
    assert (found.checkpoint.attempt, found.checkpoint.micro_batch) == (3, 4)
    assert found.checkpoint.files["state/rank1.pt"].rank == 1


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert catalog.newest_good(tmp_path / "nowhere").checkpoint is None


def test_a_checkpoint_in_the_making_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (FolderStorage(tmp_path).begin(10, 1) / "rank0.pt").write_bytes(b"half")
    found = catalog.newest_good(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 5


def truncate(path: Path) -> None:
    file = path / "state" / "rank1.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / "state" / "rank1.pt"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))


def remove_a_file(path: Path) -> None:
    (path / "state" / "rank0.pt").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_the_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-10])


def empty_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("")


def replace_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"state": {"step": 10}, "files": []}))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "rank1.pt has 511 bytes instead of 512",
    flip_a_bit: "rank1.pt has another checksum",
    remove_a_file: "rank0.pt is missing",
    remove_the_manifest: "its manifest cannot be read",
    truncate_the_manifest: "its manifest cannot be read",
    empty_the_manifest: "its manifest cannot be read",
    replace_the_manifest: "its manifest cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    found = catalog.newest_good(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 5
    assert len(found.rejected) == 1
    assert "step-00000010 is damaged and was passed over" in found.rejected[0]
    assert DAMAGES[damage] in found.rejected[0]


def test_every_damaged_one_is_named(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path, 5))
    truncate(save(tmp_path, 10))
    found = catalog.newest_good(tmp_path)
    assert found.checkpoint is None
    assert ["step-00000010" in found.rejected[0], "step-00000005" in found.rejected[1]] == [True, True]


def test_a_void_checkpoint_is_passed_over_without_a_word(tmp_path: Path) -> None:
    save(tmp_path, 5, attempt=1)
    save(tmp_path, 10, attempt=1)
    found = catalog.newest_good(tmp_path, void=lambda attempt, step: attempt == 1 and step > 5)
    assert found.checkpoint is not None
    assert (found.checkpoint.state.step, found.rejected) == (5, ())


def test_one_that_a_rank_could_not_load_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    found = catalog.newest_good(tmp_path, without={newest})
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 5
    assert "a rank could not load it" in found.rejected[0]


def test_a_manifest_from_before_attempts_were_numbered_is_read(tmp_path: Path) -> None:
    file = save(tmp_path, 5) / "manifest.json"
    told = json.loads(file.read_text())
    for name in ("attempt", "micro_batch"):
        del told[name]
    told["files"] = {name: {k: each[k] for k in ("bytes", "crc32")} for name, each in told["files"].items()}
    file.write_text(json.dumps(told))
    found = catalog.newest_good(tmp_path).checkpoint
    assert found is not None
    assert (found.attempt, found.micro_batch) == (0, None)


def test_pruning_keeps_the_newest_and_clears_what_earlier_attempts_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    storage = FolderStorage(tmp_path)
    earlier, own, later = (storage.begin(5, attempt) for attempt in (1, 2, 3))
    catalog.prune(tmp_path, keep=2, newest=4, attempt=2)
    assert steps_of(tmp_path) == [3, 4]
    assert [path.exists() for path in (earlier, own, later)] == [False, True, True]


def test_pruning_does_not_count_what_lies_behind_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 90):
        save(tmp_path, step)
    catalog.prune(tmp_path, keep=2, newest=10, attempt=2)
    assert steps_of(tmp_path) == [5, 10, 90]


def test_checkpoints_that_were_passed_over_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 5)
    flip_a_bit(save(tmp_path, 10))
    catalog.discard_newer(tmp_path, 5)
    save(tmp_path, 7)
    catalog.prune(tmp_path, keep=1, newest=7, attempt=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_a_newer_attempt_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    save(tmp_path, 5, attempt=1)
    save(tmp_path, 5, attempt=2)
    found = catalog.newest_good(tmp_path).checkpoint
    assert found is not None
    assert found.attempt == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_an_older_attempt_cannot_take_the_place_of_a_newer_one(tmp_path: Path) -> None:
    save(tmp_path, 5, attempt=2)
    with pytest.raises(StorageError, match="a newer attempt of this run has started"):
        save(tmp_path, 5, attempt=1)
    found = catalog.newest_good(tmp_path).checkpoint
    assert found is not None
    assert found.attempt == 2


def test_what_was_moved_aside_is_found_until_its_successor_stands(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "step-00000005.a2.replaced")
    found = catalog.newest_good(tmp_path).checkpoint
    assert found is not None
    assert found.attempt == 1
    catalog.prune(tmp_path, keep=1, newest=5, attempt=2)
    assert steps_of(tmp_path) == [5]
    save(tmp_path, 5, attempt=2)
    catalog.prune(tmp_path, keep=1, newest=5, attempt=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"checkpoint\.storage"), catalog.storage_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_full_disk_under_a_model_is_named_though_safetensors_gives_no_error_number(tmp_path: Path) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(StorageError, match="no space is left for the model"),
        catalog.storage_errors(tmp_path, what="the model"),
    ):
        raise error


def test_an_error_that_is_no_disk_error_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), catalog.storage_errors(tmp_path):
        raise RuntimeError("shape mismatch")
