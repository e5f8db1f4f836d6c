"""The columns that a spec leaves open, chosen as `advise` chooses them. Called by `prepare`; pure but for the look."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.data.columns import FIELDS, USUAL_TEXT, Preview, choose_columns, usual_text
from orchestrator.data.sources import Source
from orchestrator.spec import RunSpec


def with_columns(
    spec: RunSpec, sources: Sequence[Source], *, look: Callable[[Source], Preview]
) -> tuple[RunSpec, tuple[str, ...]]:
    """(the spec with its columns named, what was taken for granted); a spec that names them is left as it is.

    Raises DataError when they cannot be told, and for instructions, chats and other layouts that no task reads.
    """
    data = spec.data
    if data.text_column is not None and (spec.models_language or data.label_column is not None):
        return spec, ()
    seen = look(sources[0])
    text = data.text_column or usual_text(seen.names, data.label_column)
    if text is None or not spec.models_language:
        found = choose_columns(seen, text_column=text, label_column=data.label_column, task=spec.task, asking=FIELDS)
        text, label, notes = found.text, found.label, found.assumed
    else:
        label, notes = None, ()
    named = data.model_copy(update={"text_column": text or USUAL_TEXT, "label_column": label})
    return spec.model_copy(update={"data": named}), notes
