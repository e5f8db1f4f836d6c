from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoints.diff import PartComparison, compare_checkpoints
from orchestrator.errors import StorageError
from tests import training_runs

pytestmark = pytest.mark.slow

WEIGHTS = 28
"""Parameters of the tests' two-layer GPT."""
ODD = {"n_layer": 2, "n_embd": 33, "n_head": 3}
"""Most of its parameters cannot be halved, so that shards are padded."""
Case = tuple[int, str]
CASES: list[Case] = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The newest checkpoint of a short training of a case, made when it is first asked for."""
    made: dict[Case, Path] = {}

    def of(case: Case) -> Path:
        if case not in made:
            stage, precision = case
            job = training_runs.pretrain(
                tmp_path_factory.mktemp("trained"),
                deepspeed__zero_stage=stage,
                resources__workers=2,
                training__precision=precision,
                training__steps=2,
                model__overrides=ODD,
            )
            made[case] = Path(str(training_runs.run(job).checkpoint))
        return made[case]

    return of


@pytest.fixture
def pair(checkpoint: Callable[[Case], Path], tmp_path: Path) -> Callable[[Case], tuple[Path, Path]]:
    """Two copies of a checkpoint, which a test may change."""

    def of(case: Case) -> tuple[Path, Path]:
        one, other = (shutil.copytree(checkpoint(case), tmp_path / name) for name in ("one", "other"))
        return one, other

    return of


def change(folder: Path, file: str, how: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites one of a checkpoint's files."""
    (path,) = folder.rglob(file)
    state = torch.load(path, weights_only=False)
    how(state)
    torch.save(state, path)


def flip_a_bit(tensor: torch.Tensor, place: int) -> None:
    """The lowest bit of one element."""
    with torch.no_grad():
        tensor.reshape(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)[place] ^= 1


def wrong(found: tuple[PartComparison, ...]) -> dict[str, tuple[int, str]]:
    """By part: how many differ and which is the first."""
    return {part.what: (part.different, part.first.name) for part in found if part.first is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"zero{case[0]}-{case[1]}")
def test_a_checkpoint_equals_its_copy_and_every_parameter_is_compared_once(
    case: Case, pair: Callable[[Case], tuple[Path, Path]]
) -> None:
    found = compare_checkpoints(*pair(case))
    assert wrong(found) == {}
    compared = {part.what: part.compared for part in found}
    assert compared["first moments"] == compared["second moments"] == WEIGHTS
    assert compared["step counters"]
    if case != (0, "fp32"):
        assert compared["fp32 masters"] == WEIGHTS
    if case[0] < 3:
        assert compared["weights"] == WEIGHTS + 1, "the tied output layer has a name of its own"


