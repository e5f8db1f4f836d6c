"""Chats, instructions and prompts with answers, as files on the hub and elsewhere have them, become one form."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.conversations import Conversations, Unusable, conversation, said
from orchestrator.data.first_look import preview
from orchestrator.data.layouts import Layout, recognise
from orchestrator.data.sources import find_sources
from orchestrator.data.spec_columns import with_columns
from orchestrator.errors import DataError
from tests.specs import PRETRAIN, spec

ASKED = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
CHAT: dict[str, Any] = {"kind": "finetune", "task": "chat", "model": {"base": "base"}}


def jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def conversations(file: Path, **changes: Any) -> list[list[dict[str, Any]]]:
    sources = find_sources(str(file))
    found = with_columns(spec(PRETRAIN, **CHAT, **changes), sources, look=preview)
    assert found.layout is not None
    incomplete = found.spec.data.incomplete_rows
    rows = Conversations(sources, found.layout, incomplete=incomplete)
    return [json.loads(text) for text in rows.read(np.arange(len(rows)))]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": ASKED}, ASKED),
        ({"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]}, ASKED),
        ({"dialog": ["Hello?", "Hi."]}, ASKED),
        ({"instruction": "Hello?", "input": "", "output": "Hi."}, ASKED),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"prompt": "Hello?", "completion": "Hi."}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"system": "Be kind.", "messages": ASKED}, [{"role": "system", "content": "Be kind."}, *ASKED]),
        (
            {"system": "Be kind.", "instruction": "Hello?", "output": "Hi."},
            [{"role": "system", "content": "Be kind."}, *ASKED],
        ),
        ({"messages": [*ASKED, {"role": "user", "content": "Bye"}]}, ASKED),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, ASKED[1]]}, ASKED),
    ],
)
def test_rows_of_every_usual_layout_are_conversations(tmp_path: Path, row: dict[str, Any], turns: object) -> None:
    assert conversations(jsonl(tmp_path / "rows.jsonl", [row])) == [turns]


def test_parquet_and_csv_hold_conversations_too(tmp_path: Path) -> None:
    rows = [{"messages": ASKED}, {"messages": ASKED * 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert conversations(tmp_path / "rows.parquet") == [ASKED, ASKED * 2]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "response"), ("Hello?", "Hi.")])
    assert conversations(tmp_path / "rows.csv") == [ASKED]


def test_a_column_of_turns_with_another_name_is_named(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"talk": ASKED, "id": 1}])
    assert conversations(file, data__text_column="talk") == [ASKED]
    with pytest.raises(DataError, match="no column 'tall'") as caught:
        conversations(file, data__text_column="tall")
    assert "data.text_column=talk" in str(caught.value.do)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}, ASKED[1]]}, "turn 1 of messages is by 'narrator'"),
        ({"messages": [{"role": "user", "content": 3}, ASKED[1]]}, "has the content 3"),
        ({"messages": "Hello?"}, "messages: 'Hello?'"),
        ({"messages": ["Hello?", 3]}, "turn 2 of messages: 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, ASKED[1]]},
            "image_url",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_its_place(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"messages": ASKED}, row])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2 is no conversation") as caught:
        conversations(file)
    assert says in str(caught.value)


def test_several_answers_are_no_conversation(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "He."}, {"question": "Who?", "answer": ["a", "b"]}]
    )
    with pytest.raises(DataError, match="row 2 is no conversation") as caught:
        conversations(file)
    assert "several strings in answer" in str(caught.value.got)


def test_rows_without_an_answer_are_refused_or_left_out_by_choice(tmp_path: Path) -> None:
    rows = [{"messages": ASKED}, {"messages": ASKED[:1]}, {"messages": []}, {"messages": ASKED}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="nothing to learn from") as caught:
        conversations(file)
    assert "row 2: no answer of an assistant" in str(caught.value)
    assert conversations(file, data__incomplete_rows="leave-out") == [ASKED, ASKED]
    layout = recognise(("messages",), rows[:1])
    assert layout is not None
    found = Conversations(find_sources(str(file)), layout, incomplete="leave-out")
    assert found.place(1) == f"{file}, row 4"
    assert "2 of 4 rows" in found.notes[0]


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(width=16)
    | st.sampled_from(["", " ", "a", "[1]", "[", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "tool_calls"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    names=st.sampled_from(
        [("messages",), ("instruction", "input", "output"), ("prompt", "response"), ("system", "chat")]
    ),
    values=st.lists(ANY, min_size=3, max_size=3),
    plain=st.booleans(),
)
def test_whatever_stands_in_a_row_it_is_a_conversation_or_refused(
    names: tuple[str, ...], values: list[Any], plain: bool
) -> None:
    last = {"answer": names[-1]} if plain else {"has_turns": True}
    layout = Layout(title="chats", purpose="answers", fields=names, **last)  # type: ignore[arg-type]
    try:
        turns = conversation(dict(zip(names, values, strict=False)), layout)
    except Unusable:
        return
    assert turns[-1]["role"] == "assistant"
    assert all(isinstance(turn["content"], str) for turn in turns)


def test_sizes_are_those_of_what_is_said() -> None:
    assert said(json.dumps([{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "x"}])) == "Grüße\nx"


def test_tables_of_other_kinds_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("words")
    for file, holds in (
        (jsonl(tmp_path / "pairs.jsonl", [{"premise": "a cat", "hypothesis": "a dog", "label": 1}]), "pairs of texts"),
        (jsonl(tmp_path / "rows.jsonl", [{"body": "a long text", "stars": 3}]), "body, stars"),
        (text, "text"),
    ):
        with pytest.raises(DataError, match="holds no conversations") as caught:
            conversations(file)
        assert holds in str(caught.value.got)
