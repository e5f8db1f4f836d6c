from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.stored_weights import read_weights
from orchestrator.errors import ModelError
from tests.bases import header_of, write_weights

SHAPES = {"wte.weight": (7, 4), "ln.bias": (4,), "scale": ()}


def test_names_and_shapes_are_read_from_the_header(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", SHAPES)
    found = read_weights(str(tmp_path))
    assert found is not None
    assert found.shapes == SHAPES


def sharded(folder: Path) -> Path:
    one, two = {"a.weight": (3, 2)}, {"b.weight": (2,)}
    write_weights(folder / "model-1-of-2.safetensors", one)
    write_weights(folder / "model-2-of-2.safetensors", two)
    located = {"a.weight": "model-1-of-2.safetensors", "b.weight": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": located}))
    return folder


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    found = read_weights(str(sharded(tmp_path)))
    assert found is not None
    assert found.shapes == {"a.weight": (3, 2), "b.weight": (2,)}
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shard of the base model's weights is missing[\s\S]*model-2-of-2"):
        read_weights(str(tmp_path))


def test_a_shard_without_what_the_index_says_is_refused(tmp_path: Path) -> None:
    write_weights(sharded(tmp_path) / "model-2-of-2.safetensors", {"c.weight": (2,)})
    with pytest.raises(ModelError, match=r"lacks weights that model\.safetensors\.index\.json says[\s\S]*b\.weight"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match="no index of weights"):
        read_weights(str(tmp_path))


WHOLE, SIZE = header_of(SHAPES)
DAMAGED = {
    "cut in the tensors": WHOLE + bytes(SIZE - 1),
    "cut in the header": WHOLE[: len(WHOLE) // 2],
    "cut in the length": WHOLE[:5],
    "empty": b"",
    "too long": WHOLE + bytes(SIZE + 1),
    "zeros": bytes(1000),
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "another shape": WHOLE.replace(b"[7, 4]", b"[7, 5]") + bytes(SIZE),
    "no list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as error:
        read_weights(str(tmp_path))
    assert error.value.do == "copy or download the file again"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ModelError, match="pointer of Git LFS") as error:
        read_weights(str(tmp_path))
    assert error.value.do == "run git lfs pull"


def test_a_folder_without_weights_is_refused_and_a_model_that_is_not_here_is_not(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(WHOLE + bytes(SIZE))
    with pytest.raises(ModelError, match="holds no weights"):
        read_weights(str(tmp_path))
    assert read_weights("no-such-owner/no-such-model") is None


@pytest.mark.parametrize("as_file", [True, False])
def test_a_gguf_is_refused_with_what_converts_it(tmp_path: Path, as_file: bool) -> None:
    file = tmp_path / "tiny-q8_0.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="GGUF") as error:
        read_weights(str(file if as_file else tmp_path))
    assert "gguf_file='tiny-q8_0.gguf'" in str(error.value.do)
    assert str(tmp_path) in str(error.value.do)
    assert "pip install gguf" in str(error.value.do)


def test_weights_beside_a_gguf_are_taken(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    write_weights(tmp_path / "model.safetensors", SHAPES)
    assert read_weights(str(tmp_path)) is not None


# -- pickles -----------------------------------------------------------------------------------------------------------


class Runs:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def zipped(file: Path, content: Any, *, protocol: int = 2) -> Path:
    """A pickle in the archive that torch.save writes."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=protocol))
    return file


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("content", [{"a": Runs()}, Runs(), OrderedDict(a=pytest.approx)])
def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    zipped(tmp_path / "pytorch_model.bin", content, protocol=protocol)
    with pytest.raises(ModelError, match="would run code when it is loaded"):
        read_weights(str(tmp_path))
    assert not Path("ran").exists()


def test_a_checkpoint_of_a_trainer_is_no_model(tmp_path: Path) -> None:
    zipped(tmp_path / "pytorch_model.bin", {"epoch": 3, "state_dict": {}})
    with pytest.raises(ModelError, match=r"more than a model's weights[\s\S]*epoch, state_dict"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut off", pickle.dumps([1, 2])])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is damaged"):
        read_weights(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_is_read_without_torch(tmp_path: Path, old: bool) -> None:
    import torch

    state = OrderedDict(
        (name, torch.nn.Parameter(torch.zeros(shape)) if shape else torch.zeros(shape, dtype=torch.bfloat16))
        for name, shape in SHAPES.items()
    )
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    assert torch.load(tmp_path / "pytorch_model.bin", weights_only=True).keys() == SHAPES.keys()
    found = read_weights(str(tmp_path))
    assert found is not None
    assert found.shapes == SHAPES


@pytest.mark.slow  # torch
def test_what_torch_saves_without_checksums_is_read_too(tmp_path: Path) -> None:
    from torch import save, zeros
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        save({name: zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "pytorch_model.bin")
    finally:
        set_crc32_options(before)
    found = read_weights(str(tmp_path))
    assert found is not None
    assert found.shapes == SHAPES
