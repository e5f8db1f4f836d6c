from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from orchestrator.errors import ModelError
from orchestrator.samples import new_tokenizer
from orchestrator.samples.new_tokenizer import LONGEST_WORD, train_tokenizer
from orchestrator.samples.tokenization import TextTokenizer, encode_documents
from tests.test_tokenization import LINES, whole


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_tokenizer(LINES, vocab_size=400, sequence_length=64)


def test_trained_tokenizer_has_the_size_asked_for_and_ends_documents(bpe: TextTokenizer) -> None:
    assert bpe.vocab_size == 400
    assert bpe.eos_id is not None
    assert Tokenizer.from_str(bpe.json).id_to_token(bpe.eos_id) == "<|endoftext|>"


def test_tokenizer_for_an_encoder_has_a_mask_and_puts_texts_between_special_tokens() -> None:
    encoder = train_tokenizer(LINES, vocab_size=400, sequence_length=64, for_encoder=True)
    parsed = Tokenizer.from_str(encoder.json)
    ids = (encoder.cls_id, encoder.pad_id, encoder.sep_id, encoder.mask_id)
    assert [parsed.id_to_token(i) for i in ids if i is not None] == ["<s>", "<pad>", "</s>", "<mask>"]
    assert encoder.eos_id == encoder.sep_id
    assert encoder.special_ids == (0, 1, 2, 3, 4)
    assert encoder.vocab_size == 400
    text = parsed.encode("a text", "another").tokens
    assert [text[0], text[-1], text.count("</s>")] == ["<s>", "</s>", 3]


@pytest.mark.slow
def test_equal_texts_give_equal_tokenizers_in_any_process(bpe: TextTokenizer) -> None:
    code = (
        "from tests.test_new_tokenizer import LINES, train_tokenizer;"
        "print(train_tokenizer(LINES, vocab_size=400, sequence_length=64).fingerprint())"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == bpe.fingerprint()


def test_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"vocab_size=200[\s\S]*at least 257"):
        train_tokenizer(LINES, vocab_size=200, sequence_length=64)
    with pytest.raises(ModelError, match=r"vocab_size=260[\s\S]*at least 261"):
        train_tokenizer(LINES, vocab_size=260, sequence_length=64, for_encoder=True)


def test_tokenizer_is_trained_on_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    first = "".join(LINES[:10])
    monkeypatch.setattr(new_tokenizer, "BPE_SAMPLE_BYTES", len(first))
    few = train_tokenizer([first, "short", "and a longer text " * 1000], vocab_size=400, sequence_length=64)
    assert few.json == train_tokenizer([first], vocab_size=400, sequence_length=64).json


@pytest.mark.slow
def test_trained_tokenizer_loads_in_transformers_with_the_same_ids(bpe: TextTokenizer, tmp_path: Path) -> None:
    import transformers

    bpe.save(tmp_path / "tokenizer")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (bpe.eos_id, bpe.pad_id, 64)
    assert [*loaded(LINES[3])["input_ids"], 0] == encode_documents(
        whole(LINES[3]), tokenizer=bpe.json, after=(0,)
    ).tolist()
    assert loaded.decode(loaded(LINES[3])["input_ids"]) == LINES[3]


def test_a_long_word_is_learnt_from_in_parts_and_any_other_text_as_it_stands() -> None:
    text = "a line = of words\n\n" + "-" * LONGEST_WORD + "\tthe end"
    assert list(new_tokenizer._without_long_words(text)) == [text]
    for long in ("a" * 1000, "a" * 600 + " b", "c  " + " \n" * 700, "x" * (LONGEST_WORD + 1)):
        parts = list(new_tokenizer._without_long_words(long))
        assert "".join(parts) == long
        assert max(len(word) for part in parts for word in part.split() or [""]) <= LONGEST_WORD
        assert max(len(part) - len(part.strip()) for part in parts) <= LONGEST_WORD


def test_a_tokenizer_of_one_word_of_a_million_letters_is_trained() -> None:
    found = train_tokenizer(["a" * 1_000_000], vocab_size=400, sequence_length=64)
    assert Tokenizer.from_str(found.json).token_to_id("a" * LONGEST_WORD) is not None
