"""How likely a causal language model finds the names of classes behind prompts that begin alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.samples.prompts import Question


class Scorer:
    """A causal language model that has read what all prompts begin with."""

    def __init__(self, model: Any, device: torch.device, begins: Sequence[int]) -> None:
        """`begins` may be empty."""
        self._model, self._device = model.to(device).eval(), device
        self._last, self._cache = tuple(begins[-1:]), None  # the last id is read again, so that no context is empty
        if len(begins) > 1:
            with torch.no_grad():
                read = self._model(input_ids=self._tensor([list(begins[:-1])]), use_cache=True, logits_to_keep=1)
            self._cache = read.past_key_values

    def scores(self, asked: Sequence[Question], *, at_a_time: int) -> Tensor:
        """Log-probability of each class's name behind each prompt, (questions, classes) in fp32.

        Contexts are equally long; at most so many sequences are computed together.
        """
        contexts = self._tensor([[*self._last, *question.context] for question in asked])
        classes = len(asked[0].answers)
        with torch.no_grad():
            read = self._model(
                input_ids=contexts,
                past_key_values=self._repeated(self._cache, len(asked)),
                use_cache=True,
                logits_to_keep=1,
            )
            first = self._tensor([[answer[0] for answer in question.answers] for question in asked])
            found = read.logits[:, -1].float().log_softmax(-1).gather(1, first)
            together = max(1, at_a_time // len(asked))
            for start in range(0, classes, together):
                chosen = range(start, min(start + together, classes))
                found[:, chosen] += self._of_the_rest(read.past_key_values, asked, chosen)
        return found

    def _of_the_rest(self, cache: Any, asked: Sequence[Question], classes: range) -> Tensor:
        """Log-probability of what follows the first tokens of these classes' names, (questions, classes)."""
        answers = [question.answers[label] for question in asked for label in classes]
        longest = max(map(len, answers))
        if longest == 1:
            return torch.zeros(len(asked), len(classes), device=self._device)
        ids = self._tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers])
        read = self._model(input_ids=ids[:, :-1], past_key_values=self._repeated(cache, len(classes)), use_cache=True)
        each = read.logits.float().log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        real = torch.arange(1, longest, device=self._device) < self._tensor([[len(answer)] for answer in answers])
        return (each * real).sum(1).view(len(asked), len(classes))

    def _repeated(self, cache: Any, times: int) -> Any:
        """A copy of keys and values, each sequence so many times: a model adds to those that it is given."""
        if cache is None:
            return None
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(times)
        return own

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self._device)
