"""Which column of a table holds the text, and which the class: as the user says, else by name and content. Pure.

`advise` and `run` choose by the same rule; they differ in how their user names another column (`Asking`).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data.column_looks import WORDY, Look, look_at
from orchestrator.data.layouts import Layout, recognise
from orchestrator.errors import DataError
from orchestrator.tasks.names import ANSWERED_CHAT, CONTINUED_TEXT, LABELLED_TEXT, Task
from orchestrator.tasks.registry import advised_task

TEXT_NAMES = (
    *("text", "content", "document", "review", "review_text", "sentence", "body", "comment", "tweet", "message"),
    *("article", "abstract", "utterance", "snippet", "query", "question", "code", "description"),
)
"""Usual names of a text column, the most telling first. The order is a guess."""
LABEL_NAMES = (
    *("label", "labels", "class", "target", "category", "sentiment", "intent", "topic", "label_text", "rating"),
    *("stars", "y"),
)
"""Usual names of a class column, the most telling first. The order is a guess."""
_TEXT_WORDS = frozenset(TEXT_NAMES) - {"query", "question", "code", "description", "abstract", "snippet"}
"""Words in a name that speak for a text, such as `full_text` and `clean_tweet`. A guess."""
_CLASS_WORDS = frozenset(
    (
        *LABEL_NAMES,
        "polarity",
        "emotion",
        "spam",
        "toxic",
        "toxicity",
        "genre",
        "tag",
        "stance",
        "hate",
        "outcome",
        "is",
    )
)
"""Words in a name that speak for a class, such as `is_spam` and `airline_sentiment`. A guess."""
_NEVER_CLASSES = frozenset(
    [
        "id",
        "index",
        "idx",
        "unnamed",
        "row",
        "lang",
        "language",
        "locale",
        "source",
        "split",
        "set",
        "fold",
        "url",
        "file",
        "filename",
        "path",
        "date",
        "time",
        "timestamp",
        "year",
        "month",
        "day",
        "version",
        "license",
    ]
)
"""Words in a name of what is known about a text beside its class. A guess; such a column is taken when it is named."""
USUAL_TEXT = "text"
"""A column of this very name is the text, whatever it holds, unless another is named."""
MAX_CLASSES = 10_000
"""Classes at most, in `advise` and `run` (a guess): a column with more values holds identifiers or free text."""
FEW_CLASSES = 20
"""So many may have one row each; more need two rows each on average. A guess."""
_LONGER_TEXT = 3
"""The longest of several columns of text is the text where it is so many times as long as the next: a mail and its
subject, but not the two sentences of a pair. A guess."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns to read. `text` is None where files are documents, and where the text is that of a layout."""

    text: str | None
    label: str | None
    assumed: tuple[str, ...] = ()
    """What was guessed, a sentence each."""
    layout: Layout | None = None
    """Where a row's text is that of several columns."""

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read."""
        texts = self.layout.fields if self.layout else () if self.text is None else (self.text,)
        return (*texts, *(() if self.label is None else (self.label,)))


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The first rows of a table."""

    location: str
    names: tuple[str, ...]
    """Columns; empty where files are documents."""
    rows: tuple[Mapping[str, object], ...]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a user names columns and the task."""

    text: str
    label: str
    task: str

    def of_text(self, name: str = "NAME") -> str:
        """What names a text column."""
        return self.text.format(shlex.quote(name))

    def of_label(self, name: str = "NAME") -> str:
        """What names a class column."""
        return self.label.format(shlex.quote(name))


OPTIONS = Asking(text="--text-column {}", label="--label-column {}", task="--task {}")
"""To `advise`."""
FIELDS = Asking(text="data.text_column={}", label="data.label_column={}", task="task={}")
"""In a spec, or behind it on the command line."""


def choose_columns(
    preview: Preview,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    task: Task | None = None,
    asking: Asking = OPTIONS,
    takes_answers: bool = False,
) -> Columns:
    """The text and class columns of a table, and in words what was taken for granted.

    A class column is looked for unless the task is language modelling, and required for classification. With
    `takes_answers`, a table of instructions or chats is answered by its layout. Raises DataError when a column that was
    given is not there, when none can be told to be the one, and for a layout that is no text with a class.
    """
    wanted = None if task is None else advised_task(task)
    needs_class = task == LABELLED_TEXT
    if not preview.names:
        return _documents(preview, label_column, task, asking)
    for name, option in ((text_column, asking.of_text), (label_column, asking.of_label)):
        if name is not None and name not in preview.names:
            raise _absent(preview, name, option)
    is_text_named = text_column is not None
    text_column = text_column or usual_text(preview.names, label_column)
    looks = {name: look_at(name, [row.get(name) for row in preview.rows]) for name in preview.names}
    layout = recognise(preview.names, preview.rows)
    if task == ANSWERED_CHAT and (layout is None or not layout.is_conversation):
        raise no_conversations(preview, layout, asking)
    if layout is not None and text_column is None:
        is_answered = layout.purpose in ("answers", "preferences")
        if takes_answers and is_answered and label_column is None and (wanted is None or wanted.generates):
            return Columns(text=None, label=None, layout=layout, assumed=(f"the rows are {layout}",))
        classes = any(look.kind == "classes" for name, look in looks.items() if name not in layout.fields)
        if not is_answered or not (label_column or (needs_class and classes)):
            raise _no_task(preview, layout, asking)
    table = _Table(preview=preview, looks=looks, asking=asking)
    assumed: list[str] = []
    is_raw_text = wanted is not None and wanted.models_language
    if label_column is None and not is_raw_text:
        label_column = _guess_label(table, text_column, needed=needs_class)
        if label_column is not None:
            look = looks[label_column]
            assumed.append(
                f"column {label_column!r} is taken as the class: {look.values} value{'s' * (look.values != 1)} in "
                f"{len(preview.rows)} rows, "
                f"{look.listed()}"
            )
    if text_column is None:
        text_column = _guess_text(table, label_column)
    if not is_text_named:
        assumed.append(f"column {text_column!r} is taken as the text")
    table.refuse_data_as_names(text_column, label_column)
    if assumed:
        assumed[-1] += table.others(text_column, label_column, is_raw_text=is_raw_text)
    return Columns(text=text_column, label=label_column, assumed=tuple(assumed))


def usual_text(names: Sequence[str], label_column: str | None) -> str | None:
    """The text column of a table that has one of the usual name, which is not the class."""
    return USUAL_TEXT if USUAL_TEXT in names and label_column != USUAL_TEXT else None


_NO_CLASS = {
    "fractions": "numbers with a fraction are a score to be predicted, which no task learns yet",
    "lists or objects": "several classes a row are not learnt yet",
}


@dataclass(frozen=True, kw_only=True)
class _Table:
    preview: Preview
    looks: Mapping[str, Look]
    asking: Asking

    def listed(self) -> str:
        """Every column with what it looks like."""
        return "; ".join(str(look) for look in self.looks.values())

    def others(self, text: str, label: str | None, *, is_raw_text: bool) -> str:
        """The columns that are left out, and how to choose another."""
        left = [str(look) for name, look in self.looks.items() if name not in (text, label)]
        if not left:
            return ""
        left += [f"{name!r} is no class: {_NO_CLASS[look.kind]}" for name, look in self._misnamed(text, label)]
        remedy = f"{self.asking.of_label()} to choose another"
        if is_raw_text:
            remedy = f"{self.asking.of_text()} to choose another"
        elif label is None:
            remedy = f"{self.asking.of_label()} if one of them is the class"
        return f"; other columns: {'; '.join(left)}; {remedy}"

    def _misnamed(self, text: str, label: str | None) -> list[tuple[str, Look]]:
        """Columns with the name of a class and other contents, where no class was found."""
        return [
            (name, look)
            for name, look in self.looks.items()
            if label is None and name != text and _plain(name) in LABEL_NAMES and look.kind in _NO_CLASS
        ]

    def refuse_data_as_names(self, text: str, label: str | None) -> None:
        """Raises DataError where the header is a row like the others: what stands in it would be lost."""
        if label is None or len(text.split()) <= WORDY:
            return
        if label.strip() in {str(row.get(label)).strip() for row in self.preview.rows}:
            raise DataError(
                f"{self.preview.location} has no header: its first line is a row like the others",
                got=", ".join(self.preview.names),
                allowed="column names in the first line",
                do="put a line of names before it, such as text and label",
            )


def _documents(preview: Preview, label_column: str | None, task: Task | None, asking: Asking) -> Columns:
    if label_column is not None or task == LABELLED_TEXT:
        raise DataError(
            f"{preview.location} is read as text, which carries no labels",
            got=asking.of_label(label_column) if label_column is not None else asking.task.format(task),
            allowed="jsonl, csv, tsv or parquet files, or a hub dataset",
            do=f"give a table with a text and a class column, or set {asking.task.format(CONTINUED_TEXT)}",
        )
    return Columns(text=None, label=None)


def _guess_label(table: _Table, text_column: str | None, *, needed: bool) -> str | None:
    """The first usually named column whose values can be classes, else the only one that looks like classes.

    Raises DataError when several do, or when one is needed and none does.
    """
    looks = [look for name, look in table.looks.items() if name != text_column]
    named = sorted(
        (look for look in looks if _plain(look.name) in LABEL_NAMES and _can_be_classes(look)),
        key=lambda look: LABEL_NAMES.index(_plain(look.name)),
    )
    if named:
        return named[0].name
    likely = [look for look in looks if look.kind == "classes" and not _words(look.name) & _NEVER_CLASSES]
    likely = [look for look in likely if _plain(look.name) not in TEXT_NAMES] or likely  # short texts that repeat
    telling = [look for look in likely if _words(look.name) & _CLASS_WORDS]
    if len(telling) == 1 and all(look is telling[0] or not _alike(look, telling[0]) for look in likely):
        likely = telling
    if len(likely) == 1:
        return likely[0].name
    if likely or needed:
        many = len(telling) > 1 and not all(_alike(look, telling[0]) for look in likely)
        raise _unclear_label(table, telling if many else likely)
    return None


def _alike(one: Look, other: Look) -> bool:
    """Whether two columns hold the same yes and no, as the labels of a text that may have several at once."""
    return one.values == other.values == 2 and set(one.commonest) == set(other.commonest)


def _unclear_label(table: _Table, found: Sequence[Look]) -> DataError:
    asking, location = table.asking, table.preview.location
    if len(found) > 1:
        binary = all(look.values == 2 for look in found)
        return DataError(
            f"{location} has {len(found)} columns that may be the class",
            got=table.listed(),
            allowed="one class a row" + ("; several yes-or-no labels are as many trainings" if binary else ""),
            do=f"name the class with {asking.of_label(found[0].name)} (or another of "
            f"{', '.join(look.name for look in found[1:4])}), or set {asking.task.format(CONTINUED_TEXT)} for raw text",
        )
    return DataError(
        f"{location} has no column that is plainly the class",
        got=table.listed(),
        allowed=f"a column named {', '.join(LABEL_NAMES[:6])} or the like, or one of few values that repeat",
        do=f"name the column with {asking.of_label()}, or set {asking.task.format(CONTINUED_TEXT)} for raw text",
    )


def _can_be_classes(look: Look) -> bool:
    """Whether a column with a usual name can be the class. Small tables may have few rows of each class."""
    if look.kind in ("short text", "identifiers", "numbers"):
        return repeats_enough(look.values, look.rows)
    return look.kind in ("classes", "one value", "empty")


def repeats_enough(values: int, rows: int) -> bool:
    """Whether so many distinct values in so many rows can be classes that were named as such."""
    return values <= FEW_CLASSES or 2 * values <= rows


def _guess_text(table: _Table, label_column: str | None) -> str:
    """The usually named column of strings, else the only one that reads like text, by a telling name or by far the
    longest of several."""
    looks = [look for name, look in table.looks.items() if name != label_column and look.kind != "empty"]
    named = [look for look in looks if _plain(look.name) in TEXT_NAMES and _holds_strings(table, look.name)]
    if named:
        return min(named, key=lambda look: TEXT_NAMES.index(_plain(look.name))).name
    wordy = sorted((look for look in looks if look.kind == "text"), key=lambda look: -look.characters)
    told = [look for look in wordy if _words(look.name) & _TEXT_WORDS]
    if len(told) == 1:
        return told[0].name
    if wordy and (len(wordy) == 1 or wordy[0].characters >= _LONGER_TEXT * wordy[1].characters):
        return wordy[0].name
    short = [look for look in looks if look.kind == "short text"]
    if not wordy and len(short) == 1:
        return short[0].name
    raise DataError(
        f"{table.preview.location} has no column that is plainly the text",
        got=table.listed(),
        allowed=f"a column named {', '.join(TEXT_NAMES[:6])} or the like, or a single column of words",
        do=_name_the_text(table, wordy),
    )


def _name_the_text(table: _Table, wordy: Sequence[Look]) -> str:
    kinds = {look.kind for look in table.looks.values()}
    if "lists or objects" in kinds and not kinds & {"text", "short text", "classes"}:
        return "write what is inside of its lists or objects as columns of their own"
    return "name the column with " + (table.asking.of_text(wordy[0].name) if wordy else table.asking.of_text())


def _holds_strings(table: _Table, name: str) -> bool:
    return any(isinstance(row.get(name), str) for row in table.preview.rows)


def _plain(name: str) -> str:
    return name.strip().lower()


def _words(name: str) -> set[str]:
    """`is_spam`, `isSpam` and `Is Spam` are the words is and spam."""
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()))


def _absent(preview: Preview, name: str, option: Callable[[str], str]) -> DataError:
    near = difflib.get_close_matches(name, preview.names, n=1, cutoff=0.4)
    return DataError(
        f"{preview.location} has no column {name!r}",
        got=option(name),
        allowed=", ".join(preview.names),
        do=f"did you mean {option(near[0])}?" if near else "name one of these",
    )


def no_conversations(preview: Preview, layout: Layout | None, asking: Asking, *, named: str | None = None) -> DataError:
    """The error where a table holds no conversations, or the column that was `named` is not there."""
    if named is not None and preview.names:
        return _absent(preview, named, asking.of_text)
    holds = (
        layout.title if layout is not None else f"the columns {', '.join(preview.names)}" if preview.names else "text"
    )
    return DataError(
        f"{preview.location} holds no conversations that {asking.task.format(ANSWERED_CHAT)} could learn from",
        got=holds,
        allowed="a column messages or conversations with turns, instruction (and input) with output, or prompt with "
        "completion or response, in jsonl, csv, tsv or parquet files or a hub dataset",
        do=f"name the columns so, or set {asking.task.format(CONTINUED_TEXT)} for raw text",
    )


def _no_task(preview: Preview, layout: Layout, asking: Asking) -> DataError:
    """What a table is, and what can be done with it today."""
    column, raw = layout.plain or layout.fields[0], ""
    if layout.plain is not None:
        raw = f", or train the raw text of one column alone with {asking.of_text(column)} and "
        raw += asking.task.format(CONTINUED_TEXT)
    remedy = {
        "answers": f"set {asking.task.format(ANSWERED_CHAT)}{raw}"
        if layout.is_conversation
        else f"write prompt and answer into one column `text` for {asking.task.format(CONTINUED_TEXT)}{raw}",
        "preferences": f"write prompt and chosen answer into one column `text`{raw}",
        "pairs": f"write both texts into one column `text` beside the class, or name one of them: "
        f"{asking.of_text(column)}",
        "tags": "a class for every token is not trained yet; a class for the whole row needs a column `text`",
    }[layout.purpose]
    return DataError(
        f"{preview.location} holds {layout.title}, which "
        + ("another task reads" if layout.is_conversation else "no task reads yet"),
        got=f"{', '.join(layout.fields)}, of {', '.join(preview.names)}",
        allowed="one column of raw text, or one of text and one of its class",
        do=remedy,
    )
