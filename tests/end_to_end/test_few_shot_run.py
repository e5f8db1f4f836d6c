"""`method: few_shot` on a real Ray cluster, with the file that a training is made from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import locations
from orchestrator.scheduling.launch import launch
from tests import specs
from tests.end_to_end import runs

pytestmark = pytest.mark.slow


def write_decoder(folder: Path) -> Path:
    """A tiny GPT-2 with random weights, and a thousand rows that it knows the words of."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["the", "film", "was", "long", "and", "loud", "good", "bad", "Text", "Label", ":"]
    rows = [f"{' '.join(words[(i + j) % 6] for j in range(i % 9 + 1))},{words[6 + i % 2]}" for i in range(1000)]
    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    plain = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["<end>", *words])}, unk_token="<end>")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<end>").save_pretrained(
        folder / "base"
    )
    config = GPT2Config(vocab_size=len(words) + 1, n_embd=16, n_layer=2, n_head=2, n_positions=128, eos_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "base")
    return folder


def test_asking_survives_a_killed_worker_and_is_logged_like_any_other_run(ray_cluster: None, tmp_path: Path) -> None:
    # Ray Train 2.60.0 would start workers in a folder of its own, where a relative path leads nowhere.
    folder, killed = Path(os.path.relpath(write_decoder(tmp_path / "decoder"))), list[int]()
    trained = {"model__base": str(folder / "base"), "data__train": str(folder / "rows.csv"), "checkpoint__keep": 2}
    changes = {"name": "asked", "method": "few_shot", "resources__workers": 2, "training__micro_batch": 1}
    spec = specs.spec(specs.CLASSIFY, **trained, **changes, data__validation_fraction=0.8, training__global_batch=2)

    def kill_one(progress: Mapping[str, Any]) -> None:
        if not killed and 0 < progress["step"] < progress["steps"] - 100:
            worker = runs.processes_named("RayTrainWorker")[0]
            killed.append(worker.pid)
            runs.kill(worker)

    result = launch(spec, runs.listener(kill_one))
    assert killed
    assert (result.status, result.restarts, result.model_path) == ("finished", 1, None)
    measured, planned = (result.metrics[f"{side}/peak_gib"] for side in ("measured", "predicted"))
    assert measured == pytest.approx(planned, rel=0.3)
    scores = np.load(Path(result.run_folder) / "scores.npy")
    assert scores.shape == (800, 2)
    assert np.isfinite(scores).all()
    uri = locations.default_tracking_uri()
    assert result.mlflow_run_id is not None
    assert runs.curve(result.mlflow_run_id, "eval/accuracy", uri=uri) == {0: result.metrics["eval/accuracy"]}
    tags = runs.mlflow_run(result.mlflow_run_id, uri=uri).data.tags
    assert tags["orchestrator.method"] == "few_shot"
    assert "orchestrator.model_path" not in tags
    assert launch(spec, runs.listener()).metrics == result.metrics, "the same command answers at once"
