"""Two checkpoints of the same step, compared bit by bit: which tensor differs first, by how much, how many do.

DeepSpeed keeps optimizer states as flat partitions, one file a rank. Here they get the names of the model's parameters
back. Objects of DeepSpeed's are read as plain values, so that neither it nor a device is needed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from orchestrator.checkpoints.state_files import read_state
from orchestrator.checkpoints.zero_layout import Layout, parts_layout
from orchestrator.errors import StorageError, one_line

Part = Literal["weights", "fp32 masters", "first moments", "second moments", "step counters", "other state"]

PARTS: tuple[Part, ...] = (
    "weights",
    "fp32 masters",
    "first moments",
    "second moments",
    "step counters",
    "other state",
)
"""In the order in which differences are looked for."""

_OF_ADAM: Mapping[str, Part] = {
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "step": "step counters",
}
"""Adam's states, by their names in torch."""
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups")
"""What DeepSpeed calls its fp32 masters under ZeRO 1 and 2, 3, and 0 with 16-bit weights."""
_WEIGHTS = ("module", "frozen_param_fragments")
_LAYOUT = ("ds_config", "param_shapes", "frozen_param_shapes", "param_slice_mappings", "shared_params")
"""Where things are and not what they hold: used here, not compared."""
_CHUNK = 1 << 24
"""Elements compared at a time as fp64: 128 MiB for each of a few arrays."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor of a checkpoint is from its counterpart."""

    what: str
    name: str
    """The parameter's name in the model; for other state the path in DeepSpeed's file."""
    largest_absolute: float
    """Not a number where one side is, or where the sides cannot be subtracted."""
    largest_relative: float
    """To the larger of both magnitudes, so at most 2."""


@dataclass(frozen=True, kw_only=True)
class PartComparison:
    """One kind of state, over all ranks."""

    what: Part
    compared: int
    """Tensors, each parameter once, whatever the number of its shards."""
    different: int
    first: Difference | None
    """The first that differs, in the order of the model's layers."""


def compare_checkpoints(one: Path, other: Path) -> tuple[PartComparison, ...]:
    """Compares two complete checkpoint folders, the first being the reference; parts without tensors are left out.

    Raises StorageError when a folder holds no training state or cannot be read.
    """
    files = sorted(_state_files(one) | _state_files(other))
    # Rank 0's model file names all parameters, also those whose states are in other files.
    named = _parameters_of(one, files)
    tally = _Tally(order={name: place for place, name in enumerate(named.order)})
    for name in files:
        if not (one / name).is_file() or not (other / name).is_file():
            tally.add("other state", f"the file {name}", _Gap.unknown())
            continue
        _compare_files(one / name, other / name, named, tally)
    return tally.result()


# -- files -----------------------------------------------------------------------------------------------------------


class _Foreign:
    """Stands in for an object of another package: keeps what it was built from."""

    def __new__(cls, *arguments: Any) -> _Foreign:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    arguments: tuple[Any, ...]


