"""The weights of a base model as its files have them, by name and shape: read from headers, without torch.

A file that cannot be used is refused here, in milliseconds: `plan` and `run` ask before anything is paid. A
pickle is read, not loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.architectures.weight_names import Shape
from orchestrator.errors import ModelError
from orchestrator.locations import resolve

_LONGEST_HEADER = 100_000_000
"""Bytes: what safetensors allows."""
# fmt: off
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}
# fmt: on
"""Bits of an element, by safetensors' name of its type (safetensors 0.8, `Dtype`)."""
_QUANTISED = ("F4", "F6_E2M3", "F6_E3M2")
_LFS = b"version https://git-lfs"
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What a base model's files hold."""

    shapes: dict[str, Shape]
    """Of each tensor, by its name in the file."""
    files: tuple[Path, ...]


def read_weights(base: str) -> StoredWeights | None:
    """The weights of a base model in a folder, or in the hub's cache; None for one that is not on this machine.

    Takes the file that transformers takes: model.safetensors, its index, pytorch_model.bin, its index.
    Raises ModelError when there is none of them, or one is damaged, missing, or holds more than tensors.
    """
    folder = _at_hand(base)
    if folder is None:
        return None
    refuse_gguf(Path(resolve(base)))
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return StoredWeights(shapes=read(whole), files=(whole,))
        if index.is_file():
            return _read_shards(index, read)
    raise ModelError(
        "the base model's folder holds no weights",
        got=f"{folder} without model.safetensors",
        allowed="model.safetensors or pytorch_model.bin, whole or in shards with an index",
        do="give the folder of a downloaded model, or model.config for new weights",
    )


def refuse_gguf(path: Path) -> None:
    """Raises ModelError for a file that llama.cpp runs, or a folder with nothing else, with the way out."""
    gguf = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if not gguf or gguf[0].suffix.lower() != ".gguf" or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return
    source = f"{str(gguf[0].parent)!r}, gguf_file={gguf[0].name!r}"
    raise ModelError(
        "the base model is a GGUF file, whose weights are rounded for inference and cannot be trained as they are",
        got=gguf[0],
        allowed="a Hugging Face folder with model.safetensors",
        # What transformers 5.23 makes of the file calls itself quantised and cannot be saved; a model like it can.
        do="take the model that the file was made from, or convert it: pip install gguf, then python -c "
        f"\"import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({source}, dtype='float32'); "
        "m.config.__dict__.pop('quantization_config', None); c = t.AutoModelForCausalLM.from_config(m.config); "
        "c.load_state_dict(m.state_dict()); c.save_pretrained('converted'); "
        f"t.AutoTokenizer.from_pretrained({source}).save_pretrained('converted')\" and model.base=converted",
    )


def _at_hand(base: str) -> Path | None:
    path = Path(resolve(base))
    if path.exists():
        return path if path.is_dir() else path.parent
    import huggingface_hub

    try:
        wanted = ["model*", "pytorch_model*"]
        found = huggingface_hub.snapshot_download(base, allow_patterns=wanted, local_files_only=True)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return None
    folder = Path(found)
    # A download of the configuration alone says nothing of the weights.
    return folder if any(folder.glob("model*")) or any(folder.glob("pytorch_model*")) else None


def _read_shards(index: Path, read: Callable[[Path], dict[str, Shape]]) -> StoredWeights:
    try:
        located = json.loads(index.read_bytes())["weight_map"]
        names = {str(file): [str(key) for key in located if located[key] == file] for file in located.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index} is no index of weights", got=f"{type(error).__name__}: {error}", do=_AGAIN
        ) from error
    shapes: dict[str, Shape] = {}
    files = tuple(index.parent / name for name in sorted(names))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if missing[3:] else ""
        raise ModelError(
            "a shard of the base model's weights is missing",
            got=f"{', '.join(missing[:3])}{more}, of {len(files)} that {index} names",
            do="copy or download the missing files",
        )
    for file in files:
        held = read(file)
        absent = [name for name in names[file.name] if name not in held]
        if absent:
            raise ModelError(
                f"{file} lacks weights that {index.name} says it holds",
                got=f"no {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else ""),
                do=_AGAIN,
            )
        shapes |= held
    return StoredWeights(shapes=shapes, files=files)


def _read_pickle(file: Path) -> dict[str, Shape]:
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise _pointer(file)
    from orchestrator.architectures.pickled_weights import read_pickle

    return read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Shape]:
    """The format: 8 bytes of length, a JSON header by name, then the tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            rest = stream.read(min(length, size, _LONGEST_HEADER))
    except OSError as error:
        raise ModelError(f"{file} cannot be read", got=error.strerror) from error
    if (start + rest[:32]).startswith(_LFS):
        raise _pointer(file)
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise _damaged(file, f"{size:,} bytes, with a header of {length:,}" if size >= 8 else f"{size} bytes")
    try:
        header = json.loads(rest)
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in value["shape"]) for name, value in tensors.items()}
        spans = {name: tuple(int(n) for n in value["data_offsets"]) for name, value in tensors.items()}
        types = {name: str(value["dtype"]) for name, value in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "a header that is no list of tensors") from error
    for name, (begin, end) in spans.items():
        bits = _BITS.get(types[name])
        if bits is None:
            raise ModelError(f"{file} holds a type of numbers that is not known", got=f"{name}: {types[name]}")
        if types[name] in _QUANTISED:
            raise _quantised(file, f"{name}: {types[name]}")
        if math.prod(shapes[name]) * bits // 8 != end - begin:
            raise _damaged(file, f"{name} of shape {list(shapes[name])} in {end - begin:,} bytes")
    needed = 8 + length + max((end for _, end in spans.values()), default=0)
    if needed != size:
        raise _damaged(file, f"{size:,} bytes where its header names {needed:,}")
    return shapes


def _damaged(file: Path, got: str) -> ModelError:
    return ModelError(f"{file} is damaged", got=got, do=_AGAIN)


def _pointer(file: Path) -> ModelError:
    return ModelError(
        f"{file} is a pointer of Git LFS, not the weights", got=f"{file.stat().st_size} bytes", do="run git lfs pull"
    )


def _quantised(file: Path, got: str) -> ModelError:
    return ModelError(
        f"{file} holds weights that are rounded for inference, which cannot be trained",
        got=got,
        do="give the model that it was made from",
    )
