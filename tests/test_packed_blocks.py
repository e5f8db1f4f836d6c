from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.samples.forms.packed_blocks import PackedSamples


@given(tokens=st.integers(2, 300), length=st.integers(1, 40))
def test_packing_predicts_every_token_once(tokens: int, length: int) -> None:
    samples = PackedSamples(np.arange(tokens, dtype=np.uint16), length=length)
    assert len(samples) == (tokens - 1) // length
    if not len(samples):
        return
    batch = samples.batch(np.arange(len(samples)))
    assert np.array_equal(batch["labels"].ravel(), np.arange(1, samples.token_count + 1))
    assert np.array_equal(batch["input_ids"] + 1, batch["labels"])
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int64
