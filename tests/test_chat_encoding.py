"""What an assistant said is told token by token, for templates with generation marks and without."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer
from orchestrator.samples.chat_encoding import ChatEncoding, EncodedChats, encode_chats
from orchestrator.samples.chat_templates import FILE, NAMED, ChatTemplate, rendered, template_of, with_template
from orchestrator.samples.tokenization import Chunk, TextTokenizer

pytestmark = pytest.mark.slow  # transformers

SYSTEM = {"role": "system", "content": "Answer in one word."}
TWO = [
    SYSTEM,
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": " Lima.\nThat is all "},
]
MARKED = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""ChatML with the marks that transformers' own mask of the assistant's tokens needs."""
FORGETS_REASONING = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' }}
{%- if message['role'] == 'assistant' and not loop.last -%}{{ message['content'].split('</think>')[-1] + eos_token }}
{%- else -%}{{ message['content'] + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
"""Shows the reasoning of the last answer alone, as Qwen3's does."""


@functools.cache
def tokenizer_folder() -> Path:
    """A byte-level BPE with ChatML's marks and no template of its own, as a base has one."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [turn["content"] for turn in TWO] * 4
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(texts, vocab_size=400, min_frequency=2, special_tokens=marks, show_progress=False)
    folder = locations.home() / "chat-tokenizer"
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=marks[0], pad_token=marks[0])
    fast.save_pretrained(folder)
    return folder


def tokenizer(template: str | None = None) -> TextTokenizer:
    found = base_tokenizer.load_tokenizer(str(tokenizer_folder()))
    if template is None or template in NAMED:
        return with_template(found, template, location="base")[0]
    from dataclasses import replace

    return replace(found, files={**found.files, FILE: template.encode()})


def encoded(turns: list[dict[str, Any]], template: str | None, *, length: int = 512, too_long: Any = "cut"):  # type: ignore[no-untyped-def]
    own = tokenizer(template)
    encoding = ChatEncoding(
        template=template_of(own, location="base"),
        tokenizer=own.encoder,
        vocab_size=own.vocab_size,
        special_ids=own.special_ids,
        length=length,
        too_long=too_long,
    )
    return encode_chats(Chunk(texts=(json.dumps(turns),), ends=(True,)), encoding=encoding)


def spoken(found: EncodedChats) -> list[str]:
    """What is counted, a text for each run of tokens that is."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer_folder())
    runs: list[list[int]] = [[]]
    for token, counts in zip(found.tokens.tolist(), found.spoken.tolist(), strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [own.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "end"),
    [("zephyr", "<|endoftext|>"), ("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>"), (MARKED, "<|im_end|>")],
)
def test_the_answers_and_what_ends_them_are_counted_and_nothing_else(template: str, end: str) -> None:
    found = encoded(TWO, template)
    assert spoken(found) == [f"Paris.{end}", f" Lima.\nThat is all {end}"]
    assert found.ends == {["<|endoftext|>", "<|im_start|>", "<|im_end|>"].index(end)}


def test_ids_and_mask_are_those_of_transformers_for_a_template_with_generation_marks() -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer_folder())
    asked = {"return_dict": True, "return_assistant_tokens_mask": True, "tokenize": True}
    expected = own.apply_chat_template(TWO, chat_template=MARKED, **asked)
    found = encoded(TWO, MARKED)
    assert found.tokens.tolist() == expected["input_ids"]
    assert found.spoken.tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("template", sorted(NAMED))
def test_ids_are_those_that_the_saved_model_gives_the_conversation(template: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer(template).save(tmp_path / "saved")
    own = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert encoded(TWO, template).tokens.tolist() == own.apply_chat_template(TWO)["input_ids"]


def test_a_template_that_shows_earlier_answers_otherwise_gives_a_sample_for_each() -> None:
    turns = [
        {"role": "user", "content": "And of Peru?"},
        {"role": "assistant", "content": "<think>hm</think>Lima."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "<think>well</think>Paris."},
    ]
    found = encoded(turns, FORGETS_REASONING)
    assert len(found.lengths) == 2
    assert spoken(found) == ["<think>hm</think>Lima.<|endoftext|>", "<think>well</think>Paris.<|endoftext|>"]
    template = ChatTemplate(text=FORGETS_REASONING, special=(("eos_token", "<|endoftext|>"),))
    texts = [one.text for one in rendered(turns, template)]
    assert "hm" in texts[0]
    assert "hm" not in texts[1], "as the model is shown it when it answers the second question"


def test_what_is_too_long_is_cut_left_out_or_refused_by_choice() -> None:
    whole = encoded(TWO, "zephyr")
    first = int(whole.spoken.argmax())
    cut = encoded(TWO, "zephyr", length=first + 2)
    assert (cut.cut, cut.lengths.tolist(), spoken(cut)[0]) == (1, [first + 2], "Paris."[: len(spoken(cut)[0])])
    gone = encoded(TWO, "zephyr", length=first)
    assert (gone.cut, gone.left_out, len(gone.lengths)) == (0, 1, 0), "no answer is left in it"
    assert encoded(TWO, "zephyr", length=first + 2, too_long="leave-out").left_out == 1
    refused = encoded(TWO, "zephyr", length=first + 2, too_long="refuse")
    assert refused.problem is not None
    assert "longer than data.sequence_length" in str(refused.problem[1])


def test_a_template_that_refuses_a_conversation_says_so_with_its_number() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    found = encoded(TWO, strict)
    assert found.problem is not None
    number, error = found.problem
    assert (number, "roles must alternate" in str(error)) == (0, True)


def test_a_base_without_a_template_gets_one_and_it_is_said() -> None:
    found, note = with_template(base_tokenizer.load_tokenizer(str(tokenizer_folder())), None, location="base")
    assert found.files[FILE].decode() == NAMED["zephyr"]
    assert note == "chat template: zephyr, since the base has none; data.chat_template names another"
    assert with_template(found, None, location="base") == (found, None), "its own is kept"


def test_a_template_that_is_not_there_or_no_jinja_is_refused(tmp_path: Path) -> None:
    own = base_tokenizer.load_tokenizer(str(tokenizer_folder()))
    with pytest.raises(ModelError, match="no such chat template"):
        with_template(own, "vicunya", location="base")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(ModelError, match="cannot be read"):
        with_template(own, str(tmp_path / "latin.jinja"), location="base")
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    with pytest.raises(ModelError, match="no valid Jinja"):
        with_template(own, str(tmp_path / "broken.jinja"), location="base")


def test_chatml_needs_its_marks_in_the_vocabulary() -> None:
    from dataclasses import replace

    own = base_tokenizer.load_tokenizer(str(tokenizer_folder()))
    plain = replace(own, json=own.json.replace("<|im_end|>", "<|im_gone|>"))
    with pytest.raises(ModelError, match="no tokens for ChatML's marks"):
        with_template(plain, "chatml", location="base")
