"""What stages are planned with before there is the model they begin with: its architecture and tokenizer, known from
where the first stage begins. Called by `plan`, and by `run` for its look ahead."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.architectures.families import model_config
from orchestrator.data.splits import SplitRows
from orchestrator.samples.data_look import NEW_TOKENIZER_BYTES
from orchestrator.samples.encoders import tokenizer_of
from orchestrator.samples.prepare import PreparedData, find_data
from orchestrator.spec import ModelSpec, RunSpec


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
    assert not isinstance(found.split, SplitRows), "new weights learn from raw text"
    tokenizer = tokenizer_of(found.spec, found.split[0], most_bytes=NEW_TOKENIZER_BYTES)
    tokenizer.save(folder)
    return str(folder), tokenizer.vocab_size


def with_stand_in(spec: RunSpec, model: ModelSpec) -> RunSpec:
    """The spec of a later stage with the model that it is planned with; new weights are allowed there, which a spec
    that fine-tunes would refuse."""
    return spec.model_copy(update={"model": model})
