from __future__ import annotations

from typing import Any

import pytest

from orchestrator.data.layouts import Layout, recognise

WORDS = "several words of some text"


def layout_of(*rows: dict[str, Any]) -> Layout | None:
    return recognise(list(dict.fromkeys(name for row in rows for name in row)), rows)


RECOGNISED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "alpaca": (
        {"instruction": "Say it.", "input": "", "output": WORDS},
        "instructions with answers",
        ("instruction", "input", "output"),
    ),
    "dolly": (
        {"category": "open", "context": "", "instruction": "Why?", "response": WORDS},
        "instructions with answers",
        ("instruction", "context", "response"),
    ),
    "openai": ({"messages": [{"role": "user", "content": "hi"}]}, "chats", ("messages",)),
    "sharegpt": ({"id": "1", "conversations": [{"from": "human", "value": "hi"}]}, "chats", ("conversations",)),
    "turns": ({"dialog": ["hi", "hello"]}, "chats", ("dialog",)),
    "dpo": (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "answers that are preferred to others",
        ("prompt", "chosen", "rejected"),
    ),
    "hh-rlhf": ({"chosen": "a", "rejected": "b"}, "answers that are preferred to others", ("chosen", "rejected")),
    "completions": ({"prompt": WORDS, "completion": WORDS}, "prompts with answers", ("prompt", "completion")),
    "gsm8k": ({"question": "how many?", "answer": "so #### 3"}, "prompts with answers", ("question", "answer")),
    "squad": (
        {"context": WORDS, "question": "who?", "answers": {"text": ["she"], "answer_start": [3]}},
        "prompts with answers",
        ("context", "question", "answers"),
    ),
    "opus": ({"id": "1", "translation": {"de": "ja", "en": "yes"}}, "texts with their translations", ("translation",)),
    "replies": ({"": 0, "statement": WORDS, "reply": WORDS}, "prompts with answers", ("statement", "reply")),
    "summaries": ({"document": WORDS, "summary": "words"}, "prompts with answers", ("document", "summary")),
    "nli": ({"premise": WORDS, "hypothesis": WORDS, "label": 0}, "pairs of texts", ("premise", "hypothesis")),
    "tags": ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, "tokens with a tag each", ("tokens", "ner_tags")),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_usual_layouts_are_recognised_with_all_their_text(name: str) -> None:
    row, title, fields = RECOGNISED[name]
    found = layout_of(row)
    assert found is not None
    assert (found.title, found.fields) == (title, fields)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": WORDS, "label": "a"}],
        [{"question": f"{WORDS} {number}", "target": str(number % 3)} for number in range(9)],
        [{"query": f"{WORDS} {number}", "target": ("music", "sport")[number % 2]} for number in range(9)],
        [{"messages": "a text that happens to have the name"}],
        [{"tokens": "a text", "tags": "sport"}],
        [{}],
    ],
)
def test_texts_with_a_class_are_no_layout(rows: list[dict[str, Any]]) -> None:
    assert layout_of(*rows) is None


def test_the_text_of_a_row_is_prompt_and_answer_without_roles_and_numbers() -> None:
    row = {"id": 7, "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi there"}]}
    found = layout_of(row)
    assert found is not None
    assert found.text(row) == "hello\nhi there"
    squad = RECOGNISED["squad"][0]
    found = layout_of(squad)
    assert found is not None
    assert found.text(squad) == f"{WORDS}\nwho?\nshe"


def test_a_row_without_an_answer_still_has_its_prompt() -> None:
    found = layout_of(RECOGNISED["alpaca"][0])
    assert found is not None
    assert found.text({"instruction": "Say it.", "input": None}) == "Say it."
