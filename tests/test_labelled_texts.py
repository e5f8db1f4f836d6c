from __future__ import annotations

import numpy as np

from orchestrator.samples.forms.labelled_texts import LabelledSamples


def labelled(lengths: list[int], *, longest: int) -> LabelledSamples:
    return LabelledSamples(
        np.arange(1, sum(lengths) + 1, dtype=np.uint16),
        lengths=np.array(lengths),
        labels=np.arange(len(lengths)),
        pad_id=0,
        longest=longest,
    )


def test_rows_are_padded_to_a_multiple_of_eight_within_the_cut_off() -> None:
    samples = labelled([3, 9, 20], longest=20)
    assert samples.padded_length(np.array([0])) == 8
    assert samples.padded_length(np.array([0, 1])) == 16
    assert samples.padded_length(np.array([2])) == 20


def test_caller_may_set_the_padded_length() -> None:
    batch = labelled([3, 2], longest=20).batch(np.array([0, 1]), pad_to=5)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]]
