"""A dataset's location -> its facts, and its distance from a base model: what `advise --dataset` asks first.

Reading files loads none of torch, Ray, MLflow, transformers and datasets; a table needs pyarrow, a hub name `datasets`,
and the distance from a language model at hand torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.data.columns import OPTIONS, choose_columns
from orchestrator.data.labels import refuse_no_classes, refuse_single_rows
from orchestrator.data.reading import Reading
from orchestrator.errors import DataError
from orchestrator.facts.dataset import DatasetFacts, describe
from orchestrator.facts.token_counts import SAMPLE_BYTES, CountTokens
from orchestrator.tasks.names import Task

if TYPE_CHECKING:
    from orchestrator.facts.domain_distance import Distance


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A dataset beside a base model."""

    facts: DatasetFacts
    distance: Distance


def measure_dataset(
    path: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    task: Task | None = None,
    count: CountTokens | None = None,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
) -> DatasetFacts:
    """The facts of a file, folder, glob, `package://` or `sysconfig://` location, or hub name.

    `count` is a tokenizer; without one a proxy counts, on `sample_bytes` of text. Raises DataError when the dataset is
    missing, empty or malformed, or its columns cannot be told.
    """
    reading = read_dataset(
        path, text_column=text_column, label_column=label_column, delimiter=delimiter, task=task, seed=seed
    )
    return describe(reading, count=count, sample_bytes=sample_bytes, seed=seed)


def measure_against(
    path: str,
    base: str | None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    delimiter: str | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> Measurement:
    """The facts of a dataset, its tokens counted by the base model's tokenizer where that is at hand, and its distance.

    Raises what `measure_dataset` raises, and ModelError when a model at hand cannot be used.
    """
    from orchestrator.facts.domain_distance import measure_distance

    reading = read_dataset(
        path, text_column=text_column, label_column=label_column, delimiter=delimiter, task=task, seed=seed
    )
    facts = describe(reading, count=None if base is None else tokenizer_at_hand(base), seed=seed)
    texts = [text for block in reading.blocks for text in block.texts]
    return Measurement(facts=facts, distance=measure_distance(texts, base, seed=seed))


def read_dataset(
    path: str,
    *,
    text_column: str | None,
    label_column: str | None,
    task: Task | None,
    seed: int,
    delimiter: str | None = None,
) -> Reading:
    """What there is at a location, read whole or in part."""
    from orchestrator.data import sampling
    from orchestrator.data.first_look import preview
    from orchestrator.data.sources import find_sources

    try:
        sources = find_sources(path, delimiter=delimiter)
    except DataError as error:
        if error.do is None or "data." not in error.do:
            raise
        # A spec's field is no help to someone who gave an option.
        do = "check --dataset, or give a glob such as **/*.jsonl"
        raise DataError(error.what, got=error.got, allowed=error.allowed, do=do) from error
    columns = choose_columns(
        preview(sources[0]),
        text_column=text_column,
        label_column=label_column,
        task=task,
        takes_answers=True,
    )
    said = tuple(source.note for source in sources if source.note is not None)
    reading = sampling.read(sources, replace(columns, assumed=(*said, *columns.assumed)), seed=seed)
    if columns.label is not None and reading.share >= 1:
        _refuse_unlearnable(reading, held_out_given=any(source.validation for source in sources))
    return reading


def _refuse_unlearnable(reading: Reading, *, held_out_given: bool) -> None:
    """Raises DataError for classes that `run` would refuse to split and train on."""
    counts = Counter(label for label in reading.complete_labels() if label is not None)
    refuse_no_classes(counts, column=reading.columns.label or "", location=reading.location, asking=OPTIONS)
    if not held_out_given:
        refuse_single_rows(counts, column=reading.columns.label or "", asking=OPTIONS)


def tokenizer_at_hand(base: str) -> CountTokens | None:
    """A counter with a base model's tokenizer, or None where nothing of it is on this machine."""
    from orchestrator.facts.domain_distance import find_tokenizer

    found = find_tokenizer(base)
    return None if found is None else _counter(found.json)


def _counter(tokenizer: str) -> Callable[[Sequence[str]], list[int]]:
    from tokenizers import Tokenizer

    parsed = Tokenizer.from_str(tokenizer)
    return lambda texts: [len(e.ids) for e in parsed.encode_batch_fast(list(texts), add_special_tokens=False)]
