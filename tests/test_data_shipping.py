import os
import shutil
from pathlib import Path

import pytest
import ray

from orchestrator.errors import StorageError
from orchestrator.scheduling import data_shipping
from orchestrator.scheduling.data_shipping import Parcel, pack, unpack

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def content() -> dict[str, bytes]:
    return {"train.bin": os.urandom(3000), "tokenizer/tokenizer.json": b"{}", "empty.bin": b""}


@pytest.fixture
def parcel(tmp_path: Path, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Parcel:
    """A folder in the object store, in several pieces, and gone from the disk."""
    folder = tmp_path / "data"
    for name, held in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(held)
    monkeypatch.setattr(data_shipping, "_PIECE_BYTES", 1000)
    packed = Parcel(
        folder=folder, files=tuple((n, data_shipping._pieces(folder / n)) for n in data_shipping._names(folder))
    )
    shutil.rmtree(folder)
    return packed


def read(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_single_node_needs_no_parcel(tmp_path: Path) -> None:
    assert pack([tmp_path]) == ()


def test_a_parcel_arrives_byte_for_byte(parcel: Parcel, content: dict[str, bytes]) -> None:
    unpack(parcel)
    assert read(parcel.folder) == content
    assert [path.name for path in parcel.folder.parent.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_left_alone(parcel: Parcel) -> None:
    parcel.folder.mkdir()
    (parcel.folder / "mine").touch()
    unpack(parcel)
    assert read(parcel.folder) == {"mine": b""}


def test_workers_that_race_leave_one_whole_folder(parcel: Parcel, content: dict[str, bytes]) -> None:
    @ray.remote(num_cpus=1)
    def arrive(one: Parcel) -> bytes:
        unpack(one)
        return (one.folder / "train.bin").read_bytes()

    assert ray.get([arrive.remote(parcel) for _ in range(4)]) == [content["train.bin"]] * 4
    assert read(parcel.folder) == content
    assert [path.name for path in parcel.folder.parent.iterdir()] == ["data"]


def test_a_disk_that_takes_no_more_is_named_with_its_node(parcel: Parcel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = Parcel(folder=tmp_path / "file" / "data", files=parcel.files)
    with pytest.raises(StorageError, match="worker's node"):
        unpack(nowhere)
