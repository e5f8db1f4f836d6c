from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from orchestrator.errors import ModelError
from orchestrator.locations import resolve
from orchestrator.samples import base_tokenizer, tokenization
from orchestrator.samples.base_tokenizer import check_sample, load_tokenizer, tokenizer_location
from orchestrator.samples.new_tokenizer import train_tokenizer
from orchestrator.samples.tokenization import TextTokenizer, document_chunks, encode_documents, encode_rows
from orchestrator.spec import ModelSpec
from tests.test_tokenization import LINES, MINILM, whole


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    return train_tokenizer(LINES, vocab_size=400, sequence_length=64)


@pytest.fixture(scope="module")
def minilm() -> TextTokenizer:
    return load_tokenizer(MINILM)


def save_base(folder: Path, bpe: TextTokenizer, **config: object) -> Path:
    """A base model's folder with nothing but a tokenizer and a config."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(bpe.files["tokenizer.json"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_truncation_and_padding_of_a_base_tokenizer_are_switched_off(bpe: TextTokenizer, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", bpe, eos_token_id=0)
    tokenizer = Tokenizer.from_str(bpe.json)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    assert '"truncation":null,"padding":null' in loaded.json
    assert len(encode_documents(whole("a much longer text"), tokenizer=loaded.json, after=(0,))) > 5


@pytest.mark.parametrize(
    ("special", "config", "eos", "pad"),
    [
        ({"eos_token": "a", "pad_token": {"content": "b"}}, {}, "a", "b"),
        ({"eos_token": {"content": "a"}}, {}, "a", "a"),
        ({}, {"eos_token_id": 70, "pad_token_id": 71}, 70, 71),
        ({}, {"eos_token_id": [72, 70]}, 72, 72),
        ({"eos_token": "not in the vocabulary"}, {"eos_token_id": 10**6}, 400, 400),
        ({}, {"eos_token_id": 10**6, "pad_token_id": -1}, None, 0),
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


# -- the ids of AutoTokenizer ------------------------------------------------------------------------------------------

TEXTS = (
    "The Text  is\nHere 12, Zoë: <extra> <s>one</s> [MASK]",
    "",
    " leading and trailing ",
    "def f(value):\n\treturn value * 2",
    "一行 of another script",
)
SENTENCES = [f"def function_{n}(value): return value * {n} and the Text is Here, zoë" for n in range(200)]


def sentencepiece(kind: str, **options: Any) -> bytes:
    """A model as `sentencepiece` stores it."""
    import sentencepiece as package

    model = io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=150, model_type=kind, minloglevel=2, **options
    )
    return model.getvalue()


ALBERT = {"control_symbols": "[CLS],[SEP],[MASK]", "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
PHOBERT = "".join(f"{word} 1\n" for word in ("The", "T@@", "e@@", "x@@", "t", "is", "Here", "o@@", "n@@", "e"))


def files_of(kind: str) -> dict[str, bytes | dict[str, Any]]:
    """A folder with nothing but what this kind of tokenizer is stored in."""
    copied = {name: (Path(resolve(MINILM)) / name).read_bytes() for name in ("tokenizer.json", "vocab.txt")}
    bert = {"config.json": {"model_type": "bert"}}
    named = {"tokenizer_class": "BertTokenizer"}
    bpe = train_tokenizer(LINES, vocab_size=400, sequence_length=64).files["tokenizer.json"]
    roberta = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}
    llama = {"tokenizer.model": sentencepiece("bpe"), "config.json": {"model_type": "llama"}}
    return {
        "bert, not lowered": {**copied, **bert, "tokenizer_config.json": {**named, "do_lower_case": False}},
        "bert, vocabulary alone": {"vocab.txt": copied["vocab.txt"], **bert},
        "bert, added tokens": {
            **copied,
            **bert,
            "added_tokens.json": {"<extra>": 30522},
            "tokenizer_config.json": named,
        },
        "bert, added in the config": {
            **copied,
            **bert,
            "tokenizer_config.json": {
                **named,
                "added_tokens_decoder": {"30522": {"content": "<extra>", "lstrip": True, "special": True}},
            },
        },
        "bert, special tokens split": {
            **copied,
            **bert,
            "tokenizer_config.json": {**named, "split_special_tokens": True},
        },
        "roberta, a space before": {
            "tokenizer.json": train_tokenizer(LINES, vocab_size=400, sequence_length=64, for_encoder=True).files[
                "tokenizer.json"
            ],
            "config.json": {"model_type": "roberta"},
            "tokenizer_config.json": roberta,
        },
        "gpt2, begun with a token": {
            "tokenizer.json": bpe,
            "config.json": {"model_type": "gpt2"},
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<|endoftext|>"
            },
        },
        "llama, sentencepiece alone": llama,
        "llama, begun and ended": {
            **llama,
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True
            },
        },
        "deberta-v2, sentencepiece alone": {
            "spm.model": sentencepiece("unigram"), "config.json": {"model_type": "deberta-v2"}
        },
        "albert, sentencepiece alone": {
            "spiece.model": sentencepiece("unigram", **ALBERT), "config.json": {"model_type": "albert"}
        },
        "gemma, sentencepiece alone": {"tokenizer.model": sentencepiece("bpe"), "config.json": {"model_type": "gemma"}},
        "gpt-sw3, slow": {
            "spiece.model": sentencepiece("unigram"),
            "config.json": {"model_type": "gpt2"},
            "tokenizer_config.json": {"tokenizer_class": "GPTSw3Tokenizer"},
        },
        "phobert, slow": {
            "vocab.txt": PHOBERT.encode(),
            "bpe.codes": b"T h 3\nTh e</w> 2\n",
            "config.json": {"model_type": "roberta"},
            "tokenizer_config.json": {"tokenizer_class": "PhobertTokenizer"},
        },
    }[kind]  # fmt: skip


KINDS = (
    *("bert, not lowered", "bert, vocabulary alone", "bert, added tokens", "bert, added in the config"),
    *(
        "bert, special tokens split",
        "roberta, a space before",
        "gpt2, begun with a token",
        "llama, sentencepiece alone",
    ),
    *("llama, begun and ended", "deberta-v2, sentencepiece alone", "albert, sentencepiece alone"),
    *("gemma, sentencepiece alone", "gpt-sw3, slow", "phobert, slow"),
)


def written(folder: Path, files: Mapping[str, bytes | dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of swig, which sentencepiece is built with
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_base_are_those_of_auto_tokenizer_in_its_folder_and_in_an_exported_one(
    tmp_path: Path, kind: str
) -> None:
    import transformers

    folder = written(tmp_path / "base", files_of(kind))
    tokenizer = load_tokenizer(str(folder))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [reference(text)["input_ids"] for text in TEXTS]
    around = {"before": tokenizer.before, "after": tokenizer.after}
    for text, ids in zip(TEXTS, expected, strict=True):
        row, _ = encode_rows(whole(text), tokenizer=tokenizer.encoder, sequence_length=99, pad_id=tokenizer.pad_id)
        assert row.tolist() == (ids or [tokenizer.pad_id])
        assert encode_documents(whole(text), tokenizer=tokenizer.encoder, **around).tolist() == ids
    tokenizer.save(tmp_path / "exported")
    (tmp_path / "exported" / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert [again(text)["input_ids"] for text in TEXTS] == expected
    assert max(map(max, filter(None, expected))) < tokenizer.vocab_size
    check_sample(tokenizer, str(folder), TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bert, added tokens", "bert, added in the config", "bert, with a pad token of its own"]
)
def test_what_other_files_add_is_counted_without_transformers_too(tmp_path: Path, kind: str) -> None:
    files = files_of("bert, not lowered" if "own" in kind else kind)
    if "own" in kind:
        files["tokenizer_config.json"] = {"tokenizer_class": "BertTokenizer", "pad_token": "<a pad token>"}
    folder = written(tmp_path / "base", files)
    stored = {file.name: file.read_bytes() for file in folder.iterdir()}
    light, exact = tokenization.from_files(stored, {}, "base"), load_tokenizer(str(folder))
    assert (light.vocab_size, light.pad_id, light.eos_id) == (exact.vocab_size, exact.pad_id, exact.eos_id)
    assert light.vocab_size == 30_523


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("llama, begun and ended", ["<s>"], ["</s>"]),
        ("gpt2, begun with a token", [], []),
        ("llama, sentencepiece alone", [], []),
        ("bert, not lowered", ["[CLS]"], ["[SEP]"]),
    ],
)
def test_a_template_is_what_the_tokenizer_puts_around_a_text(
    tmp_path: Path, kind: str, before: list[str], after: list[str]
) -> None:
    tokenizer = load_tokenizer(str(written(tmp_path / "base", files_of(kind))))
    tokens = Tokenizer.from_str(tokenizer.json)
    assert [tokens.id_to_token(i) for i in tokenizer.before] == before
    assert [tokens.id_to_token(i) for i in tokenizer.after] == after


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["llama, begun and ended", "bert, not lowered", "gpt2, begun with a token"])
def test_a_long_document_is_cut_only_where_its_tokens_stay_the_same(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "PIECE_BYTES", 100)
    monkeypatch.setattr(tokenization, "CHUNK_BYTES", 300)
    folder = written(tmp_path / "base", files_of(kind))
    tokenizer = load_tokenizer(str(folder))
    text = "\n".join(SENTENCES[:30]) + "  and\n\nmore\ttext\n" * 20
    chunks = list(document_chunks([text, "short"], cuts=tokenizer.cuts))
    assert len(chunks) > 5
    check_sample(tokenizer, str(folder), [text])


def test_a_tokenizer_that_puts_a_mark_before_every_text_is_cut_at_a_space_that_is_left_out() -> None:
    parsed = Tokenizer(models.BPE())
    parsed.pre_tokenizer = pre_tokenizers.Metaspace()
    parsed.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    parsed.pre_tokenizer = None  # as in the tokenizer.json of Llama 2
    parsed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert base_tokenizer._cuts(lambda text: parsed.encode(text).ids) == "spaces"
    assert base_tokenizer._cuts(lambda text: [len(text), 0]) == "nowhere"


def test_other_ids_than_those_of_auto_tokenizer_are_an_error_that_names_the_text(
    minilm: TextTokenizer, tmp_path: Path
) -> None:
    folder = written(tmp_path / "base", files_of("bert, not lowered"))
    with pytest.raises(ModelError, match=r"AutoTokenizer[\s\S]*text 2 of the training data, 'Films of 1999', token 2"):
        check_sample(minilm, str(folder), ["films", "Films of 1999", "More"])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("tiktoken") is not None, reason="tiktoken is installed here")
@pytest.mark.filterwarnings("default")
def test_a_tokenizer_that_needs_a_package_names_it(tmp_path: Path) -> None:
    files = {"tokenizer.model": b"IQ== 0\nIg== 1\nIw== 2\n", "config.json": {"model_type": "llama"}}
    with pytest.raises(ModelError, match="needs a package") as error:
        load_tokenizer(str(written(tmp_path / "base", files)))
    assert str(error.value.do).startswith("pip install tiktoken")


@pytest.mark.filterwarnings("default")
def test_a_damaged_sentencepiece_model_is_named(tmp_path: Path) -> None:
    files = {"tokenizer.model": sentencepiece("bpe")[:300], "config.json": {"model_type": "llama"}}
    with pytest.raises(ModelError, match=r"the tokenizer\.model of .* cannot be read"):
        load_tokenizer(str(written(tmp_path / "base", files)))


def test_a_tokenizer_that_is_a_program_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    files: dict[str, bytes | dict[str, Any]] = {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"},
        "own.py": b"raise SystemExit('run')",
        "config.json": {"model_type": "own"},
    }
    with pytest.raises(ModelError, match="a program of its own"):
        load_tokenizer(str(written(tmp_path / "base", files)))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(str(written(tmp_path / "base", {"config.json": {"model_type": kind}})))
