from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import StorageError
from orchestrator.samples.batches import SampleOrder, global_batch
from orchestrator.samples.forms.labelled_texts import write_rows
from orchestrator.samples.forms.token_file import write_tokens
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split


def write_split(folder: Path, tokens: np.ndarray, **meta: Any) -> Path:
    known = {"task": "causal-lm", "dtype": tokens.dtype.name, "sequence_length": 4, "pad_id": 0}
    (folder / "meta.json").write_text(json.dumps(known | meta))
    write_tokens(folder, "train", [tokens[:5], tokens[5:]])
    return folder


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_split_on_disk_gives_the_tokens_that_were_written(tmp_path: Path, dtype: type[np.generic]) -> None:
    highest = np.iinfo(dtype).max  # type: ignore[type-var]
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8, highest], dtype=dtype)
    samples = open_split(write_split(tmp_path, tokens), "train")
    assert len(samples) == 2
    assert samples.batch(np.array([1]))["labels"].tolist() == [[6, 7, 8, highest]]


def test_labelled_split_on_disk_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    parts = [(np.array([5, 6, 7], dtype=np.uint16), np.array([1, 2])), (np.array([8], dtype=np.uint16), np.array([1]))]
    write_split(tmp_path, np.zeros(9, dtype=np.uint16), task="text-classification", pad_id=9)
    assert write_rows(tmp_path, "train", parts, labels=np.array([1, 0, 1])) == 4
    samples = open_split(tmp_path, "train")
    batch = samples.batch(np.array([2, 1]))
    assert samples.token_count == 4
    assert samples.lengths(np.array([0, 1, 2])).tolist() == [1, 2, 1]
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[8, 9, 9, 9], [6, 7, 9, 9]],
        "attention_mask": [[1, 0, 0, 0], [1, 1, 0, 0]],
        "labels": [1, 0],
    }


def test_masked_split_on_disk_hides_tokens_of_blocks_between_its_special_tokens(tmp_path: Path) -> None:
    ids = {"mask_id": 4, "cls_id": 0, "sep_id": 2, "special_ids": [0, 1, 2, 3, 4], "vocab_size": 300}
    tokens = np.arange(5, 5 + 2 * 6 + 3, dtype=np.uint16)
    write_split(tmp_path, tokens, task="masked-lm", sequence_length=8, **ids)
    samples = open_split(tmp_path, "train", masking=Masking(rate=0.5))
    batch = samples.batch(np.arange(len(samples)))
    assert samples.token_count == 2 * 8
    assert batch["positions"].shape == (2, 4)
    np.put_along_axis(batch["input_ids"], batch["positions"], batch["labels"], axis=1)
    assert batch["input_ids"].tolist() == [[0, *range(5, 11), 2], [0, *range(11, 17), 2]]


def test_missing_split_says_that_every_node_must_see_the_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="seen by every node"):
        open_split(tmp_path / "elsewhere", "train")


def test_order_and_batch_cost_less_than_a_hundredth_of_a_short_step(tmp_path: Path) -> None:
    tokens = np.arange(3_000_000, dtype=np.uint32)
    samples = open_split(write_split(tmp_path, tokens, sequence_length=256), "train")
    order = SampleOrder(seed=0, size=len(samples))
    seconds = []
    for step in range(50):
        start = time.perf_counter()
        samples.batch(global_batch(order, step, 8))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.001, "of a step of 100 ms"
