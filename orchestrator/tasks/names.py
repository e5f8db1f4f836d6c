"""The names of tasks, those that `run` trains and those that the advisor answers for, and of what samples are."""

from __future__ import annotations

from typing import Literal

TrainedTask = Literal["causal-lm", "masked-lm", "text-classification"]
"""What a spec may name. Each has its object in `registry`."""
Task = Literal["causal-lm", "masked-lm", "text-classification", "image-classification"]
FormName = Literal["packed-blocks", "masked-blocks", "labelled-texts"]
"""What the samples of a task are. Each has its object in `samples/forms/registry`."""
PACKED: frozenset[FormName] = frozenset({"packed-blocks", "masked-blocks"})
"""Forms whose samples are blocks of one length, cut from a stream of documents; batches of the others are padded."""
LABELLED_TEXT: TrainedTask = "text-classification"
"""What a text with a class is an example of."""
CONTINUED_TEXT: TrainedTask = "causal-lm"
"""What a prompt with its answer is an example of."""
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "text-classification", "image-classification")


def raw_text_task(*, is_encoder: bool) -> TrainedTask:
    """What a model learns from raw text: an encoder, which sees both sides of a token, fills gaps."""
    return "masked-lm" if is_encoder else CONTINUED_TEXT
