"""Hashes of files: what they depend on, and when an old one is believed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from orchestrator import locations
from orchestrator.data import contents
from orchestrator.data.contents import digests, hub_commit
from orchestrator.errors import DataError

MEMORY = "cache/digests.json"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def replace_keeping_time(file: Path, content: bytes) -> None:
    """Another file under the same name, with the size and the time of the one before."""
    before = file.stat()
    assert before.st_size == len(content)
    other = write(file.with_name("other"), content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def replace_last_byte_keeping_time(file: Path) -> None:
    """As `replace_keeping_time`, with all of the content but for its end."""
    content = file.read_bytes()
    replace_keeping_time(file, content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 1])
def test_copies_agree_and_another_byte_does_not(tmp_path: Path, size: int) -> None:
    one = write(tmp_path / "a", b"x" * size)
    copy = write(tmp_path / "b", b"x" * size)
    other = write(tmp_path / "c", b"x" * size + b"y")
    found = digests([one, copy, other])
    assert found[0] == found[1] != found[2]


def test_every_piece_of_a_large_file_counts_and_threads_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "PIECE_BYTES", 1000)
    monkeypatch.setattr(contents, "_BATCH_BYTES", 2000)
    content = bytes(range(250)) * 40
    places = [0, 999, 1000, 5500, 9999]
    files = [write(tmp_path / "same", content)]
    for place in places:
        files.append(write(tmp_path / str(place), content[:place] + b"\xff" + content[place + 1 :]))
    found = digests(files)
    assert len(set(found)) == len(files)
    assert digests(files[::-1]) == found[::-1]


@pytest.mark.parametrize("settled", [True, False])
def test_a_file_replaced_with_its_time_kept_has_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", -1 if settled else 2_000_000_000)
    file = write(tmp_path / "file", b"x" * (2 << 20))
    first = digests([file])
    assert digests([file]) == first
    replace_keeping_time(file, b"y" * (2 << 20))
    assert digests([file]) != first


def test_a_file_written_over_in_place_with_its_time_set_back_has_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", -1)
    file = write(tmp_path / "file", b"x" * (2 << 20))
    first, before = digests([file]), file.stat()
    time.sleep(0.02)  # a tick of the clock of the file system
    with file.open("r+b") as stream:
        stream.write(b"y")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_ino == before.st_ino
    assert digests([file]) != first


def test_the_hash_of_a_large_file_that_has_settled_is_remembered(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", -1)
    files = [write(tmp_path / "large", b"x" * (1 << 20)), write(tmp_path / "small", b"x")]
    first = digests(files)
    (key,) = kept = json.loads((home / MEMORY).read_text())
    assert kept[key] == first[0]
    (home / MEMORY).write_text(json.dumps({key: "as it was"}))
    assert digests(files) == ["as it was", first[1]]


def test_the_hash_of_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, home: Path) -> None:
    digests([write(tmp_path / "large", b"x" * (1 << 20))])
    assert not (home / MEMORY).exists()


@pytest.mark.parametrize("content", ["{", "[]"], ids=["torn", "no mapping"])
def test_a_damaged_memory_is_forgotten(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", -1)
    file = write(tmp_path / "large", b"x" * (1 << 20))
    first = digests([file])
    (home / MEMORY).write_text(content)
    assert digests([file]) == first
    assert list(json.loads((home / MEMORY).read_text()).values()) == first


def test_a_home_that_cannot_be_written_remembers_nothing(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_SETTLED_NS", -1)
    home.write_text("a file is in the way")
    file = write(tmp_path / "large", b"x" * (1 << 20))
    assert digests([file]) == digests([Path(shutil.copy(file, tmp_path / "copy"))])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone cannot be read[\s\S]*No such file"):
        digests([tmp_path / "gone"])


def test_a_hub_name_stands_for_the_commit_that_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for folder, commit in (("models--owner--name", "abc"), ("datasets--owner--name", "def")):
        (tmp_path / folder / "refs").mkdir(parents=True)
        (tmp_path / folder / "refs" / "main").write_text(commit)
    hub_commit.cache_clear()
    assert (hub_commit("owner/name", "model"), hub_commit("owner/name", "dataset")) == ("abc", "def")
    assert hub_commit("owner/other", "model") is None
    hub_commit.cache_clear()
    assert locations.home().name == "home"
