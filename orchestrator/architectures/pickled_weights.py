"""A pickle that torch.save wrote -> names and shapes of its tensors, read instruction by instruction: nothing is
unpickled, so nothing that it asks for is run.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.architectures.weight_names import Shape
from orchestrator.errors import ModelError

_TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
_PARAMETER = "torch._utils _rebuild_parameter"
_MAPPING = "collections OrderedDict"
_TYPES = re.compile(r"torch(\.storage)? (\w*Storage|[a-z]+\d+\w*|Size)")
"""What a file of weights asks for; torch.load with weights_only knows it too (torch/_weights_only_unpickler.py)."""
_MAGIC_OF_OLD_FILES = 0x1950A86A20F9469CFC6C
"""What torch.save wrote first before version 1.6 (torch/serialization.py, `MAGIC_NUMBER`)."""
_MARK = object()


class _Foreign(Exception):
    """The pickle asks for something that is no part of a tensor."""


class _Tensor:
    def __init__(self, shape: Shape) -> None:
        self.shape = shape


class _Name(str):
    """A class or function that the pickle asks for, by module and name; never looked up."""


def read_pickle(file: Path) -> dict[str, Shape]:
    """The tensors of a state dict by name. Raises ModelError when it holds anything else, or is damaged."""
    try:
        with file.open("rb") as stream:
            held = _content(stream)
    except _Foreign as error:
        raise ModelError(
            f"{file} is a pickle that holds more than tensors, and would run code when it is loaded",
            got=f"it asks for {str(error).replace(' ', '.')}",
            allowed="model.safetensors, or a pickle of tensors alone",
            do="where you trust its maker, load it there and save it with model.save_pretrained(folder)",
        ) from error
    except Exception as error:  # A damaged pickle breaks nearly anything.
        raise ModelError(
            f"{file} is damaged",
            got=f"{file.stat().st_size:,} bytes that are no pickle of torch",
            do="copy or download the file again",
        ) from error
    other = sorted(str(name) for name, value in held.items() if not isinstance(value, _Tensor))
    if other:
        raise ModelError(
            f"{file} holds more than a model's weights",
            got=", ".join(other[:5]),
            allowed="tensors by name",
            do="save the model itself: model.save_pretrained(folder), or safetensors.torch.save_file(state, file)",
        )
    return {str(name): tensor.shape for name, tensor in held.items()}


def _stored(stream: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """A member's bytes, which torch never compresses, whatever its checksum: `torch.serialization.set_crc32_options`
    may have left that out, and zipfile would refuse it."""
    stream.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    stream.seek(name + extra, io.SEEK_CUR)
    return stream.read(member.file_size)


def _content(stream: BinaryIO) -> dict[Any, Any]:
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            (name,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            return _as_mapping(_value(io.BytesIO(_stored(stream, archive.getinfo(name)))))
    stream.seek(0)
    magic, *_ = [_value(stream) for _ in range(3)]  # then a version, and a description of the system
    if magic != _MAGIC_OF_OLD_FILES:
        raise ValueError("another pickle")
    return _as_mapping(_value(stream))


def _as_mapping(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("no mapping")


def _value(stream: BinaryIO) -> Any:
    """What the next pickle of a stream describes, of plain values, names and tensors' shapes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(stream):
        name = operation.name
        if name == "STOP":
            return stack.pop()
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
        elif name == "GLOBAL":
            stack.append(_allowed(str(argument)))
        elif name in _ACTIONS:
            _ACTIONS[name](stack)
        elif argument is not None:
            stack.append(argument)
        else:
            raise _Foreign(f"the instruction {name}")
    raise ValueError("the pickle has no end")


def _allowed(asked: str) -> _Name:
    if asked not in (*_TENSORS, _PARAMETER, _MAPPING) and not _TYPES.fullmatch(asked):
        raise _Foreign(asked)
    return _Name(asked)


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _last(count: int) -> Callable[[list[Any]], None]:
    def take(stack: list[Any]) -> None:
        found = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        stack.append(found)

    return take


def _stack_global(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(_allowed(f"{module} {name}"))


def _reduce(stack: list[Any]) -> None:
    given, called = stack.pop(), stack.pop()
    if called in _TENSORS:
        stack.append(_Tensor(tuple(int(n) for n in given[2])))
    elif called == _PARAMETER:
        stack.append(given[0])
    elif called == _MAPPING:
        stack.append(dict(given[0]) if given else {})
    elif called == "torch Size":
        stack.append(tuple(given[0]))
    else:
        raise _Foreign(str(called))


def _build(stack: list[Any]) -> None:
    stack.pop()  # attributes, such as `_metadata` of a state dict


def _set_items(stack: list[Any]) -> None:
    found = _since_mark(stack)
    stack[-1].update(zip(found[::2], found[1::2], strict=True))


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    stack[-1][key] = value


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    stack[-1].append(value)


def _appends(stack: list[Any]) -> None:
    found = _since_mark(stack)
    stack[-1].extend(found)


def _persistent(stack: list[Any]) -> None:
    stack[-1] = None  # a storage, which lies elsewhere in the file


_ACTIONS: dict[str, Callable[[list[Any]], None]] = {
    "MARK": lambda stack: stack.append(_MARK),
    "NONE": lambda stack: stack.append(None),
    "NEWTRUE": lambda stack: stack.append(True),
    "NEWFALSE": lambda stack: stack.append(False),
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "EMPTY_TUPLE": lambda stack: stack.append(()),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _appends,
    "BINPERSID": _persistent,
}
