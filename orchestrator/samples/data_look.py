"""A look at a spec's data before anything is encoded: examples and classes counted, tokens from a sample of the text.

Reads and splits the data as `prepare` does, so what cannot work is refused here too. Called by `plan`; no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.ratio_estimates import exactly
from orchestrator.samples.forms.base import SampleForm
from orchestrator.samples.forms.data_figures import DataLook
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.prepare import PreparedData, find_data, of_general_data
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of


def look(spec: RunSpec, *, cache: Path) -> DataLook:
    """What the data of a spec holds; `cache` is where `prepare` would keep it.

    Raises what `prepare` raises, but for text that is too short for one block.
    """
    found = _look(spec, cache)
    with of_general_data(spec) as general:
        retained = None if general is None else _look(general, cache)
    if retained is None:
        return found
    said = tuple(f"general data: {sentence}" for sentence in retained.sentences())
    counts = replace(found.counts, retained=retained.counts)
    return replace(found, counts=counts, notes=(*found.notes, *said))


def _look(spec: RunSpec, cache: Path) -> DataLook:
    """Of one block of data."""
    form = form_of(task_of(spec.task))
    found = find_data(spec, cache=cache, exactly=False)
    return _encoded(found, form) if isinstance(found, PreparedData) else form.look(found.inputs, found.split)


def _encoded(data: PreparedData, form: SampleForm[Any]) -> DataLook:
    return DataLook(
        unit=form.unit,
        train_examples=data.train_examples,
        validation_examples=data.held_out.examples,
        train_bytes=data.bytes,
        validation_bytes=data.validation_bytes,
        held_out=data.held_out,
        columns=data.columns,
        classes=form.class_sizes(data.path, data.label_names),
        train_tokens=exactly(data.counts.train_tokens or data.counts.validation_tokens or 0),
        counted=True,
        counts=data.counts,
        notes=(*data.notes, *data.held_out.notes),
    )
