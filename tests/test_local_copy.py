"""Data and models in a store: copied once, again where they changed, and refused with the way out; on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import local_copy as module
from orchestrator import locations
from orchestrator.data.sources import find_sources
from orchestrator.errors import DataError, SpecError, StorageError
from orchestrator.local_copy import local_copy
from tests.azure_blobs import azure_server
from tests.s3 import BUCKET, READER, STRANGER, as_user

pytestmark = pytest.mark.slow  # a server


@pytest.fixture
def store(s3: Any, tmp_path: Path) -> str:
    """The URI of a folder with three files, one of them in a folder of its own."""
    for name, text in (("a.csv", "text,label\none,1\n"), ("b.csv", "text,label\ntwo,2\n"), ("deep/c.txt", "three")):
        s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{name}", Body=text.encode())
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    """Each test looks anew."""
    local_copy.cache_clear()
    yield
    local_copy.cache_clear()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been copied since the test began."""
    seen: list[str] = []
    real = module.download

    def download(files: Any, key: str, target: Path) -> None:
        seen.append(key.rpartition("/")[2])
        real(files, key, target)

    monkeypatch.setattr(module, "download", download)
    return seen


def test_a_file_a_folder_and_a_pattern_are_copied_under_their_own_names(store: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert Path(local_copy(f"{store}/a.csv", cache)).read_text() == "text,label\none,1\n"
    assert Path(local_copy(f"{store}/a.csv", cache)).name == "a.csv"
    folder = Path(local_copy(f"{store}/", cache))
    assert folder.name == tmp_path.name
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == ["a.csv", "b.csv", "deep/c.txt"]


def test_of_a_pattern_only_what_matches_is_copied(store: str, tmp_path: Path, downloads: list[str]) -> None:
    path = Path(local_copy(f"{store}/*.csv", tmp_path / "cache"))
    assert path.name == "*.csv"
    assert sorted(file.name for file in path.parent.glob("*")) == ["a.csv", "b.csv"]
    assert sorted(downloads) == ["a.csv", "b.csv"]


def test_only_what_has_changed_is_copied_again_and_what_is_gone_goes_here_too(
    s3: Any, store: str, tmp_path: Path, downloads: list[str]
) -> None:
    folder = Path(local_copy(store, tmp_path / "cache"))
    downloads.clear()
    s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/b.csv", Body=b"text,label\nanother,2\n")
    s3.delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/deep/c.txt")
    local_copy.cache_clear()
    local_copy(store, tmp_path / "cache")
    assert downloads == ["b.csv"]
    assert (folder / "b.csv").read_text() == "text,label\nanother,2\n"
    assert not (folder / "deep" / "c.txt").exists()


def test_a_copy_that_was_lost_here_is_made_anew(store: str, tmp_path: Path) -> None:
    folder = Path(local_copy(store, tmp_path / "cache"))
    (folder / "a.csv").unlink()
    local_copy.cache_clear()
    assert (Path(local_copy(store, tmp_path / "cache")) / "a.csv").is_file()


def test_data_is_found_in_a_store_as_in_a_folder(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    (source,) = find_sources(f"{store}/*.csv")
    assert (source.location, source.reader) == (f"{store}/*.csv", "csv")
    assert [file.read_text().split()[-1] for file in source.files] == ["one,1", "two,2"]
    assert all(file.is_relative_to(locations.home()) for file in source.files)


def test_what_is_not_there_is_refused_with_what_is(store: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        local_copy(f"{store}/c.csv", tmp_path / "cache")
    assert f"{tmp_path.name} holds a.csv, b.csv, deep" in str(caught.value)


def test_one_who_may_not_read_is_told_what_is_needed(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in as_user(STRANGER).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="ACCESS_DENIED") as caught:
        local_copy(store, tmp_path / "cache")
    assert "credentials that may list and read it" in str(caught.value)
    for name, value in as_user(READER).items():
        monkeypatch.setenv(name, value)
    assert Path(local_copy(store, tmp_path / "cache")).is_dir(), "whoever may only read can train on it"


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(StorageError, match="no room for a copy"):
        local_copy(store, tmp_path / "cache")
    assert downloads == []


def test_a_name_that_leads_out_of_the_store_writes_nothing_outside_of_the_copy(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: list[str]
) -> None:
    class Climbing:
        """One object whose key holds the names of parent folders, which stores allow."""

        def get_file_info(self, asked: Any) -> Any:
            from pyarrow.fs import FileInfo, FileType

            if isinstance(asked, str):
                return FileInfo(asked, FileType.Directory)
            return [FileInfo(f"{asked.base_dir}/../../out.txt", FileType.File, size=1)]

    monkeypatch.setattr(module, "open_bucket", lambda _: (Climbing(), "bucket/folder"))
    with pytest.raises(DataError, match="leads out of its folder"):
        local_copy("s3://bucket/folder", tmp_path / "cache")
    assert downloads == []


def test_credentials_in_a_location_are_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds credentials") as caught:
        local_copy("s3://KEY:very-secret@bucket/x", tmp_path)
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("file:///tmp/x", "give the path, /tmp/x"),
        ("memory://x", "memory of its own"),
        ("gopher://x/y", "no scheme"),
        ("http://h:port/x", "no URI"),
    ],
)
def test_what_is_no_store_is_refused_before_anything_is_asked(tmp_path: Path, uri: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        local_copy(uri, tmp_path)


def test_an_address_that_cannot_be_opened_is_a_mistake_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the object store cannot be opened"):
        local_copy("ftp://no-such-host.invalid/x", tmp_path)


def test_what_fsspec_opens_is_copied_alike(tmp_path: Path, downloads: list[str]) -> None:
    from orchestrator.object_store import open_bucket, upload

    with azure_server(tmp_path / "azure") as container:
        files, prefix = open_bucket(f"{container}/data")
        (tmp_path / "x.txt").write_text("first")
        upload(files, tmp_path / "x.txt", f"{prefix}/x.txt")
        for _ in range(2):
            local_copy.cache_clear()
            folder = Path(local_copy(f"{container}/data", tmp_path / "cache"))
            assert (folder / "x.txt").read_text() == "first"
        assert downloads == ["x.txt"], "it tells when a file was changed"
