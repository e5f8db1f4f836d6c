"""The columns that a spec leaves open, chosen as `advise` chooses them. Called by `prepare`; pure but for the look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.data.columns import FIELDS, USUAL_TEXT, Preview, choose_columns, no_conversations, usual_text
from orchestrator.data.layouts import Layout, recognise
from orchestrator.data.sources import Source
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of


@dataclass(frozen=True, kw_only=True)
class NamedColumns:
    """What of the data a run reads."""

    spec: RunSpec
    """With its columns named."""
    layout: Layout | None = None
    """Of conversations."""
    assumed: tuple[str, ...] = ()
    """What was taken for granted, a sentence each."""


def with_columns(spec: RunSpec, sources: Sequence[Source], *, look: Callable[[Source], Preview]) -> NamedColumns:
    """The columns of a spec's data; where it names them there is no look.

    Raises DataError when they cannot be told, and for a layout that the task does not read.
    """
    data = spec.data
    if task_of(spec.task).form == "chats":
        return _conversations(spec, look(sources[0]))
    if data.text_column is not None and (spec.models_language or data.label_column is not None):
        return NamedColumns(spec=spec)
    seen = look(sources[0])
    text = data.text_column or usual_text(seen.names, data.label_column)
    if text is None or not spec.models_language:
        found = choose_columns(seen, text_column=text, label_column=data.label_column, task=spec.task, asking=FIELDS)
        text, label, notes = found.text, found.label, found.assumed
    else:
        label, notes = None, ()
    named = data.model_copy(update={"text_column": text or USUAL_TEXT, "label_column": label})
    return NamedColumns(spec=spec.model_copy(update={"data": named}), assumed=notes)


def _conversations(spec: RunSpec, seen: Preview) -> NamedColumns:
    """A column that is named holds turns; else names and content tell."""
    if (named := spec.data.text_column) is not None and named in seen.names:
        return NamedColumns(spec=spec, layout=Layout(title="chats", purpose="answers", fields=(named,), has_turns=True))
    layout = recognise(seen.names, seen.rows) if named is None else None
    if layout is None or not layout.is_conversation:
        raise no_conversations(seen, layout, FIELDS, named=named)
    return NamedColumns(spec=spec, layout=layout, assumed=(f"the rows are {layout}",))