def _read(file: Path) -> dict[str, Any]:
    try:
        state = read_state(file, mapped=True, stand_in=_Foreign)
    except (OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise StorageError(
            "a file of a checkpoint cannot be read", got=f"{file} ({one_line(error, most=200)})"
        ) from error
    return dict(state)


def _state_files(checkpoint: Path) -> set[str]:
    """Relative names of the files with tensors."""
    found = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*.pt")}
    if not found:
        raise StorageError("the checkpoint holds no training state", got=checkpoint)
    return found


# -- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fragment:
    """Where a parameter, or this rank's share of it, lies in a flat tensor."""

    name: str
    start: int
    numel: int
    is_alone: bool = False
    """Without ZeRO: the tensor is this parameter's and its step counter too."""


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """What a model's file says of its parameters."""

    order: tuple[str, ...]
    """Names as the model has them, layer by layer."""
    groups: tuple[Mapping[str, int], ...]
    """Trainable parameters and their elements, by group of the optimizer."""


def _parameters_of(checkpoint: Path, files: Sequence[str]) -> _Parameters:
    of_model = [name for name in files if name.endswith("model_states.pt") and (checkpoint / name).is_file()]
    if not of_model:
        return _Parameters(order=(), groups=())
    state = _read(checkpoint / of_model[0])
    shapes = state.get("param_shapes")
    groups = _groups_of(state) if shapes is None else [{n: math.prod(s) for n, s in group.items()} for group in shapes]
    return _Parameters(order=tuple(state["module"]), groups=tuple(groups))


def _groups_of(state: Mapping[str, Any]) -> list[dict[str, int]]:
    """Without ZeRO no file says it: the groups of `models.parameter_groups`, tied weights once, no buffers."""
    seen: set[int] = set()
    groups: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for name, weight in state["module"].items():
        if name in state["buffer_names"] or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        groups[weight.dim() < 2][name] = weight.numel()
    return [group for group in groups if group]


def _fragments(state: Mapping[str, Any], parameters: _Parameters, rank: int) -> dict[int, list[_Fragment]]:
    """For each tensor index of the optimizer in this file: which parameters lie where in it."""
    of_optimizer = state.get("optimizer_state_dict")
    if of_optimizer is None:
        every = itertools.chain.from_iterable(group.items() for group in parameters.groups)
        whole = [_Fragment(name=name, start=0, numel=numel, is_alone=True) for name, numel in every]
        return {index: [one] for index, one in enumerate(whole)}
    if "param_slice_mappings" in of_optimizer:
        return {
            index: [_Fragment(name=name, start=at.start, numel=at.numel) for name, at in group.items()]
            for index, group in enumerate(of_optimizer["param_slice_mappings"])
        }
    return _of_rank(parts_layout(parameters.groups, world_size=of_optimizer["partition_count"]), rank)


def _of_rank(layout: Layout, rank: int) -> dict[int, list[_Fragment]]:
    """What a rank holds of each parameter, in each of its flat tensors."""
    found: dict[int, list[_Fragment]] = {index: [] for index in range(len(layout.sizes))}
    for name, spans in layout.spans.items():
        for span in (one for one in spans if one.rank == rank):
            found[span.group].append(_Fragment(name=name, start=span.offset, numel=span.count))
    return found


# -- comparing -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Gap:
    """The largest difference so far of one named tensor."""

    absolute: float = 0.0
    relative: float = 0.0
    differs: bool = False

    @classmethod
    def unknown(cls) -> _Gap:
        """They differ, and cannot be subtracted."""
        return cls(absolute=math.nan, relative=math.nan, differs=True)

    def widen(self, other: _Gap) -> None:
        """Takes another shard of the same tensor in."""
        self.differs |= other.differs
        self.absolute, self.relative = _larger(self.absolute, other.absolute), _larger(self.relative, other.relative)


@dataclass(kw_only=True)
class _Tally:
    """What was compared, by part and name."""

    order: Mapping[str, int]
    gaps: dict[Part, dict[str, _Gap]] = field(default_factory=lambda: {part: {} for part in PARTS})

    def add(self, what: Part, name: str, gap: _Gap) -> None:
        """Notes one comparison."""
        self.gaps[what].setdefault(name, _Gap()).widen(gap)

    def result(self) -> tuple[PartComparison, ...]:
        """Each part with its first difference."""
        return tuple(self._part(what, gaps) for what, gaps in self.gaps.items() if gaps)

    def _part(self, what: Part, gaps: Mapping[str, _Gap]) -> PartComparison:
        wrong = [name for name, gap in gaps.items() if gap.differs]
        first = min(wrong, key=lambda name: self.order.get(name, len(self.order)), default=None)
        return PartComparison(
            what=what,
            compared=len(gaps),
            different=len(wrong),
            first=None
            if first is None
            else Difference(
                what=what,
                name=first,
                largest_absolute=gaps[first].absolute,
                largest_relative=gaps[first].relative,
            ),
        )


def _compare_files(one: Path, other: Path, parameters: _Parameters, tally: _Tally) -> None:
    state = _read(one)
    fragments = _fragments(state, parameters, _rank_of(one))
    groups = [len(group) for group in parameters.groups]
    left, right = dict(_leaves(state)), dict(_leaves(_read(other)))
    for path in left | right:
        if path not in left or path not in right:
            tally.add("other state", _written(path), _Gap.unknown())
            continue
        what, index = _place(path, groups)
        if what == "weights":
            tally.add(what, str(path[1]), _gap(left[path], right[path]))
        elif index is None:
            tally.add(what, _written(path), _gap(left[path], right[path]))
        else:
            for name, a, b in _cut(left[path], right[path], fragments.get(index, ()), whole=f"group {index}"):
                tally.add(what, name, _gap(a, b))


def _rank_of(file: Path) -> int:
    found = re.search(r"pp_rank_(\d+)", file.name)
    return int(found[1]) if found else 0


Key = tuple[str | int, ...]


def _leaves(value: Any, path: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every tensor and plain value, by its path; empty tensors, which ZeRO-3 leaves in place of weights, are none."""
    if isinstance(value, _Foreign):
        value = {"arguments": value.arguments, **vars(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _LAYOUT:
                yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif not (isinstance(value, torch.Tensor) and value.numel() == 0):
        yield path, value


def _place(path: Key, groups: Sequence[int]) -> tuple[Part, int | None]:
    """What the value at a path is, and the index of its optimizer tensor if it is one."""
    if path[0] in _WEIGHTS and len(path) == 2:
        return "weights", None
    key = path[-1]
    if isinstance(key, str) and key in _OF_ADAM and isinstance(path[-2], int):
        return _OF_ADAM[key], path[-2]
    for position, part in enumerate(path):
        if part in _MASTERS:
            numbers = [number for number in path[position + 1 :] if isinstance(number, int)]
            # Without ZeRO the masters are listed by group and the other states all in one row.
            return "fp32 masters", numbers[0] if len(numbers) == 1 else sum(groups[: numbers[0]]) + numbers[1]
    return "other state", None


def _cut(
    one: Any, other: Any, fragments: Sequence[_Fragment], *, whole: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """A flat tensor by parameters, without padding; one that belongs to no single parameter is named `whole`."""
    one, other = torch.as_tensor(one).reshape(-1), torch.as_tensor(other).reshape(-1)
    if len(fragments) == 1 and fragments[0].is_alone:
        yield fragments[0].name, one, other
    elif one.numel() == 1 or one.numel() != other.numel() or not fragments:
        yield whole, one, other
    else:
        for fragment in fragments:
            cut = slice(fragment.start, fragment.start + fragment.numel)
            yield fragment.name, one[cut], other[cut]


def _gap(one: Any, other: Any) -> _Gap:
    """How far two values are apart; equal means equal bits."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        if type(one) is type(other) and type(one) in (int, float):
            return _gap(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64))
        return _Gap() if type(one) is type(other) and one == other else _Gap.unknown()
    if one.shape != other.shape or one.dtype != other.dtype:
        return _Gap.unknown()
    gap = _Gap()
    for a, b in zip(one.reshape(-1).split(_CHUNK), other.reshape(-1).split(_CHUNK), strict=True):
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            gap.widen(_measured(a.detach().double(), b.detach().double()))
    return gap


def _measured(one: torch.Tensor, other: torch.Tensor) -> _Gap:
    apart = (one - other).abs()
    larger = torch.maximum(one.abs(), other.abs())
    relative = torch.where(apart == 0, torch.zeros_like(apart), apart / larger)
    return _Gap(absolute=float(apart.max()), relative=float(relative.max()), differs=True)


def _larger(one: float, other: float) -> float:
    """The larger, where not a number is larger than all."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _written(path: Key) -> str:
    return ".".join(str(part) for part in path)
