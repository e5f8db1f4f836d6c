"""What a form of samples is: how data is split, encoded, kept on disk, opened, and counted before it is encoded.

The rest of the room asks the form of a spec's task for all of that, and knows no form by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from orchestrator.data.held_out import Account, Unit
from orchestrator.data.layouts import Layout
from orchestrator.data.sources import Source
from orchestrator.data.splits import Split
from orchestrator.samples import base_tokenizer
from orchestrator.samples.batches import Samples
from orchestrator.samples.forms.data_figures import DataLook
from orchestrator.samples.masking import Masking
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.spec import RunSpec
from orchestrator.tasks.names import FormName

T = TypeVar("T")
E = TypeVar("E")


class EncodeMany(Protocol):
    """Applies a pure function to chunks of text and gives the results in order; knows where to run it."""

    def __call__(self, function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        """Takes chunks only as fast as results are taken."""
        ...


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known of a spec's data before any text is read."""

    spec: RunSpec
    """With the columns named that it leaves open."""
    notes: tuple[str, ...]
    """What was taken for granted of the data, a sentence each."""
    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    location: str | None
    """Of the tokenizer, if it is not trained on the corpus."""
    tokenizer: TextTokenizer | None
    """None until it is trained on the corpus."""
    classes: tuple[str, ...] | None = None
    """Those of the model that is measured; None where a model learns those of the data."""
    is_exact: bool
    """Whether its ids are known to be those of `AutoTokenizer`."""
    layout: Layout | None = None
    """Of conversations."""

    @property
    def asked(self) -> float | None:
        """The share to hold out; None where the held-out data is given, or limits keep another share."""
        data = self.spec.data
        given = self.validation or data.max_train_examples or data.max_validation_examples
        return None if given else data.validation_fraction

    @property
    def columns(self) -> dict[str, str]:
        """The columns in use, by what they hold: `text` and `label`, or `conversation`; none where files are
        documents."""
        data = self.spec.data
        if self.layout is not None:
            return {"conversation": ", ".join(self.layout.fields)}
        tables = any(source.reader != "text" for source in self.train or self.validation)
        named = {"text": data.text_column if tables else None, "label": data.label_column}
        return {holds: column for holds, column in named.items() if column is not None}

    @property
    def given_tokenizer(self) -> TextTokenizer:
        """That of the base, for a form whose tasks adapt one."""
        assert self.tokenizer is not None, "a base model has a tokenizer"
        return self.tokenizer

    def check_ids(self, texts: Iterable[str]) -> None:
        """Raises ModelError where a sample of the texts to train on gets other ids than transformers gives it."""
        if self.tokenizer is not None and self.location is not None:
            base_tokenizer.check_sample(self.tokenizer, self.location, texts)


class SampleForm(ABC, Generic[E]):
    """How examples of one kind become samples; `E` is what `split` gives. Each has one object."""

    name: ClassVar[FormName]
    unit: ClassVar[Unit]
    """What an example is, as it is counted and held out."""

    def own_tokenizer(self, spec: RunSpec, tokenizer: TextTokenizer) -> tuple[TextTokenizer, str | None]:
        """(a base's tokenizer as samples are made with it, what was taken for granted). Raises ModelError."""
        return tokenizer, None

    def check_tokenizer(self, spec: RunSpec, tokenizer: TextTokenizer) -> None:
        """Raises ModelError when a tokenizer lacks what samples are made with; any will do unless a form needs more."""

    @abstractmethod
    def split(self, inputs: Inputs) -> E:
        """The examples to train on and those held out. Raises DataError when the data does not hold any."""

    @abstractmethod
    def write(
        self, inputs: Inputs, examples: E, folder: Path, encode: EncodeMany, pause: Callable[[], None]
    ) -> tuple[TextTokenizer, dict[str, Any]]:
        """Writes both splits into `folder`; (the tokenizer in use, what `meta.json` says beside what every form has).

        The latter holds for each split `SPLIT_samples` and `SPLIT_tokens`, `label_names` (None without classes), what
        `accounted` gives, and what `open` and `shapes` need. `pause` is called while a tokenizer is trained.
        Raises DataError for data too short for one sample, ModelError for an unusable tokenizer.
        """

    @abstractmethod
    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> Samples:
        """A split in the folder that was written, without reading its tokens. `masking` is for forms that hide some.

        Raises OSError when a file is gone.
        """

    @abstractmethod
    def shapes(self, path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
        """What `DatasetCounts` says of the lengths of samples that were written: for a form in `PACKED` the
        `left_over_tokens`, for any other `columns` and `longest`."""

    @abstractmethod
    def look(self, inputs: Inputs, examples: E) -> DataLook:
        """What `write` would find, from a sample of the text where there is much."""

    def class_sizes(self, path: Path, names: Sequence[str] | None) -> dict[str, int] | None:
        """Examples of each class to train on in the folder that was written; None for a form without classes."""
        return None

    def train_tokenizer(self, spec: RunSpec, examples: E, *, most_bytes: int) -> TextTokenizer:
        """A tokenizer of the examples to train on: all, or so many drawn by the seed as it takes."""
        raise AssertionError(f"{self.name}: tasks that adapt a base have its tokenizer")

    def accounted(self, account: Account, inputs: Inputs, notes: Sequence[str]) -> dict[str, Any]:
        """What `meta.json` says of the text of both splits."""
        return {
            "train_examples": account.training_count,
            "train_bytes": account.training_bytes,
            "validation_bytes": account.held_bytes,
            "held_out": account.result(self.unit, asked=inputs.asked, notes=notes).to_dict(),
        }
