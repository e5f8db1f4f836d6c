"""RunPlan -> a DeepSpeed engine behind five verbs: step, evaluate, save, load, full_state.

The only place that knows DeepSpeed's ways: its op builds, its output, and where it keeps gradient norms.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoints.catalog import Checkpoint
from orchestrator.checkpoints.host_copy import HostBuffers
from orchestrator.checkpoints.reshard import readable
from orchestrator.errors import SpecError, StorageError
from orchestrator.planning.deepspeed_config import sums_in_fp32
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.job import WorkerContext
from orchestrator.tasks.base import Objective
from orchestrator.worker.anchors import Anchors
from orchestrator.worker.forward_timer import ForwardTimer
from orchestrator.worker.measurement import host_peak_gib, reset_host_peak
from orchestrator.worker.objectives import Batch, logits_of

_STATE = "state"
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Long enough for rank 0 to verify a large checkpoint while the others wait."""


def join_process_group(plan: RunPlan, context: WorkerContext) -> None:
    """Joins the process group named by MASTER_ADDR and MASTER_PORT; in a single process they default to a free port.

    DeepSpeed is told of it before there is a model: building one under ZeRO-3 cuts its weights by the number of ranks.
    """
    torch.set_num_threads(plan.cpus_per_worker)
    if plan.device == "cuda":
        torch.cuda.set_device(context.local_rank)
    backend = "nccl" if plan.device == "cuda" else "gloo"
    if not dist.is_initialized():
        ranks = {"RANK": context.rank, "WORLD_SIZE": context.world_size, "LOCAL_RANK": context.local_rank}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        if context.world_size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    _import_deepspeed(plan).init_distributed(dist_backend=backend, dist_init_required=False)


def device_of(plan: RunPlan, context: WorkerContext) -> torch.device:
    """This rank's."""
    return torch.device(f"cuda:{context.local_rank}" if plan.device == "cuda" else "cpu")


