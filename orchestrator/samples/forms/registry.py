"""The forms of samples by the names that tasks give them: a name without an object does not pass the type checker."""

from __future__ import annotations

from typing import Any, assert_never

from orchestrator.samples.forms.base import SampleForm
from orchestrator.samples.forms.chats import Chats
from orchestrator.samples.forms.labelled_texts import LabelledTexts
from orchestrator.samples.forms.masked_blocks import MaskedBlocks
from orchestrator.samples.forms.packed_blocks import PackedBlocks
from orchestrator.tasks.base import LearntTask

_PACKED_BLOCKS, _MASKED_BLOCKS, _LABELLED_TEXTS, _CHATS = PackedBlocks(), MaskedBlocks(), LabelledTexts(), Chats()


def form_of(task: LearntTask) -> SampleForm[Any]:
    """What the samples of a task are."""
    match task.form:
        case "packed-blocks":
            return _PACKED_BLOCKS
        case "masked-blocks":
            return _MASKED_BLOCKS
        case "labelled-texts":
            return _LABELLED_TEXTS
        case "chats":
            return _CHATS
        case _:
            assert_never(task.form)
