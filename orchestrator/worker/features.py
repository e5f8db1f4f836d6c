"""Features of a frozen backbone, computed once: after them a step costs the head alone.

A classification head reads one vector of a text: the first position's, the last token's, or a mean. Comes in: a model
that is ready to be trained by its head, and encoded rows. Goes out: the vectors of all rows, and the model without its
backbone, which gives the same logits for a vector as the whole one for its row.

A row is computed beside the same others whatever the number of workers, so its features are the same to the last bit.
The backbone's dropout is off: a feature that is kept cannot change from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from orchestrator.samples.batches import Samples
from orchestrator.samples.forms.labelled_texts import LabelledSamples
from orchestrator.samples.masking import Batch
from orchestrator.worker.step_data import tensors

_ROWS = 16
"""Computed together, alike in length; fixed, so that no setting of a run changes what stands beside a row."""
_TRIED = 4
"""Rows by which a way of reading is recognised."""
_SENT = 1 << 24
"""Elements that ranks exchange at a time: 64 MiB."""

Read = Callable[[Tensor, Tensor], Tensor]
"""(rows, columns, width) and the mask of (rows, columns) -> (rows, width)."""


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, 0]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


class HeadAlone:
    """A model whose backbone is frozen, taken apart."""

    def __init__(self, model: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is the number format that is computed in: DeepSpeed will cast the head to it too."""
        self.model = model.to(device=device, dtype=dtype)
        self._device = device
        self._prefix = model.base_model_prefix
        self._backbone = getattr(model, self._prefix).eval()

    def reading(self, samples: Samples) -> Read | None:
        """How the head reads a row: the way by which the model without backbone gives the logits of the whole one.

        None where there is no such way. Leaves the model with its backbone.
        """
        lengths = samples.lengths(np.arange(len(samples)))
        different = np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, _TRIED).astype(int)]
        batch = self._batch(samples, different)
        hidden, mask = self._hidden(batch), batch["attention_mask"]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            whole = self.model(input_ids=batch["input_ids"], attention_mask=mask).logits.float()
            self.cut()
            try:
                for read in (_first, _last, _mean):
                    vectors = read(hidden, mask).unsqueeze(1)
                    alone = self.model(inputs_embeds=vectors, attention_mask=mask[:, :1]).logits.float()
                    if torch.allclose(alone, whole, rtol=1e-2, atol=1e-4 * float(whole.abs().max())):
                        return read
            finally:
                setattr(self.model, self._prefix, self._backbone)
                self.model.train(was_training)
        return None

    def cut(self) -> None:
        """Takes the backbone out of the model, but for what of it is trained."""
        setattr(self.model, self._prefix, _Passed(self._backbone))

    def compute(self, samples: Samples, read: Read, *, before_batch: Callable[[], None]) -> Tensor:
        """The features of all rows, (rows, width) in fp32 on the CPU; every rank calls it and gets all."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        order = np.argsort(samples.lengths(np.arange(len(samples))), kind="stable")
        width = read(*self._seen(samples, order[:1])).shape[-1]
        found = torch.zeros(len(samples), width)
        for start in range(rank * _ROWS, len(samples), world_size * _ROWS):
            before_batch()
            rows = order[start : start + _ROWS]
            found[torch.from_numpy(rows)] = read(*self._seen(samples, rows)).float().cpu()
        for part in found.view(-1).split(_SENT):  # of the others' rows each rank holds zeros
            before_batch()
            sent = part.to(self._device)
            dist.all_reduce(sent)
            part.copy_(sent)
        return found

    def _seen(self, samples: Samples, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the backbone makes of rows, and their mask."""
        batch = self._batch(samples, rows)
        return self._hidden(batch), batch["attention_mask"]

    def _batch(self, samples: Samples, rows: np.ndarray) -> dict[str, Tensor]:
        batch = tensors(samples.batch(rows))
        return {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = self._backbone(**batch).last_hidden_state
        return hidden


class _Passed(torch.nn.Module):  # type: ignore[misc]  # of a library without types
    """In the place of a backbone: gives what it is given, and a pooler's view of that where it has one."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.config = backbone.config
        self._dtype = next(backbone.parameters()).dtype
        trained = {name: child for name, child in backbone.named_children() if _is_trained(child)}
        for name, child in trained.items():
            self.add_module(name, child)
        self._pool = getattr(backbone, "pooler_activation", None)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """See the class."""
        pooler = getattr(self, "pooler", None)
        hidden, pooled = inputs_embeds.to(self._dtype), None
        if pooler is not None:  # ALBERT's is a plain layer, whose activation stands beside it
            pooled = pooler(hidden) if self._pool is None else self._pool(pooler(hidden[:, 0]))
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class FeatureSamples:
    """Rows as the vectors that a head reads, counted as the rows that they are."""

    def __init__(self, samples: Samples, features: Tensor) -> None:
        """`features` are those of all rows, (rows, width)."""
        assert isinstance(samples, LabelledSamples), "a head is trained on rows with classes"
        self._samples, self._features = samples, features

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, without padding."""
        return self._samples.token_count

    def __len__(self) -> int:
        return len(self._samples)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each row."""
        return self._samples.lengths(indices)

    def padded_length(self, indices: np.ndarray) -> int:
        """Columns of the batch of these rows."""
        return self._samples.padded_length(indices)

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`inputs_embeds`, (rows, 1, width), with a mask of one column, and `labels`."""
        vectors = self._features[torch.from_numpy(np.asarray(indices))]
        mask = np.ones((len(indices), 1), dtype=np.int64)
        return {
            "inputs_embeds": vectors.unsqueeze(1).numpy(),
            "attention_mask": mask,
            "labels": self._samples.labels(indices),
        }
