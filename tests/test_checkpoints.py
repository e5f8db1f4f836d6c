from pathlib import Path

import pytest

from orchestrator.errors import SpecError, StorageError
from orchestrator.training import checkpoints
from orchestrator.training.job import LoopState


def save(folder: Path, step: int) -> Path:
    writing = checkpoints.begin(folder, step)
    (writing / "state").mkdir()
    for rank in range(2):
        (writing / "state" / f"rank{rank}.pt").write_bytes(bytes(range(256)) * (rank + 1))
    return checkpoints.commit(writing, state=LoopState(step=step, tokens=10 * step), world_size=2, zero_stage=2)


def test_the_newest_complete_checkpoint_is_found_with_its_state(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    found = checkpoints.newest_good(tmp_path)
    assert found.rejected == ()
    assert found.checkpoint is not None
    assert found.checkpoint.path == newest
    assert found.checkpoint.state == LoopState(step=10, tokens=100)


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert checkpoints.newest_good(tmp_path / "nowhere").checkpoint is None


def test_a_checkpoint_in_the_making_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (checkpoints.begin(tmp_path, 10) / "rank0.pt").write_bytes(b"half")
    found = checkpoints.newest_good(tmp_path)
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


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove_a_file, remove_the_manifest])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    found = checkpoints.newest_good(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 5
    assert len(found.rejected) == 1
    assert "step-00000010 is damaged" in found.rejected[0]


def test_pruning_keeps_the_newest_and_clears_torn_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoints.begin(tmp_path, 5)
    checkpoints.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_checkpoints_that_were_passed_over_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 5)
    flip_a_bit(save(tmp_path, 10))
    good = checkpoints.newest_good(tmp_path).checkpoint
    assert good is not None
    checkpoints.discard_newer(good)
    save(tmp_path, 7)
    checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_sharded_states_are_refused_under_another_shape(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = checkpoints.newest_good(tmp_path).checkpoint
    assert found is not None
    checkpoints.check_compatible(found, world_size=2, zero_stage=2)
    with pytest.raises(SpecError, match=r"resources.workers=2 deepspeed.zero_stage=2"):
        checkpoints.check_compatible(found, world_size=3, zero_stage=2)


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"checkpoint\.storage"), checkpoints.storage_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_an_error_that_is_no_disk_error_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), checkpoints.storage_errors(tmp_path):
        raise RuntimeError("shape mismatch")
