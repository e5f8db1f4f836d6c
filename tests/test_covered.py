from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from orchestrator.data.documents import open_documents
from orchestrator.data.sources import find_sources
from orchestrator.data.splits import Chosen
from orchestrator.samples.covered import DocumentEncoding, covered_bytes
from orchestrator.samples.new_tokenizer import train_tokenizer
from orchestrator.samples.open_split import open_split
from orchestrator.samples.prepare import PreparedData, encode_here, prepare
from orchestrator.samples.tokenization import document_chunks, encode_documents, end_of_tokens
from tests import specs

WORDS = [
    "the",
    "reads",
    "über",
    "and",
    "naïve",
    "follows",
    "日本語",
    "from",
    "model,",
    "'before'",
    "it;",
    "",
    "",
    "twice",
]


def write_documents(folder: Path, *, count: int, words: int, seed: int = 0) -> Path:
    """Held-out text with characters of one to three bytes, runs of blanks, and blank documents in between."""
    draws = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        lines = (" ".join(draws.choices(WORDS, k=12)) for _ in range(words // 12))
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"{number:03d}-blank.txt").write_text(" \n")
    return folder


def prepared(tmp_path: Path, vocab_size: int, *, length: int, **shape: int) -> PreparedData:
    train = specs.write_corpus(tmp_path / "train") if not (tmp_path / "train").exists() else tmp_path / "train"
    held = tmp_path / "held"
    if not held.exists():
        write_documents(held, **shape)
    changes = {"data__validation": str(held), "data__sequence_length": length, "model__vocab_size": vocab_size}
    spec = specs.spec(specs.PRETRAIN, data__train=str(train), **changes)
    return prepare(spec, cache=tmp_path / "cache", encode=encode_here)


def bytes_by_hand(data: PreparedData) -> int:
    """Of the predicted tokens of all blocks: each token of a byte-level BPE is so many bytes, that of the end none."""
    parsed = Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))
    samples = open_split(data.path, "validation")
    predicted = samples.batch(np.arange(len(samples)))["labels"].ravel()
    return sum(len(parsed.id_to_token(int(token))) for token in predicted if token != data.eos_id)


@pytest.mark.parametrize("vocab_size", [257, 600])
@pytest.mark.parametrize(
    ("length", "shape"),
    [(7, {"count": 9, "words": 60}), (64, {"count": 30, "words": 12}), (50, {"count": 1, "words": 60})],
)
def test_covered_bytes_are_those_of_the_predicted_tokens(
    tmp_path: Path, vocab_size: int, length: int, shape: dict[str, int]
) -> None:
    data = prepared(tmp_path, vocab_size, length=length, **shape)
    assert data.covered_bytes is not None
    # A character that a boundary cuts counts whole: at most two bytes at each of the two ends.
    assert abs(data.covered_bytes - bytes_by_hand(data)) <= 4
    assert data.covered_bytes < data.validation_bytes


def test_of_ascii_text_they_are_exact_with_any_tokenizer_and_the_remainder_does_not_count(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    text = "one line and the next line follows from the one before\n" * 40
    (held / "a.txt").write_text(text)
    (held / "b.txt").write_text("the end")
    covered = {}
    for vocab_size in (257, 600):
        data = prepared(tmp_path, vocab_size, length=50)
        covered[vocab_size] = data.covered_bytes
        assert data.covered_bytes == bytes_by_hand(data)
    # 2,200 tokens of one byte, an end, 7 tokens, an end: 44 blocks are all but the first token and the last eight.
    assert covered[257] == len(text) - 1 == 2199


def test_of_a_document_in_many_pieces_they_are_exact_too(tmp_path: Path) -> None:
    """It is encoded in pieces of 50,000 characters, and only those at its ends are looked at again."""
    held = tmp_path / "held"
    held.mkdir()
    (held / "a.txt").write_text("the model reads a line and the next line follows from it " * 4000)
    data = prepared(tmp_path, 600, length=3_000)
    assert data.covered_bytes == bytes_by_hand(data)


def test_what_a_template_puts_around_documents_covers_no_text(tmp_path: Path) -> None:
    held = write_documents(tmp_path / "held", count=4, words=24)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, vocab_size=300, sequence_length=8)
    chosen = Chosen(documents=open_documents(find_sources(str(held)), text_column="text"), numbers=np.arange(8))
    texts = [text for text in chosen if not text.isspace()]
    for before, after in (((0,), (0,)), ((0, 0), ()), ((), (0,))):
        encoding = DocumentEncoding(encoder=tokenizer.encoder, cuts=tokenizer.cuts, before=before, after=after)
        stream: list[int] = []
        for chunk in document_chunks(texts):
            stream += encode_documents(chunk, tokenizer=tokenizer.encoder, before=before, after=after).tolist()
        sizes = [0 if token == 0 else len(Tokenizer.from_str(tokenizer.json).id_to_token(token)) for token in stream]
        for left_over in range(0, len(stream), 7):
            found = covered_bytes(
                chosen, encoding, all_bytes=sum(len(text.encode()) for text in texts), left_over=left_over
            )
            assert abs(found - sum(sizes[1 : len(sizes) - left_over])) <= 4, (before, after, left_over)


def test_only_causal_language_models_have_them(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    changes = {"task": "masked-lm", "model__config": "roberta", "model__overrides": {}}
    spec = specs.spec(specs.PRETRAIN, data__train=str(corpus), **changes)
    assert prepare(spec, cache=tmp_path / "cache", encode=encode_here).covered_bytes is None


def test_the_end_of_a_token_is_found_in_characters() -> None:
    from tokenizers import models, pre_tokenizers

    parsed = Tokenizer(models.WordLevel({"[UNK]": 0, "naïve": 1, "日本": 2}, unk_token="[UNK]"))
    parsed.pre_tokenizer = pre_tokenizers.Whitespace()
    text = "naïve   日本 xyz  "
    ends = [end_of_tokens(text, count, tokenizer=parsed.to_str()) for count in range(5)]
    assert ends == [0, 5, 10, len(text), len(text)]
