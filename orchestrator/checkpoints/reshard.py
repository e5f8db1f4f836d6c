"""A checkpoint of one number of workers or ZeRO stage -> what an engine of another one reads.

DeepSpeed refuses to load ZeRO states at another number of workers. `readable` lends an engine a reader that answers
`load_checkpoint` as if the checkpoint had been written by an engine of its own shape: every rank maps the old ranks'
files into memory and copies its own share out of them. Nothing is written, so nothing can be damaged, torn or left
behind; ranks need not wait for each other; no process is started. Called by the engine on every rank.

Why not DeepSpeed's universal checkpoints (0.19.8, `checkpoint/ds_to_universal.py`): they write every state of every
parameter to files of its own, first in pieces and then merged, by process pools unless told otherwise; and they cannot
change the ZeRO stage, which the plan for another number of workers may well do.

Both sides are described as a `Layout`; copying is the same for all. Adam's step and DeepSpeed's loss scaler are alike
on all ranks. Frozen parameters stand in no checkpoint: the base model brings them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.checkpoints.catalog import Checkpoint
from orchestrator.checkpoints.state_files import read_state
from orchestrator.checkpoints.zero_layout import Layout, Sizes, overlaps, parts_layout, rows_layout, unsharded_layout
from orchestrator.errors import StorageError

_MASTER = "fp32"
"""Name of the master weights among the states; the others are named as Adam names them."""
_SCALARS = ("step",)
"""Adam's states that are not one value for every weight."""
_SAME_ON_ALL = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""What a ZeRO optimizer keeps besides weights and moments, and every rank alike."""


def has_shape(checkpoint: Checkpoint, *, world_size: int, zero_stage: int) -> bool:
    """Whether DeepSpeed itself reads a checkpoint with these: then a rank needs its own files, else those of all."""
    return checkpoint.zero_stage == zero_stage and (zero_stage == 0 or checkpoint.world_size == world_size)


@contextlib.contextmanager
def readable(engine: Any, checkpoint: Checkpoint, *, tag: str) -> Iterator[Path]:
    """The folder that `engine.load_checkpoint(folder, tag=tag)` can read within this context, on this rank.

    It is the checkpoint's own where it was written by an engine of the same shape. `engine` is DeepSpeed's.
    Either way DeepSpeed's own reader, which would run whatever a file holds, is never asked (`state_files`).
    Raises StorageError when the checkpoint is not of the engine's trainable parameters; the load raises OSError,
    RuntimeError, KeyError or pickle.UnpicklingError when a file cannot be read.
    """
    own_reader = engine.checkpoint_engine
    if has_shape(checkpoint, world_size=dist.get_world_size(), zero_stage=engine.zero_optimization_stage()):
        engine.checkpoint_engine = _Files(own_reader)
        try:
            yield checkpoint.path
        finally:
            engine.checkpoint_engine = own_reader
        return
    engine.checkpoint_engine = _Reader(engine, _Saved(checkpoint, tag, parameters=_parameters(engine)))
    try:
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            # DeepSpeed looks for the file that it would have written itself, then asks the reader for its content.
            stand_in = Path(engine._get_ckpt_name(folder, tag))
            stand_in.parent.mkdir()
            stand_in.touch()
            yield Path(folder)
    finally:
        engine.checkpoint_engine = own_reader


class _Saved:
    """The trainable parameters and their states in a checkpoint, read as they are asked for."""

    def __init__(self, checkpoint: Checkpoint, tag: str, *, parameters: Sizes) -> None:
        """`parameters` are the engine's, in the optimizer's order: a checkpoint without ZeRO names none."""
        self.stage = checkpoint.zero_stage
        self._folder, self._world_size = checkpoint.path / tag, checkpoint.world_size
        self.optimizer = functools.cache(self._read_optimizer)
        self.states = functools.cache(self._read_states)
        prefix = "zero_pp_rank_0_" if self.stage == 3 else ""
        self.model = read_state(self._folder / f"{prefix}mp_rank_00_model_states.pt", mapped=True)
        self.layout = self._layout(parameters)
        for name, elements in parameters.items():
            if self.layout.elements(name) != elements:
                raise StorageError(
                    "the checkpoint is of another model",
                    got=f"{checkpoint.path}: {self.layout.elements(name)} elements of {name}",
                    allowed=f"{elements} elements",
                    do="start over with --fresh",
                )

    def _layout(self, parameters: Sizes) -> Layout:
        if self.stage == 0:
            return unsharded_layout(parameters)
        groups = _elements(self.model["param_shapes"])
        if self.stage == 3:
            return parts_layout(groups, world_size=self._world_size)
        optimizer = self.optimizer(0)
        masters = optimizer["single_partition_of_fp32_groups"]  # without their padding
        sizes = [len(one) + padding for one, padding in zip(masters, optimizer["group_paddings"], strict=True)]
        return rows_layout(groups, sizes=sizes, paddings=optimizer["param_alignment_paddings"])

    def _read_optimizer(self, rank: int) -> dict[str, Any]:
        """What a rank's optimizer under ZeRO had saved."""
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file = next(self._folder.glob(f"*{name}"), self._folder / name)  # some begin with bf16_
        state: dict[str, Any] = read_state(file, mapped=True)["optimizer_state_dict"]
        return state

    def _read_states(self, rank: int) -> list[dict[str, Tensor]]:
        """A rank's flat tensors for each group: the master weights, and Adam's moments once it has taken a step."""
        moments = self._adam(rank)
        groups: list[dict[str, Tensor]] = []
        for index, master in enumerate(self._masters(rank)):
            own = moments.get(index, {})
            flat = {kind: value.reshape(-1) for kind, value in own.items() if kind not in _SCALARS}
            groups.append({_MASTER: master.reshape(-1), **flat})
        return groups

    def scalars(self) -> dict[str, Any]:
        """Adam's step, which corrects its bias, anew at each call; empty before the first step."""
        first = self._adam(0).get(0, {})
        return {kind: copy.deepcopy(first[kind]) for kind in _SCALARS if kind in first}

    def _masters(self, rank: int) -> list[Tensor]:
        if self.stage == 3:
            return list(self.optimizer(rank)["fp32_flat_groups"])
        if self.stage > 0:
            return list(self.optimizer(rank)["single_partition_of_fp32_groups"])
        groups = self.model["optimizer"].get("fp32_groups")  # only where the weights themselves are of 16 bits
        if groups is None:
            return [self.model["module"][name] for name in self.layout.spans]
        return [master for group in groups for master in group]

    def _adam(self, rank: int) -> dict[int, dict[str, Any]]:
        """Adam's states by the index of the flat tensor that they belong to."""
        if self.stage == 0:
            saved = self.model["optimizer"]
            saved = saved.get("optimizer_state_dict", saved)
        else:
            saved = self.optimizer(rank)["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        states: dict[int, dict[str, Any]] = saved["state"]
        return states

    def share(self, target: Layout, rank: int) -> list[dict[str, Tensor]]:
        """What `rank` holds of every state in another layout: flat tensors for each group, padding 0."""
        kinds = {kind: value.dtype for kind, value in self.states(0)[0].items()}
        groups = [{kind: torch.zeros(size, dtype=kinds[kind]) for kind in kinds} for size in target.sizes]
        for name, spans in target.spans.items():
            for span in spans:
                if span.rank != rank:
                    continue
                for source, place in overlaps(self.layout.spans[name], span):
                    for kind, values in self.states(source.rank)[source.group].items():
                        piece = values[source.offset : source.offset + source.count]
                        groups[place.group][kind][place.offset : place.offset + place.count] = piece
        return groups


class _Files:
    """DeepSpeed's checkpoint engine, except that it reads nothing but data."""

    def __init__(self, replaced: Any) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """The content of one of DeepSpeed's files."""
        return read_state(path, location=map_location)


class _Reader:
    """Stands in for DeepSpeed's checkpoint engine while it loads: the same files, for another shape."""

    def __init__(self, engine: Any, saved: _Saved) -> None:
        self._engine, self._saved = engine, saved
        self._stage, self._rank = engine.zero_optimization_stage(), dist.get_rank()

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """The content of one of DeepSpeed's files."""
        if path.endswith("_model_states.pt"):
            return self._model_states()
        return {"optimizer_state_dict": self._zero_states()}

    def _model_states(self) -> dict[str, Any]:
        states = {**self._saved.model, "dp_world_size": dist.get_world_size(), "module": self._module()}
        states["optimizer"] = self._unsharded_states() if self._stage == 0 else None
        states["frozen_param_fragments"] = None
        return states

    def _module(self) -> dict[str, Tensor]:
        """The weights as DeepSpeed wants them: stage 3 takes its own from the masters and asks for empty ones.

        Of frozen ones DeepSpeed leaves out only the first name; a tied one's other name stands there all the same,
        without its values where stage 3 has written it.
        """
        every = self._engine.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in every if not parameter.requires_grad}
        saved = {name: value for name, value in self._saved.model["module"].items() if name not in frozen}
        buffers = self._saved.model["buffer_names"]
        if self._stage == 3:
            return {name: value if name in buffers else torch.empty(0) for name, value in saved.items()}
        if self._saved.stage < 3:
            return saved
        parameters = {name: parameter for parameter, name in self._engine.param_names.items()}
        whole = unsharded_layout({name: self._saved.layout.elements(name) for name in self._saved.layout.spans})
        share = self._saved.share(whole, 0)
        weights = {name: own[_MASTER].view_as(parameters[name]) for name, own in zip(whole.spans, share, strict=True)}
        tied = {alias: weights[name] for alias, name in self._saved.model["shared_params"].items() if name in weights}
        return {**saved, **weights, **tied}

    def _zero_states(self) -> dict[str, Any]:
        """What this rank's optimizer under ZeRO would have saved; what it holds now gives the form."""
        optimizer = self._engine.optimizer
        share = self._saved.share(self._layout(), self._rank)
        states: dict[str, Any] = optimizer.state_dict()
        if self._saved.stage > 0:
            states |= {name: self._saved.optimizer(0)[name] for name in _SAME_ON_ALL}
        masters = [group[_MASTER] for group in share]
        if self._stage == 3:
            # Its inner optimizer holds no parameters between steps: only its own state_dict lends it them.
            adam = {**states["optimizer_state_dict"], "state": self._adam(share)}
            return {**states, "optimizer_state_dict": adam, "fp32_flat_groups": masters}
        adam = {**optimizer.optimizer.state_dict(), "state": self._adam(share)}
        return {**states, "base_optimizer_state": adam, "single_partition_of_fp32_groups": masters}

    def _unsharded_states(self) -> dict[str, Any]:
        """What an optimizer without ZeRO would have saved; with 16-bit weights it keeps masters of its own."""
        if self._saved.stage == 0:
            unchanged: dict[str, Any] = self._saved.model["optimizer"]
            return unchanged
        shapes = [parameter.shape for group in _parameter_groups(self._engine) for parameter in group]
        share = self._saved.share(self._layout(), 0)
        shaped = [
            {kind: value.view(shape) for kind, value in group.items()}
            for group, shape in zip(share, shapes, strict=True)
        ]
        states: dict[str, Any] = self._engine.optimizer.state_dict()
        if "fp32_groups" not in states:
            return {**states, "state": self._adam(shaped)}
        masters = iter(group[_MASTER] for group in shaped)
        return {
            **states,
            "optimizer_state_dict": {**states["optimizer_state_dict"], "state": self._adam(shaped)},
            "fp32_groups": [[next(masters) for _ in group] for group in states["fp32_groups"]],
        }

    def _adam(self, share: list[dict[str, Tensor]]) -> dict[int, dict[str, Any]]:
        """Adam's states by index; none before its first step."""
        states = [
            {**self._saved.scalars(), **{kind: value for kind, value in group.items() if kind != _MASTER}}
            for group in share
        ]
        return {index: state for index, state in enumerate(states) if state}

    def _layout(self) -> Layout:
        """The engine's own."""
        optimizer, world_size = self._engine.optimizer, dist.get_world_size()
        if self._stage == 0:
            return unsharded_layout(_parameters(self._engine))
        groups = _elements(self._engine._get_zero_param_shapes())
        if self._stage == 3:
            return parts_layout(groups, world_size=world_size)
        sizes = [int(size) for size in optimizer.partition_size]
        return rows_layout(groups, sizes=sizes, paddings=optimizer.round_robin_bit16_padding)


def _elements(shapes: Sequence[Mapping[str, Sequence[int]]]) -> list[Sizes]:
    return [{name: math.prod(shape) for name, shape in group.items()} for group in shapes]


def _parameter_groups(engine: Any) -> list[list[Any]]:
    """The trainable parameters as the optimizer was given them, whatever it keeps in their place."""
    optimizer = engine.optimizer
    for name in ("bit16_groups", "fp16_groups"):
        groups = getattr(optimizer, name, None)
        if groups is not None:
            return list(groups)
    return [group["params"] for group in optimizer.param_groups]


def _parameters(engine: Any) -> dict[str, int]:
    """Elements of every trainable parameter, in the optimizer's order; ZeRO-3's shards hide theirs."""
    return {
        engine.param_names[parameter]: math.prod(getattr(parameter, "ds_shape", parameter.shape))
        for group in _parameter_groups(engine)
        for parameter in group
    }
