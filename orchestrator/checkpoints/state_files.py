"""DeepSpeed's checkpoint files -> their content; nothing that a file holds is ever run.

A pickle may call any function while it is read. A checkpoint can come from a bucket or a folder that others write to,
and checksums say only that it is what its manifest names. So files are read by PyTorch's restricted unpickler, which
builds tensors, containers and the classes listed here, and refuses all else. Called by `reshard` and `diff`.
"""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import torch

_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed 0.19.8 writes besides tensors and containers: values without behaviour of their own when built."""


def read_state(
    path: str | Path, *, mapped: bool = False, location: Any = "cpu", stand_in: Any = None
) -> dict[str, Any]:
    """The content of one of DeepSpeed's files.

    `mapped` leaves tensors in the file until they are used; `location` is torch's `map_location`; objects of
    DeepSpeed's own classes are built as `stand_in` where one is given, so that DeepSpeed need not be there.
    Raises pickle.UnpicklingError for a file that holds anything else, OSError, RuntimeError or EOFError for a torn one.
    """
    known = [(stand_in or _class(name), name) for name in _CLASSES]
    with torch.serialization.safe_globals(known):
        content: dict[str, Any] = torch.load(
            path, map_location=location, mmap=mapped and zipfile.is_zipfile(path), weights_only=True
        )
    return content


def _class(name: str) -> Any:
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)
