"""A look at a spec's data before anything is encoded: examples and classes counted, tokens from a sample of the text.

Reads and splits the data as `prepare` does, so what cannot work is refused here too. What was found is kept beside
prepared data, in `looks/`, for the next look at the same. Called by `plan`; no torch.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.atomic_file import read_json, write_json
from orchestrator.intervals import Interval
from orchestrator.ratio_estimates import exactly
from orchestrator.samples.forms.base import SampleForm
from orchestrator.samples.forms.data_figures import DataLook
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.prepare import PreparedData, Unprepared, check_test, find_data, of_general_data
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of

_FORMAT = 1
"""Part of a kept look's name: raise it when one at the same data would find something else."""
_LOOK = TypeAdapter(DataLook)


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
    check_test(spec, found)
    if isinstance(found, PreparedData):
        return _encoded(found, form)
    file = cache / "looks" / f"{_key(found)}.json"
    if (kept := _kept(file)) is not None:
        return kept
    seen = form.look(found.inputs, found.split)
    with suppress(OSError):  # it is looked at again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(seen))
    return seen


def _kept(file: Path) -> DataLook | None:
    """What was found at an earlier look, to the last figure; None where there was none."""
    value = read_json(file)
    try:
        return replace(_LOOK.validate_python(value), train_tokens=Interval(**value["train_tokens"]))
    except (ValidationError, TypeError, KeyError):
        return None


def _key(data: Unprepared) -> str:
    """Of all that shapes what is found."""
    inputs = data.inputs
    parts = [_FORMAT, data.fingerprint, inputs.is_exact, inputs.spec.data.split_seed, inputs.notes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


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