def forget_peak(device: torch.device) -> None:
    """A process that trains one trial after the other starts each at what it holds now."""
    _collect(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_host_peak()


def peak_gib(device: torch.device) -> float:
    """Most memory that any rank has held since its `forget_peak`: reserved on a GPU, resident on a CPU.

    Every rank calls it.
    """
    own_gib = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else host_peak_gib()
    most = torch.tensor(own_gib, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


class Engine:
    """One rank's share of a DeepSpeed training."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        plan: RunPlan,
        groups: list[dict[str, Any]],
        objective: Objective,
        context: WorkerContext,
        anchors: tuple[float, Sequence[bool]] | None = None,
    ) -> None:
        """Wraps a module whose parameters are trained in these groups; every rank calls it. Joins no process group
        itself. `anchors` are the strength of L2-SP, and of each group whether it is pulled."""
        deepspeed = _import_deepspeed(plan)
        self._plan = plan
        self._objective = objective
        self._is_leader = context.rank == 0
        self._device = device_of(plan, context)
        self._trains_all = all(parameter.requires_grad for parameter in model.parameters())
        forget_peak(self._device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config=dict(plan.deepspeed),
            dist_init_required=False,
        )
        self._refuse_states_on_nvme()
        if sums_in_fp32(precision=plan.precision, accumulation=plan.accumulation) and plan.zero_stage < 2:
            self._sum_in_fp32()
        self._capture = _Capture(self._engine.checkpoint_engine)
        self._timer = ForwardTimer(self._engine.module, on_gpu=self._device.type == "cuda")
        if plan.zero_stage == 0 and plan.precision != "fp32":
            self._undo_first_step()
        if anchors is not None:
            self._anchor(*anchors)

    def step(
        self,
        micro_batches: Sequence[Batch],
        learning_rate: float,
        *,
        seeds: Sequence[int],
        scales: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, float | None]:
        """One optimizer step over this rank's micro-batches, dropout drawn from a seed for each.

        `scales` are what the learning rate is multiplied by in each group; None is 1.
        Returns this rank's part of the mean loss over the global batch (0-d tensor; the mean over all ranks is that),
        and the global gradient norm before clipping. Of a step that fp16's loss scaler leaves out, to go on at a
        smaller scale, there is no norm; without a smaller one it is inf.
        """
        scale = self._loss_scale()
        groups = self._engine.optimizer.param_groups
        for group, scale_of in zip(groups, scales or [1.0] * len(groups), strict=True):
            group["lr"] = learning_rate * scale_of
        self._engine.train()
        total = torch.zeros((), device=self._device)
        norm = None
        weights = self._weights(micro_batches)
        for index, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
            torch.manual_seed(seed)
            with self._timer.running() if index == 0 else contextlib.nullcontext():
                loss = self._objective.loss(self._engine, self._to_device(batch))
            if weights is not None:
                loss = loss * weights[index]
            total += loss.detach()
            self._engine.backward(loss)
            if index == len(micro_batches) - 1 and self._plan.zero_stage == 0:
                norm = self._norm_of_whole_gradients()
            self._engine.step()
        if scale is not None and self._engine.optimizer.overflow:
            norm = None if scale > self._least_loss_scale else math.inf
        elif (known := self._engine.get_global_grad_norm()) is not None:
            norm = float(known)
        return total / len(micro_batches), norm

    def _weights(self, micro_batches: Sequence[Batch]) -> torch.Tensor | None:
        """What each micro-batch's mean counts in the mean over all predictions of the global batch, 1 on average; None
        where all hold equally many."""
        if self._objective.predictions is None:
            return None
        counts = torch.stack([self._objective.predictions(batch) for batch in micro_batches]).to(self._device)
        total = counts.sum()
        dist.all_reduce(total)
        return counts * (len(micro_batches) * dist.get_world_size()) / torch.where(total > 0, total, 1)

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Sums per sample, shape (n, 3), of the task's objective; no gradients, no dropout."""
        self._engine.eval()
        with torch.no_grad():
            return self._objective.evaluate(self._engine, self._to_device(batch))

    def logits(self, batch: Batch) -> torch.Tensor:
        """What the model gives for a batch, on the CPU; no gradients, no dropout. Every rank calls it."""
        return logits_of(self._engine, self._to_device(batch))

    @property
    def forward_s(self) -> float:
        """Seconds that the newest step's first forward pass took in the largest layers: this rank's own work."""
        return self._timer.seconds()

    @property
    def micro_batch(self) -> int:
        """Samples per worker and forward pass."""
        return self._plan.micro_batch

    def snapshot(self) -> dict[str, Any]:
        """This rank's checkpoint files as state in host memory, by path below the checkpoint; every rank calls it.

        The next snapshot overwrites it.
        """
        with self._capture.instead_of_files(self._engine):
            self._engine.save_checkpoint(
                ".", tag=_STATE, save_latest=False, exclude_frozen_parameters=not self._trains_all
            )
        return self._capture.take()

    def load(self, checkpoint: Checkpoint) -> None:
        """Every rank reads its share, whatever shape the checkpoint was written in, also in the middle of a training.

        Raises StorageError when it cannot be read or is of another model.
        """
        try:
            with readable(self._engine, checkpoint, tag=_STATE) as folder:
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=_STATE, load_module_strict=self._trains_all)
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
            raise StorageError(
                "the checkpoint cannot be loaded", got=f"{checkpoint.path} ({error})", do="start over with --fresh"
            ) from error
        if loaded is None:
            raise StorageError(
                "the checkpoint holds no training state", got=checkpoint.path, do="start over with --fresh"
            )

    def full_state(self) -> dict[str, torch.Tensor]:
        """All weights on the CPU of rank 0, empty elsewhere; every rank calls it."""
        if self._plan.zero_stage == 3:
            return dict(self._engine._zero3_consolidated_16bit_state_dict() or {})
        if not self._is_leader:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self._engine.module.state_dict().items()}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Those of `full_state` that training may change; every rank calls it."""
        module = self._engine.module
        trained = {name for name, weight in module.named_parameters(remove_duplicate=False) if weight.requires_grad}
        return {name: tensor for name, tensor in self.full_state().items() if name in trained}

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a small tensor over all ranks."""
        values = values.to(self._device)
        dist.all_reduce(values)
        return values

    def peak_gib(self) -> float:
        """Most memory that any rank has held since its engine was built: reserved on a GPU, resident on a CPU.

        Every rank calls it.
        """
        return peak_gib(self._device)

    def close(self) -> None:
        """Lets go of the model and its states, so that another training finds their memory free in this process."""
        self._timer.close()
        with contextlib.suppress(AttributeError):
            self._engine.destroy()
        self._engine = None
        _collect(self._device)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _refuse_states_on_nvme(self) -> None:
        """DeepSpeed copies them file by file while training waits, past its own checkpoint engine."""
        if self._engine.zero_nvme_offload_optimizer():
            raise SpecError(
                "optimizer states on NVMe cannot be checkpointed behind the training",
                got="deepspeed.zero_optimization.offload_optimizer.device: nvme",
                allowed="deepspeed.offload: none, optimizer or all (host memory)",
            )

    def _sum_in_fp32(self) -> None:
        """Without sharded gradients DeepSpeed sums those of micro-batches in bf16, or swaps its optimizer for another
        (`deepspeed_config.sums_in_fp32`); PyTorch's own sums in what a weight says of its gradient."""
        for weight in self._engine.module.parameters():
            if weight.requires_grad:
                weight.grad_dtype = torch.float32

    def _undo_first_step(self) -> None:
        """Without ZeRO, DeepSpeed's 16-bit optimizer makes room for Adam's moments by a step without gradients.

        It decays the master weights at the peak rate and shifts the bias correction: the first steps are too short.
        """
        optimizer = self._engine.optimizer
        optimizer.refresh_fp32_params()
        for state in optimizer.state.values():
            state["step"].zero_()

    def _anchor(self, strength: float, pulled: Sequence[bool]) -> None:
        """Has the masters of some groups pulled to their present values before every step."""
        optimizer = self._engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        if self._plan.zero_stage == 3:  # its groups are empty, but while one of their parts is stepped
            group_of = optimizer.sub_group_to_group_id
            masters = [(group_of[part], weight) for part, weight in enumerate(optimizer.fp32_partitioned_groups_flat)]
        else:
            masters = [
                (number, weight) for number, group in enumerate(inner.param_groups) for weight in group["params"]
            ]
        anchors = Anchors([weight for place, weight in masters if pulled[place]], strength=strength)
        inner.register_step_pre_hook(anchors.pull)

    def _loss_scale(self) -> float | None:
        """What fp16's loss is multiplied by in the next step, so that small gradients do not vanish; None where it
        never changes.

        When it cannot be lowered any more, DeepSpeed 0.19.8 raises a plain Exception in the middle of a step under
        ZeRO, and without ZeRO leaves out step after step in silence. Here such a step is told by its norm.
        """
        if self._plan.precision != "fp16" or not self._engine.dynamic_loss_scale():
            return None
        optimizer = self._engine.optimizer
        if self._plan.zero_stage > 0:
            optimizer.loss_scaler.raise_error_at_min_scale = False  # a checkpoint brings a scaler of its own
        return float(optimizer.loss_scale)

    @property
    def _least_loss_scale(self) -> float:
        return float(self._plan.deepspeed["fp16"].get("min_loss_scale", 1))

    def _norm_of_whole_gradients(self) -> float | None:
        """Without ZeRO, DeepSpeed clips in place and keeps no norm; the gradients are already averaged here."""
        norms = [p.grad.norm() for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm()) if norms else None