@pytest.mark.parametrize("place", [0, 60, -5])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_flipped_bit_of_a_shard_has_the_name_that_deepspeed_itself_gives_it(
    stage: int, group: int, place: int, pair: Callable[[Case], tuple[Path, Path]]
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as consolidated

    one, other = pair((stage, "fp32"))
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"

    def flip(state: dict[str, Any]) -> None:
        masters = state["optimizer_state_dict"][key][group]
        flip_a_bit(masters, place)

    change(other, "*zero_pp_rank_1_*optim_states.pt", flip)
    before, after = consolidated(str(one), tag="state"), consolidated(str(other), tag="state")
    changed = [name for name in before if name != "lm_head.weight" and not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    assert wrong(compare_checkpoints(one, other)) == {"fp32 masters": (1, changed[0])}


def test_the_padding_of_shards_does_not_count(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((3, "fp32"))

    def flip(state: dict[str, Any]) -> None:
        flip_a_bit(state["optimizer_state_dict"]["fp32_flat_groups"][1], -1)

    change(other, "*zero_pp_rank_1_*optim_states.pt", flip)
    assert wrong(compare_checkpoints(one, other)) == {}


@pytest.mark.parametrize(("key", "part"), [("exp_avg", "first moments"), ("exp_avg_sq", "second moments")])
def test_without_zero_a_moment_has_the_name_of_its_parameter(
    key: str, part: str, pair: Callable[[Case], tuple[Path, Path]]
) -> None:
    one, other = pair((0, "fp32"))
    change(other, "*model_states.pt", lambda state: flip_a_bit(state["optimizer"]["state"][11][key], 5))
    assert wrong(compare_checkpoints(one, other)) == {part: (1, "transformer.h.0.ln_1.bias")}


def test_without_zero_a_master_has_the_name_of_its_parameter(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((0, "bf16"))
    change(other, "*model_states.pt", lambda state: flip_a_bit(state["optimizer"]["fp32_groups"][1][1], 0))
    assert wrong(compare_checkpoints(one, other)) == {"fp32 masters": (1, "transformer.h.0.ln_1.bias")}


def test_the_first_difference_is_the_first_in_the_model_and_not_in_the_file(
    pair: Callable[[Case], tuple[Path, Path]],
) -> None:
    one, other = pair((2, "fp32"))

    def spoil(state: dict[str, Any]) -> None:
        decayed, plain = (state["optimizer_state_dict"]["base_optimizer_state"]["state"][i]["exp_avg"] for i in (0, 1))
        decayed[-1] += 0.5
        plain[0] += 0.25

    change(other, "*zero_pp_rank_0_*optim_states.pt", spoil)
    (moments,) = (part for part in compare_checkpoints(one, other) if part.first is not None)
    assert moments.different == 2
    assert moments.first is not None
    # The end of rank 0's matrices is in the second embedding, which comes before the first layer's biases.
    assert moments.first.name == "transformer.wpe.weight"
    assert moments.first.largest_absolute == pytest.approx(0.5)


def test_how_far_they_are_apart_is_measured(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((2, "fp32"))

    def double(state: dict[str, Any]) -> None:
        state["module"]["transformer.h.1.mlp.c_fc.weight"] *= 2

    change(other, "*model_states.pt", double)
    largest = torch.load(next(one.rglob("*model_states.pt")), weights_only=False)["module"]
    (weights,) = (part for part in compare_checkpoints(one, other) if part.first is not None)
    assert weights.first is not None
    assert weights.first.name == "transformer.h.1.mlp.c_fc.weight"
    assert weights.first.largest_absolute == float(largest[weights.first.name].abs().max())
    assert weights.first.largest_relative == 0.5


def test_a_sign_of_zero_is_a_difference(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((2, "fp32"))
    for folder, zero in ((one, 0.0), (other, -0.0)):
        change(
            folder, "*model_states.pt", lambda state, zero=zero: state["module"]["transformer.ln_f.bias"].fill_(zero)
        )
    assert wrong(compare_checkpoints(one, other)) == {"weights": (1, "transformer.ln_f.bias")}


def test_a_step_counter_and_a_learning_rate_count(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((2, "fp32"))

    def skip(state: dict[str, Any]) -> None:
        optimizer = state["optimizer_state_dict"]["base_optimizer_state"]
        optimizer["state"][1]["step"] += 1
        optimizer["param_groups"][0]["lr"] = 0.125

    change(other, "*zero_pp_rank_0_*optim_states.pt", skip)
    assert wrong(compare_checkpoints(one, other)) == {
        "step counters": (1, "group 1"),
        "other state": (1, "optimizer_state_dict.base_optimizer_state.param_groups.0.lr"),
    }


def test_a_missing_file_is_a_difference(pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((2, "fp32"))
    gone = next(other.rglob("*zero_pp_rank_1_*"))
    gone.unlink()
    assert wrong(compare_checkpoints(one, other)) == {"other state": (1, f"the file {gone.relative_to(other)}")}


def test_adapters_are_compared_by_name(tmp_path: Path) -> None:
    job = training_runs.classify(
        tmp_path / "run", method="lora", resources__workers=2, deepspeed__zero_stage=2, training__steps=2
    )
    one = Path(str(training_runs.run(job).checkpoint))
    other = shutil.copytree(one, tmp_path / "copy")

    def flip(state: dict[str, Any]) -> None:
        flip_a_bit(state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"], 0)

    change(other, "*zero_pp_rank_0_*optim_states.pt", flip)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
    assert wrong(compare_checkpoints(one, other)) == {"first moments": (1, name)}


def test_a_folder_without_state_and_a_torn_file_are_storage_errors(
    tmp_path: Path, pair: Callable[[Case], tuple[Path, Path]]
) -> None:
    with pytest.raises(StorageError, match="no training state"):
        compare_checkpoints(tmp_path, tmp_path)
    one, other = pair((2, "fp32"))
    torn = next(other.rglob("*zero_pp_rank_1_*"))
    os.truncate(torn, 1000)
    with pytest.raises(StorageError, match="cannot be read"):
        compare_checkpoints(one, other)


class _Trap:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, pair: Callable[[Case], tuple[Path, Path]]) -> None:
    one, other = pair((2, "fp32"))
    trap = _Trap(tmp_path / "sprung")
    assert b"mkdir" in pickle.dumps(trap)
    for folder in (one, other):
        change(folder, "*model_states.pt", lambda state: state.update(extra=trap))
    with pytest.raises(StorageError, match="cannot be read"):
        compare_checkpoints(one, other)
    assert not trap.folder.exists()
