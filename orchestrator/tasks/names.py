"""The names of tasks, those that `run` trains and those that the advisor answers for, and of what samples are."""

from __future__ import annotations

from typing import Literal

TrainedTask = Literal["causal-lm", "masked-lm", "text-classification", "chat"]
"""What a spec may name. Each has its object in `registry`."""
Task = Literal["causal-lm", "masked-lm", "text-classification", "chat", "image-classification"]
FormName = Literal["packed-blocks", "masked-blocks", "labelled-texts", "chats"]
"""What the samples of a task are. Each has its object in `samples/forms/registry`."""
PACKED: frozenset[FormName] = frozenset({"packed-blocks", "masked-blocks"})
"""Forms whose samples are blocks of one length, cut from a stream of documents; batches of the others are padded."""
CUT_OFF: frozenset[FormName] = frozenset({"labelled-texts"})
"""Forms whose samples are rows that may go on beyond the length of the spec, which only their tokens show."""
LABELLED_TEXT: TrainedTask = "text-classification"
"""What a text with a class is an example of."""
CONTINUED_TEXT: TrainedTask = "causal-lm"
"""What a text that is to be continued is an example of."""
ANSWERED_CHAT: TrainedTask = "chat"
"""What a prompt with its answer, or a chat with an assistant, is an example of."""
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "text-classification", "chat", "image-classification")


def raw_text_task(*, is_encoder: bool) -> TrainedTask:
    """What a model learns from raw text: an encoder, which sees both sides of a token, fills gaps."""
    return "masked-lm" if is_encoder else CONTINUED_TEXT
