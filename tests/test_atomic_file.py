from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.atomic_file import read_json, write_json


@pytest.mark.parametrize("torn", [b"", b'{"a": ', b"\0" * 20, b"\xff\xfe"])
def test_a_torn_file_counts_as_absent(tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(torn)
    assert read_json(file) is None
    assert f"{file} is damaged" in caplog.text


def test_an_absent_file_gives_nothing_and_a_whole_one_its_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "result.json"
    assert read_json(file) is None
    write_json(file, {"a": [1, "é"]})
    assert read_json(file) == {"a": [1, "é"]}
    assert not caplog.text
