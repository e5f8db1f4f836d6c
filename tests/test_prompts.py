from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from orchestrator.samples.prompts import draw_examples, opening, questions, written
from orchestrator.spec_methods import FewShotSpec

PLAIN = FewShotSpec()


def by_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def text_of(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode()


def test_a_prompt_is_examples_a_blank_line_apart_and_a_row_that_waits_for_its_class() -> None:
    settings = FewShotSpec(instruction="Judge films.", template="Review: {text}\nVerdict: {label}")
    begins = opening(settings, [("great", "good"), ("dull", "bad")])
    asked = questions(settings, [" fine "], ["good", "bad"], begins=begins, encode=by_bytes)
    assert begins == "Judge films.\n\nReview: great\nVerdict: good\n\nReview: dull\nVerdict: bad"
    assert [begins + text_of(one.context) for one in asked] == [f"{begins}\n\nReview: fine\nVerdict: "]
    assert [text_of(answer) for answer in asked[0].answers] == ["good", "bad"]


def test_without_examples_a_prompt_begins_with_the_row() -> None:
    asked = questions(PLAIN, ["fine"], ["good", "bad"], begins="", encode=by_bytes)
    assert text_of(asked[0].context) == "Text: fine\nLabel: "


def test_what_all_names_begin_with_belongs_to_the_context_and_each_keeps_a_token() -> None:
    asked = questions(PLAIN, ["a"], ["bad", "bat"], begins="", encode=by_bytes)
    assert text_of(asked[0].context) == "Text: a\nLabel: ba"
    assert [text_of(answer) for answer in asked[0].answers] == ["d", "t"]


def test_a_name_that_another_begins_with_is_told_from_it_by_its_end() -> None:
    asked = questions(PLAIN, ["a"], ["very", "very good"], begins="", encode=by_bytes)
    assert [text_of(answer) for answer in asked[0].answers] == ["\n\n", " good\n\n"]


def test_a_text_may_hold_what_the_template_is_written_with() -> None:
    assert written(PLAIN, "{label} {text}", "good") == "Text: {label} {text}\nLabel: good"


def test_examples_take_the_classes_in_turn_and_are_drawn_by_the_seed() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 3)
    lengths = np.arange(len(labels))
    drawn = [draw_examples(labels, lengths, count=12, longest=99, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    classes = labels[drawn[0]].tolist()
    assert [sorted(classes[at : at + 3]) for at in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert set(classes[9:]) == {0, 1}, "once a class has no more rows, the others go on"
    assert len(set(drawn[0].tolist())) == 12


def test_long_rows_are_no_examples() -> None:
    labels, lengths = np.array([0, 1] * 20), np.arange(40)
    drawn = draw_examples(labels, lengths, count=40, longest=9, seed=0)
    assert sorted(drawn.tolist()) == list(range(10))


def test_no_examples_are_drawn_where_none_are_asked_for() -> None:
    assert len(draw_examples(np.array([0, 1]), np.array([1, 1]), count=0, longest=9, seed=0)) == 0


@pytest.mark.parametrize("template", ["{text}", "{label}{text}", "{text} {label}.", "{text} {text} {label}", "{label}"])
def test_a_template_that_cannot_be_asked_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"ends with \{label\}"):
        FewShotSpec(template=template)


def test_a_place_that_nothing_fills_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \{title\}"):
        FewShotSpec(template="{title}: {text} {label}")


@pytest.mark.parametrize("words", [{"0": "yes", "1": "yes "}, {"0": "", "1": "no"}])
def test_words_that_cannot_be_told_apart_are_refused(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a word of its own"):
        FewShotSpec(words=words)


def tokenizer_of(kind: str) -> Tokenizer:
    """As GPT-2's, or as Llama 2's, which puts a space before every text that it is given."""
    seen = ["the model reads a line good bad very very good Text: Label:\n\nText\n"] * 20
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<unk>"]
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        seen, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return tokenizer


@pytest.mark.parametrize("words", [("good", "bad"), ("very", "very good")])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_opening_context_and_answer_together_have_the_ids_of_the_whole_prompt(
    kind: str, words: tuple[str, str]
) -> None:
    tokenizer = tokenizer_of(kind)

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    begins = opening(PLAIN, [("the line", words[0]), ("a model", words[1])])
    asked = questions(PLAIN, ["reads the line"], words, begins=begins, encode=encode)[0]
    end = "\n\n" if words[1].startswith(words[0]) else ""
    wholes = encode([f"{begins}\n\nText: reads the line\nLabel: {word}{end}" for word in words])
    assert [[*encode([begins])[0], *asked.context, *answer] for answer in asked.answers] == wholes