class _Capture:
    """DeepSpeed's checkpoint engine, except that what it would write stays in memory."""

    def __init__(self, replaced: Any) -> None:
        self._replaced = replaced
        self._buffers = HostBuffers()
        self._files: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written, so nothing is made."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copies a file's content to host memory."""
        name = os.path.normpath(path)
        self._files[name] = self._buffers.copy(name, state_dict)

    def take(self) -> dict[str, Any]:
        """What was saved, by path."""
        taken, self._files = self._files, {}
        return taken

    @contextlib.contextmanager
    def instead_of_files(self, engine: Any) -> Iterator[None]:
        """Lets an engine save to memory, without the scripts that DeepSpeed puts beside its files."""
        engine.checkpoint_engine, engine._copy_recovery_script = self, lambda _: None
        try:
            yield
        finally:
            engine.checkpoint_engine = self._replaced
            del engine._copy_recovery_script


def _collect(device: torch.device) -> None:
    """Frees what DeepSpeed's engines leave behind: they refer to themselves, and Python looks for such circles rarely
    (four trainings of a 44M model held 4.3 GiB, 0.4 when collected)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def needed_by(rank: int, name: str) -> bool:
    """Whether a rank reads a file of a checkpoint: DeepSpeed's sharded files carry the rank in their name."""
    shard = re.search(r"zero_pp_rank_(\d+)_", name)
    return shard is None or int(shard[1]) == rank


def _import_deepspeed(plan: RunPlan) -> Any:
    """DeepSpeed, told its device, with errors only in its log, and without what a run here never uses.

    Left out: its autotuner's import of mlflow (2 s a worker), the compiler that decorators of its Muon optimizer load
    (3 s), and on a CPU the shared-memory op, whose build costs 20 s and more and whose work gloo does.
    """
    os.environ.setdefault("DS_ACCELERATOR", plan.device)
    tracker = sys.modules.get("mlflow")
    if tracker is None:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's way to refuse an import
    try:
        import deepspeed
        import deepspeed.ops

        with _nothing_compiled():
            import deepspeed.runtime.zero.muon.original_muon
    finally:
        if tracker is None:
            del sys.modules["mlflow"]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if plan.device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """`torch.compile` as a decorator that leaves functions as they are."""
    compiling = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = compiling
