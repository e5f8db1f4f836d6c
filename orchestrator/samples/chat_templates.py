"""What a conversation looks like as text: the base's own template, one of those here, or a user's. Pure but for files.

Templates are transformers' Jinja, which renders them in a sandbox.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError, ModelError, one_line
from orchestrator.samples.tokenization import SPECIAL, TextTokenizer, read_object, text_of

FILE = "chat_template.jinja"
"""Where transformers keeps a tokenizer's template."""

_ZEPHYR = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- else -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
NAMED = {"zephyr": _ZEPHYR, "chatml": _CHATML, "alpaca": _ALPACA}
"""Templates by the names that a spec may give. The forms are those of HuggingFaceH4's Zephyr (2023), OpenAI's ChatML
(2023) and Stanford's Alpaca (2023); the first and the last end a turn by the base's own end-of-text token, so that they
suit any vocabulary."""
_USUAL = "zephyr"
_MARKS_OF_CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the special tokens that it may name."""

    text: str
    special: tuple[tuple[str, str], ...]

    def render(self, turns: Sequence[Mapping[str, Any]], *, asks: bool = False) -> str:
        """Turns as text; `asks` adds what stands before an answer. Raises DataError where the template refuses them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (found,), _ = render_jinja_template(
                [list(turns)], chat_template=self.text, add_generation_prompt=asks, **dict(self.special)
            )
        except Exception as error:  # jinja2's, and whatever a template raises
            raise DataError("the chat template does not take a conversation", got=one_line(error)) from error
        return str(found)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A text to learn from, and where in it an assistant speaks: from and up to which characters."""

    text: str
    spoken: tuple[tuple[int, int], ...]


def rendered(turns: Sequence[Mapping[str, Any]], template: ChatTemplate) -> Iterator[Rendered]:
    """A conversation as text; one text for each answer where the template shows earlier turns otherwise later on, as
    those do that drop an answer's reasoning once the next question is asked.

    An answer is what follows the prompt that a model would be given, so no marks are needed in the template. Raises
    DataError where the template refuses the turns.
    """
    whole = template.render(turns)
    answers: list[tuple[str, int]] = []
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant" and place:
            prompt, upto = template.render(turns[:place], asks=True), template.render(turns[: place + 1])
            answers.append((upto, _in_common(prompt, upto)))
    if all(whole.startswith(upto) for upto, _ in answers):
        yield Rendered(text=whole, spoken=tuple((begin, len(upto)) for upto, begin in answers))
        return
    for upto, begin in answers:
        yield Rendered(text=upto, spoken=((begin, len(upto)),))


def _in_common(one: str, other: str) -> int:
    """Characters with which both begin."""
    if other.startswith(one):
        return len(one)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def with_template(tokenizer: TextTokenizer, wanted: str | None, *, location: str) -> tuple[TextTokenizer, str | None]:
    """(the tokenizer with the template that a spec asks for among its files, what was taken for granted).

    Raises ModelError for one that is not there, that Jinja cannot parse, or whose marks the vocabulary lacks.
    """
    own = _own(tokenizer, location)
    if wanted is None and own is not None:
        return tokenizer, None
    name = wanted or _USUAL
    text = NAMED.get(name)
    if text is None:
        text = _read(name)
    if "eos_token" in text and "eos_token" not in dict(_special(tokenizer, location)):
        raise ModelError(
            f"the chat template {name} ends turns by the end-of-text token, and the tokenizer names none",
            got=location,
            do="set data.chat_template to a file with a template for this tokenizer",
        )
    if name == "chatml":
        _require_marks(tokenizer, location)
    _parsed(text, name)
    note = None if wanted else f"chat template: {_USUAL}, since the base has none; data.chat_template names another"
    return replace(tokenizer, files={**tokenizer.files, FILE: text.encode()}), note


def template_of(tokenizer: TextTokenizer, *, location: str) -> ChatTemplate:
    """The template among a tokenizer's files, which `with_template` saw to."""
    text = _own(tokenizer, location)
    assert text is not None, "there is one since `with_template`"
    return ChatTemplate(text=text, special=_special(tokenizer, location))


def _own(tokenizer: TextTokenizer, location: str) -> str | None:
    if FILE in tokenizer.files:
        return tokenizer.files[FILE].decode()
    named = read_object(tokenizer.files, "tokenizer_config.json", location).get("chat_template")
    if isinstance(named, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in named if isinstance(one, dict)}
    if isinstance(named, dict):
        named = named.get("default")
    return named if isinstance(named, str) else None


def _read(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(
            "there is no such chat template",
            got=f"data.chat_template: {name}",
            allowed=f"{', '.join(NAMED)}, or a file with a Jinja template",
            do="leave it out for the base's own",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError("the chat template cannot be read", got=f"{name} ({one_line(error)})") from error


def _special(tokenizer: TextTokenizer, location: str) -> tuple[tuple[str, str], ...]:
    named = {**read_object(tokenizer.files, "special_tokens_map.json", location)}
    named |= read_object(tokenizer.files, "tokenizer_config.json", location)
    found = {f"{name}_token": text_of(named.get(f"{name}_token")) for name in SPECIAL}
    return tuple((name, text) for name, text in found.items() if isinstance(text, str))


def _require_marks(tokenizer: TextTokenizer, location: str) -> None:
    from tokenizers import Tokenizer

    parsed = Tokenizer.from_str(tokenizer.json) if tokenizer.json else None
    if parsed is None or any(parsed.token_to_id(mark) is None for mark in _MARKS_OF_CHATML):
        raise ModelError(
            "the vocabulary has no tokens for ChatML's marks, so no turn would end by a token of its own",
            got=location,
            allowed=f"a base with {' and '.join(_MARKS_OF_CHATML)}",
            do=f"set data.chat_template={_USUAL}, which ends turns by the end-of-text token",
        )


@functools.lru_cache(maxsize=8)
def _parsed(text: str, name: str) -> None:
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        if "generation" not in str(error):  # a tag that transformers adds
            raise ModelError("the chat template is no valid Jinja", got=f"{name}: {one_line(error)}") from error
