"""What stages are planned with before there is the model they begin with: its architecture and tokenizer, known from
where the first stage begins. Called by `plan`, and by `run` for its look ahead."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.architectures.families import model_config
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.new_tokenizer import LOOK_SAMPLE_BYTES
from orchestrator.samples.prepare import PreparedData, find_data
from orchestrator.spec import ModelSpec, RunSpec
from orchestrator.tasks.registry import task_of


@contextmanager
def stand_in_for_base(first: RunSpec, *, cache: Path) -> Iterator[ModelSpec]:
    """A model that a stage after `first` can be planned with: the base of `first` itself, or for new weights a folder
    that is there within the block, with their configuration and tokenizer.

    A tokenizer that `first` will train is trained on a sample of its corpus, unless it lies below `cache` already.
    Raises what `find_data` raises.
    """
    if first.model.base is not None:
        yield first.model
        return
    with tempfile.TemporaryDirectory(prefix="stand-in-") as name:
        folder, location, vocabulary = Path(name), first.model.tokenizer, None
        if location == "auto":
            location, vocabulary = _tokenizer(first, folder / "tokenizer", cache)
        config = model_config(first.model, vocab_size=vocabulary, sequence_length=first.data.sequence_length)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield ModelSpec(config=str(folder), tokenizer=location)


def _tokenizer(first: RunSpec, folder: Path, cache: Path) -> tuple[str, int]:
    """(where the tokenizer lies that `first` trains, or one like it; its entries)."""
    found = find_data(first, cache=cache, exactly=False)
    if isinstance(found, PreparedData):
        return str(found.tokenizer_folder), found.counts.vocab_size
    form = form_of(task_of(first.task))
    tokenizer = form.train_tokenizer(found.inputs.spec, found.split, most_bytes=LOOK_SAMPLE_BYTES)
    tokenizer.save(folder)
    return str(folder), tokenizer.vocab_size


def with_stand_in(spec: RunSpec, model: ModelSpec) -> RunSpec:
    """The spec of a later stage with the model that it is planned with; new weights are allowed there, which a spec
    that fine-tunes would refuse."""
    return spec.model_copy(update={"model": model})
