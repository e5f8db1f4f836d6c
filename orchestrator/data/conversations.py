"""Sources -> conversations: chats, instructions and prompts with their answers, in one form. Called by `splits`.

A conversation travels as JSON text, a list of `{"role": ..., "content": ...}`, so that it is counted, compared and
encoded like any other text. Only the sizes are in memory: conversations are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.data.layouts import ROLES, WORDS, Layout
from orchestrator.data.sources import Source
from orchestrator.data.tables import Table
from orchestrator.errors import DataError
from orchestrator.spec_data import IncompleteRows

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_ROLE_OF = {
    **dict.fromkeys(("user", "human", "prompter", "instruction", "usr"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "agent"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Roles by the names in use: OpenAI's, ShareGPT's, Open Assistant's and others'."""
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What a turn may say besides, which templates know."""

Turn = dict[str, Any]


class Unusable(Exception):
    """A row that is not learnt from."""


class _Incomplete(Unusable):
    """A row from which nothing can be learnt; says why."""


class _Wrong(Unusable):
    """A row that is no conversation: what it has, and what would be one."""

    def __init__(self, got: str, allowed: str) -> None:
        super().__init__(got)
        self.got, self.allowed = got, allowed


class Conversations:
    """The conversations of all sources in one numbering."""

    def __init__(self, sources: Sequence[Source], layout: Layout, *, incomplete: IncompleteRows) -> None:
        """Reads all of them once. Raises DataError for a row that is no conversation, with its place; for one without
        an answer only where such are not to be left out; and where there are none."""
        self._layout, self._tables = layout, [Table(source) for source in sources]
        self._rows: list[np.ndarray] = []
        """Of each table, the numbers of the rows that are conversations."""
        self._places: list[list[tuple[object, int]]] = []
        """Of each table, its files, and how many rows lie before each."""
        sizes: list[int] = []
        notes: list[str] = []
        for table in self._tables:
            found, left_out = self._counted(table, incomplete, sizes)
            notes += [*table.notes, *left_out]
            self._rows.append(np.array(found, dtype=np.int64))
        self.sizes = np.array(sizes, dtype=np.int64)
        """UTF-8 bytes of what is said in each."""
        self.notes = tuple(notes)
        """What a reader of the files may not expect, a sentence each."""
        if not sizes:
            names = ", ".join(dict.fromkeys(source.location for source in sources))
            raise DataError(f"{names} holds no conversation", do="check data.train and data.validation")

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        """The chosen ones as JSON, in ascending order of their numbers."""
        chosen, before = np.sort(chosen), 0
        for table, rows in zip(self._tables, self._rows, strict=True):
            mine = rows[chosen[(chosen >= before) & (chosen < before + len(rows))] - before]
            before += len(rows)
            wanted = iter(mine.tolist())
            following = next(wanted, None)
            for number, (_, row) in enumerate(table.rows(self._layout.fields)):
                if following is None:
                    break
                if number == following:
                    yield as_json(conversation(row, self._layout))
                    following = next(wanted, None)

    def place(self, number: int) -> str:
        """Where a conversation stands: a file, and its row from 1."""
        for rows, places in zip(self._rows, self._places, strict=True):
            if number < len(rows):
                row = int(rows[number])
                file, first = max((place for place in places if place[1] <= row), key=lambda place: place[1])
                return f"{file}, row {row - first + 1:,}"
            number -= len(rows)
        raise IndexError(number)

    def _counted(self, table: Table, incomplete: IncompleteRows, sizes: list[int]) -> tuple[list[int], list[str]]:
        """(numbers of the rows of a table that are conversations, what was left out); adds to `sizes`."""
        found: list[int] = []
        places: list[tuple[object, int]] = []
        without: list[str] = []
        total = 0
        for number, (file, row) in enumerate(table.rows(self._layout.fields)):
            total = number + 1
            if not places or places[-1][0] != file:
                places.append((file, number))
            place = f"{file}, row {number - places[-1][1] + 1:,}"
            try:
                size = len(_words(conversation(row, self._layout)).encode())
            except UnicodeEncodeError as error:
                raise DataError(f"{place} has half of a surrogate pair", do="write the file anew") from error
            except _Incomplete as error:
                without.append(f"{place}: {error}")
                if incomplete == "refuse":
                    raise _refused(without[0]) from error
                continue
            except _Wrong as error:
                raise DataError(
                    f"{place} is no conversation", got=error.got, allowed=error.allowed, do="correct or remove this row"
                ) from error
            found.append(number)
            sizes.append(size)
        self._places.append(places)
        if not without:
            return found, []
        return found, [
            f"{len(without):,} of {total:,} rows of {table.source.location} have nothing to learn from and are left "
            f"out; the first is {without[0]}"
        ]


def conversation(row: Mapping[str, Any], layout: Layout) -> list[Turn]:
    """The turns of a row, up to the last one of the assistant. Raises Unusable."""
    turns: list[Turn] = []
    if layout.answer is None:
        for name in layout.fields:
            turns += _turns(row.get(name), name)
    else:
        asked = [name for name in layout.fields if name not in (SYSTEM, layout.answer)]
        if (system := _plain(row.get(SYSTEM), SYSTEM)) is not None and SYSTEM in layout.fields:
            turns.append({"role": SYSTEM, "content": system})
        if any(isinstance(row.get(name), list) for name in asked):
            for name in asked:
                turns += _turns(row.get(name), name, may_alternate=False)
        else:
            parts = [part for name in asked if (part := _plain(row.get(name), name)) is not None]
            if not parts:
                raise _Incomplete(f"nothing in {' or '.join(asked)}")
            turns.append({"role": USER, "content": "\n\n".join(parts)})
        answer = row.get(layout.answer)
        if isinstance(answer, list):
            turns += _turns(answer, layout.answer, may_alternate=False)
        elif (said := _plain(answer, layout.answer)) is not None:
            turns.append({"role": ASSISTANT, "content": said})
        else:
            raise _Incomplete(f"nothing in {layout.answer}")
    last = max((place for place, turn in enumerate(turns) if _says_something(turn)), default=0)
    if last == 0:
        raise _Incomplete("no answer of an assistant")
    return turns[: last + 1]


def _says_something(turn: Turn) -> bool:
    return turn["role"] == ASSISTANT and bool(turn["content"].strip() or turn.get("tool_calls"))


def _turns(value: Any, name: str, *, may_alternate: bool = True) -> Iterator[Turn]:
    """Those of a list of them; strings are said by user and assistant in turn, where that is what they may be."""
    if value is None or value == []:
        return
    if isinstance(value, str) and name == SYSTEM:
        yield {"role": SYSTEM, "content": value}
        return
    if isinstance(value, str) and value.lstrip().startswith("["):  # as csv keeps them
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _Wrong(f"{name}: {value[:60]!r} ({error})", "a list of turns as JSON") from error
    if not isinstance(value, list):
        raise _Wrong(f"{name}: {value!r:.60}", 'a list of turns such as {"role": "user", "content": "..."}')
    for number, turn in enumerate(value):
        if isinstance(turn, str):
            if not may_alternate:
                raise _Wrong(f"several strings in {name}: {value!r:.60}", "one string, or turns that are objects")
            yield {"role": (USER, ASSISTANT)[number % 2], "content": turn}
            continue
        if not isinstance(turn, Mapping):
            raise _Wrong(f"turn {number + 1} of {name}: {turn!r:.60}", "turns that are objects or strings")
        yield _turn(turn, f"turn {number + 1} of {name}")


def _turn(turn: Mapping[str, Any], where: str) -> Turn:
    key = next((key for key in ROLES if turn.get(key) is not None), None)
    if key is None:
        raise _Wrong(f"{where} says no speaker: {dict(turn)!r:.60}", f"one of {', '.join(ROLES)}")
    role = _ROLE_OF.get(str(turn[key]).strip().lower())
    if role is None:
        raise _Wrong(f"{where} is by {turn[key]!r:.40}", ", ".join(_ROLE_OF))
    content = next((turn[key] for key in WORDS if turn.get(key) is not None), None)
    if isinstance(content, list):  # parts, as OpenAI has them for texts with pictures
        others = [part for part in content if not isinstance(part, Mapping) or part.get("type", "text") != "text"]
        if others:
            raise _Wrong(f"{where} holds {others[0]!r:.60}", "text")
        content = "\n".join(str(part.get("text", "")) for part in content)
    if content is not None and not isinstance(content, str):
        raise _Wrong(f"{where} has the content {content!r:.60}", "a string")
    kept = {name: turn[name] for name in _KEPT if turn.get(name) not in (None, [], "")}
    if content is None and "tool_calls" not in kept:
        raise _Wrong(f"{where} has nothing that is said", f"a string in one of {', '.join(WORDS)}")
    return {"role": role, "content": content or "", **kept}


def _plain(value: Any, name: str) -> str | None:
    """The text of a column; None where there is none."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, list | Mapping):
        raise _Wrong(f"{name}: {value!r:.60}", "text")
    text = str(value)
    return None if not text or text.isspace() else text


def as_json(turns: Sequence[Turn]) -> str:
    """A conversation as the text that stands for it."""
    return json.dumps(turns, ensure_ascii=False)


def said(text: str) -> str:
    """All that is said in a conversation that stands as JSON, without its roles, a line for each turn."""
    return _words(json.loads(text))


def _words(turns: Sequence[Turn]) -> str:
    return "\n".join(turn["content"] for turn in turns)


def _refused(first: str) -> DataError:
    return DataError(
        "a row has nothing to learn from",
        got=first,
        do="complete or remove such rows, or train on the others alone with data.incomplete_rows=leave-out",
    )
