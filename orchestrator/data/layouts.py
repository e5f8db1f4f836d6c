"""Tables that are no text with a class: instructions, chats, preferences, pairs, tagged tokens. Recognised; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Purpose = Literal["answers", "preferences", "pairs", "tags"]

CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat")
"""Usual names of a column of turns: OpenAI's, ShareGPT's, and others' in use on the hub."""
ROLES, WORDS = ("role", "from", "speaker", "author"), ("content", "value", "text", "utterance")
"""Usual names, in a turn, of who speaks and of what is said."""
_PROMPTS = ("prompt", "question", "query", "input", "inputs", "source", "document", "article", "problem", "statement")
_CONTEXTS = ("context", "passage", "input", "inputs", "system")
_ANSWERS = (
    "output",
    "response",
    "completion",
    "answer",
    "answers",
    "target",
    "targets",
    "summary",
    "highlights",
    "reply",
)
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("anchor", "positive"),
)
_TAGS = ("ner_tags", "pos_tags", "chunk_tags", "tags", "labels")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a table was made for, where that is more than one text and its class."""

    title: str
    """Such as `instructions with answers`."""
    purpose: Purpose
    fields: tuple[str, ...]
    """Columns that hold its text, in reading order."""
    answer: str | None = None
    """The last of them, where that is the answer to the others."""
    has_turns: bool = False
    """Whether the last of them holds a list of turns."""
    plain: str | None = None
    """The first of them that holds strings, whose raw text alone could be trained on."""

    def __str__(self) -> str:
        return f"{self.title}: {', '.join(self.fields)}"

    @property
    def is_conversation(self) -> bool:
        """Whether each row is what was asked, and what was answered."""
        return self.has_turns or self.answer is not None

    def text(self, row: Mapping[str, object]) -> str:
        """All text of a row, prompt and answer, a line each; roles of a chat are no text."""
        return "\n".join(part for name in self.fields for part in _strings(row.get(name)))


def recognise(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> Layout | None:
    """The layout of a table by the names of its columns and its first rows, or None."""
    found = _recognised(names, rows)
    if found is None:
        return None
    plain = (name for name in found.fields if any(isinstance(row.get(name), str) for row in rows))
    return replace(found, plain=next(plain, None))


def _recognised(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> Layout | None:
    by_name = {name.strip().lower(): name for name in reversed(names)}

    def found(*wanted: str) -> tuple[str, ...]:
        return tuple(by_name[name] for name in wanted if name in by_name)

    if chats := [name for name in found(*CHATS) if any(_is_chat(row.get(name)) for row in rows)]:
        return Layout(
            title="chats", purpose="answers", fields=(*_without(chats, found("system")), chats[0]), has_turns=True
        )
    if (pairs := found("translation", "translations")) and any(isinstance(row.get(pairs[0]), Mapping) for row in rows):
        return Layout(title="texts with their translations", purpose="answers", fields=(pairs[0],))
    if found("chosen", "rejected")[1:]:
        fields = (*found("prompt", "question", "instruction", "input"), *found("chosen", "rejected"))
        return Layout(title="answers that are preferred to others", purpose="preferences", fields=fields)
    answers = found(*_ANSWERS)
    if found("instruction") and answers:
        return Layout(
            title="instructions with answers",
            purpose="answers",
            fields=(*found("instruction"), *_without(answers, found(*_CONTEXTS)), answers[0]),
            answer=answers[0],
        )
    if (prompts := _without(answers, found(*_PROMPTS))) and answers and _all_text((prompts[0], answers[0]), rows):
        fields = (*_without((*answers, prompts[0]), found(*_CONTEXTS)), prompts[0], answers[0])
        return Layout(title="prompts with answers", purpose="answers", fields=fields, answer=answers[0])
    for pair in _PAIRS:
        if len(fields := found(*pair)) == len(pair):
            return Layout(title="pairs of texts", purpose="pairs", fields=fields)
    tags = [name for name in found(*_TAGS) if any(isinstance(row.get(name), list) for row in rows)]
    if tags and (words := found("tokens", "words")):
        return Layout(title="tokens with a tag each", purpose="tags", fields=(words[0], tags[0]))
    return None


def _without(left_out: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


def _is_chat(value: object) -> bool:
    """Whether a value is a list of turns: objects with a speaker and words, or strings."""
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(turn, str)
        or (isinstance(turn, Mapping) and any(key in turn for key in ROLES) and any(key in turn for key in WORDS))
        for turn in value
    )


def _all_text(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> bool:
    """Whether columns hold words; a question with a numbered class is no question with its answer."""

    def wordy(value: object) -> bool:
        return any(any(letter.isalpha() for letter in part) for part in _strings(value))

    filled = [[row.get(name) for row in rows if row.get(name) not in (None, "")] for name in names]
    distinct = [{repr(value) for value in values} for values in filled]
    return all(
        2 * sum(map(wordy, values)) > len(values) and (2 * len(kinds) > len(values) or len(values) < 3)
        for values, kinds in zip(filled, distinct, strict=True)
    )


def _strings(value: object) -> Iterator[str]:
    """Strings in a value, in order; of a turn of a chat its words alone. Numbers are places in a text, or scores."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        words = [value[key] for key in WORDS if key in value] if any(key in value for key in ROLES) else []
        for part in words or value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
