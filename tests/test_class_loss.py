"""`training.class_weights` and `training.label_smoothing` in trainings: the same loss however a batch is split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.training_runs import bert, classify, curve, run

WEIGHTED: dict[str, Any] = {"training__class_weights": "balanced", "training__label_smoothing": 0.1}


def few_of_one(folder: Path) -> dict[str, str]:
    """A base without dropout, and rows of which one in eight is bad."""
    shutil.copytree(bert(), folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    rows = [("text", "label"), *((f"the film was fine {n}", "good" if n % 8 else "bad") for n in range(96))]
    (folder / "rows.csv").write_text("".join(f"{text},{label}\n" for text, label in rows))
    return {"model__base": str(folder / "base"), "data__train": str(folder / "rows.csv")}


@pytest.mark.slow
@pytest.mark.parametrize("split", [{"training__micro_batch": 1}, {"training__micro_batch": 2, "resources__workers": 2}])
def test_the_loss_is_the_mean_by_weights_of_the_batch_however_it_is_split(
    tmp_path: Path, split: dict[str, Any]
) -> None:
    data = few_of_one(tmp_path)
    whole = classify(tmp_path / "whole", training__micro_batch=8, **data, **WEIGHTED)
    other = classify(tmp_path / "split", **data, **WEIGHTED, **split)
    plain = classify(tmp_path / "plain", training__micro_batch=8, **data)
    for job in (whole, other, plain):
        run(job)
    assert curve(other) == pytest.approx(curve(whole), rel=2e-5)
    assert curve(plain)[0] != pytest.approx(curve(whole)[0], rel=1e-3), "rows count by their classes"


def test_they_are_for_classifications_and_no_part_of_runs_without_them() -> None:
    for name, value in (("class_weights", "balanced"), ("label_smoothing", 0.1)):
        with pytest.raises(SpecError, match=f"training.{name} is for classification"):
            spec(PRETRAIN, **{f"training__{name}": value})
        assert spec(CLASSIFY, **{f"training__{name}": value}).fingerprint() != spec(CLASSIFY).fingerprint()
        assert name not in spec(CLASSIFY).identity()["training"]
