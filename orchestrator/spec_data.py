"""Fields of a spec that say which examples a run trains on and is measured on. `spec` puts them into the `RunSpec`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec_numbers import Count, Samples, Seed
from orchestrator.spec_survival import Block

DataFormat = Literal["auto", "text", "jsonl", "csv", "parquet", "hub"]
IncompleteRows = Literal["refuse", "leave-out"]
TooLong = Literal["cut", "leave-out", "refuse"]
SplitName = Literal["train", "validation", "test"]

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""Names of characters that a shell or YAML would take for something else."""


def as_delimiter(value: object) -> str:
    """The character that a name or a character stands for. Raises ValueError when it cannot separate fields."""
    if isinstance(value, str):
        found = DELIMITERS.get(value, value)
        if len(found) == 1 and found.isascii() and found not in '"\r\n\0':
            return found
    raise ValueError(f"should be {', '.join(DELIMITERS)}, or one character such as ^, but no quote and no line break")


Delimiter = Annotated[str, BeforeValidator(as_delimiter)]


Locations = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""One location or several, each with examples of the same kind."""


class DataSpec(Block):
    """Which examples: local files, folders, globs or hub names."""

    train: Locations
    """File, folder, glob, `package://` or `sysconfig://` location, or hub name; or a list of them."""
    validation: Locations | None = None
    """Held-out data; none given splits off `validation_fraction` of the training data."""
    validation_split: SplitName = "validation"
    """Which split of `validation` is read where names of files, or the hub, tell of several."""
    test: Locations | None = None
    """Data that nothing is chosen by, located like `train`: the model that is left is measured on all of it, once, at
    the end. Its figures are logged as `test/...`."""
    test_split: SplitName = "test"
    """Which split of `test` is read where names of files, or the hub, tell of several."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training data held out when `validation` is not given: of the bytes for language modelling, where a
    document is cut to meet it; of the rows for classification, stratified by label."""
    split_seed: Seed = 0
    """Draws what is held out and what the `max_` fields below keep; `training.seed` does not, so all seeds and all
    trials of a search are measured on the same examples."""
    exclude: tuple[str, ...] = ()
    """Names of files or folders to leave out below a folder or glob (`*` works)."""
    format: DataFormat = "auto"
    """How to read the files; `auto` goes by their endings and reads unknown text files as text."""
    text_column: str | None = None
    """Column that holds the text; none given is the column `text`, or else the one that reads like text. For
    `task: chat` that of the turns, where a usual name does not tell."""
    label_column: str | None = None
    """Column that holds the class, for classification; none given is the one that a usual name or its content tells."""
    delimiter: Delimiter | None = None
    """What separates the fields of csv, tsv and tab files: comma, semicolon, tab, bar, or another character; none given
    is found in each file's first rows."""
    incomplete_rows: IncompleteRows = "refuse"
    """What to do with rows for classification that have nothing in the text or the class column, and with
    conversations in which no assistant says anything."""
    chat_template: str | None = None
    """For `task: chat`, what a conversation looks like as text: `zephyr`, `chatml`, `alpaca`, or a file with a Jinja
    template as transformers has them. None given is the base's own, or `zephyr` where it has none. The model that is
    left has it."""
    too_long: TooLong = "cut"
    """For `task: chat`, what to do with conversations of more than `sequence_length` tokens."""
    sequence_length: Samples = 512
    """Tokens of one sample. For language modelling the block: documents stand one after the other with a separator
    between them, and are cut into blocks that go on over the end of a document; what fills no block at the end of the
    stream is left out. For classification the cut-off: a batch is as wide as its longest row, in multiples of 8. For
    conversations both: as many as fit whole share a block, in which none sees another."""
    max_train_examples: Count | None = None
    """Use at most this many training documents or rows, drawn by `split_seed` (classification: stratified)."""
    max_validation_examples: Count | None = None
    """Use at most this many held-out documents or rows, drawn alike."""


class MeasuredDataSpec(DataSpec):
    """Which examples a model is measured on: all of `validation`, else what a training on `train` holds out."""

    train: str | tuple[str, ...] = ()
    """None where all of `validation` is measured on."""
