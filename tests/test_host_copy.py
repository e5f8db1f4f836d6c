"""Copies that are whole, share what was shared, and take no new memory."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from orchestrator.checkpoints.host_copy import HostBuffers

pytestmark = pytest.mark.slow  # torch


def test_a_copy_is_whole_and_knows_nothing_of_later_changes() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    state = {"module": OrderedDict(weight=weight), "moments": [(weight.detach() * 2,)], "step": 3, "shapes": {"a": [1]}}
    copied = HostBuffers().copy("state", state)
    with torch.no_grad():
        weight.zero_()
    state["shapes"]["a"].append(2)  # type: ignore[index]
    assert copied["module"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copied["moments"][0][0].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert (copied["step"], copied["shapes"], type(copied["module"])) == (3, {"a": [1]}, OrderedDict)
    assert not copied["module"]["weight"].requires_grad


def test_the_next_copy_takes_the_memory_of_the_last() -> None:
    buffers, values = HostBuffers(), [torch.zeros(8), torch.zeros(3, dtype=torch.bfloat16)]
    first = [tensor.data_ptr() for tensor in buffers.copy("state", values)]
    other = [tensor.data_ptr() for tensor in buffers.copy("other", values)]
    values[0].fill_(1)
    again = buffers.copy("state", values)
    assert [tensor.data_ptr() for tensor in again] == first
    assert not set(other) & set(first)
    assert again[0].tolist() == [1] * 8


def test_a_state_of_another_form_is_copied_as_it_is() -> None:
    buffers = HostBuffers()
    buffers.copy("state", [torch.zeros(8), torch.zeros(2), torch.zeros(5)])
    values = [torch.ones(4), torch.ones(2, dtype=torch.float64)]
    assert [tensor.dtype for tensor in buffers.copy("state", values)] == [torch.float32, torch.float64]
    assert [len(tensor) for tensor in buffers.copy("state", values)] == [4, 2]


def test_tied_weights_stay_one_and_a_view_takes_no_more_than_itself() -> None:
    flat = torch.arange(10.0)
    copied = HostBuffers().copy("state", {"a": flat[2:4], "b": flat[2:4], "c": flat[4:6]})
    assert copied["a"] is copied["b"] or copied["a"].data_ptr() == copied["b"].data_ptr()
    assert copied["a"].untyped_storage().nbytes() == 8
    assert copied["c"].tolist() == [4, 5]
