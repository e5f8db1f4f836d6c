"""`task: chat`: conversations share blocks without seeing each other, and the loss is one mean over all answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.splits import Split
from orchestrator.errors import DataError
from orchestrator.samples.forms.chats import SEPARATE, ChatSamples
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split
from orchestrator.samples.packing import alone, pack
from orchestrator.tasks.masked_lm import NO_LABEL
from tests.test_chat_encoding import tokenizer_folder
from tests.training_runs import chat, conversations, curve, run

pytestmark = pytest.mark.slow  # torch

LENGTHS = np.array([3, 5, 4, 2], dtype=np.int32)
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
OF_GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}


def samples(*, shared: bool) -> ChatSamples:
    """Four conversations of 14 tokens, of each of which all but the first two are an assistant's."""
    spoken = np.concatenate([np.arange(length) >= 2 for length in LENGTHS]).astype(np.uint8)
    packs = pack(LENGTHS, 8) if shared else alone(4)
    return ChatSamples(
        np.arange(10, 24, dtype=np.uint16), spoken=spoken, lengths=LENGTHS, packs=packs, pad_id=0, longest=8
    )


def test_a_block_holds_whole_conversations_whose_positions_and_answers_are_their_own() -> None:
    batch = samples(shared=True).batch(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[13, 14, 15, 16, 17, 10, 11, 12], [18, 19, 20, 21, 22, 23, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    none = NO_LABEL
    assert batch["labels"].tolist() == [
        [none, 15, 16, 17, none, none, 12, none],
        [none, 20, 21, none, none, none, none, none],
    ]


def test_conversations_alone_in_their_blocks_get_no_positions() -> None:
    batch = samples(shared=False).batch(np.array([3, 1]))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[22, 23, 0, 0, 0, 0, 0, 0], [13, 14, 15, 16, 17, 0, 0, 0]]


@pytest.mark.parametrize("kind", sorted(SEPARATE))
def test_no_conversation_sees_another_in_any_architecture_that_shares_blocks(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(OF_GPT2 if kind == "gpt2" else SIZES))
    model = AutoModelForCausalLM.from_config(config).eval()
    shared, apart = samples(shared=True).batch(np.array([0, 1])), samples(shared=False)
    with torch.no_grad():
        found = model(**{n: torch.from_numpy(a) for n, a in shared.items() if n != "labels"}, use_cache=False).logits
        for number, (block, place) in enumerate([(0, 5), (0, 0), (1, 0), (1, 4)]):
            ids = torch.from_numpy(apart.batch(np.array([number]))["input_ids"][:, : LENGTHS[number]])
            own = model(input_ids=ids, use_cache=False).logits[0]
            assert torch.allclose(found[block, place : place + LENGTHS[number]], own, atol=1e-5), number


@pytest.mark.parametrize(
    "split",
    [
        {"training__micro_batch": 2},
        {"training__micro_batch": 4, "resources__workers": 2},
        {"training__micro_batch": 8, "deepspeed__zero_stage": 3, "training__activation_checkpointing": True},
    ],
)
def test_the_loss_is_the_mean_over_all_answers_of_the_batch_however_it_is_split(
    tmp_path: Path, split: dict[str, Any]
) -> None:
    job = chat(tmp_path / "whole", data__sequence_length=96, training__micro_batch=8)
    other = chat(tmp_path / "split", data__sequence_length=96, **split)
    run(job)
    run(other)
    counted = [int((batch["labels"] != NO_LABEL).sum()) for batch in blocks(job.data.path)]
    assert len(set(counted)) > 2, "blocks hold unequal numbers of answers' tokens, or this shows nothing"
    assert curve(other) == pytest.approx(curve(job), rel=2e-5)


def blocks(path: Path, split: Split = "train") -> list[dict[str, np.ndarray]]:
    found = open_split(path, split, masking=Masking(seed=0, rate=0.15))
    return [found.batch(np.array([number])) for number in range(len(found))]


def test_the_model_that_is_left_answers_by_its_template_and_measures_as_was_logged(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = chat(
        tmp_path / "run", data__sequence_length=96, training__steps=150, training__learning_rate=5e-3, method="full"
    )
    outcome = run(job)
    folder = job.run_folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses: list[float] = []
    texts = [json.loads(line)["messages"] for line in conversations().read_text().splitlines()]
    asked = tokenizer.apply_chat_template(texts[0][:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    said = model.generate(asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True).strip("!").isdigit()
    assert int(said[-1]) == tokenizer.eos_token_id, "it has learnt to end its turn"
    for arrays in blocks(job.data.path, "validation"):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            scores = model(**batch, use_cache=False).logits.log_softmax(-1)
        for row, column in (labels != NO_LABEL).nonzero().tolist():
            losses.append(-float(scores[row, column, labels[row, column]]))
    assert outcome.metrics["eval/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_conversation_that_a_template_refuses_is_named_by_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    odd = [{"role": "system", "content": "no"}, *turns]
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, turns, odd, turns)))
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ raise_exception('no system turns') }}{%- endif -%}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{%- endfor -%}"
    )
    with pytest.raises(DataError, match="does not take a conversation") as caught:
        chat(tmp_path / "run", data__train=str(file), data__chat_template=str(template))
    assert "row 3: no system turns" in str(caught.value)


def test_generation_stops_where_answers_were_trained_to_end_also_where_that_is_not_the_end_of_a_text(
    tmp_path: Path,
) -> None:
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    shutil.copytree(tokenizer_folder(), base)
    GPT2LMHeadModel(GPT2Config(**{**OF_GPT2, "vocab_size": 400}, eos_token_id=0, bos_token_id=0)).save_pretrained(base)
    job = chat(tmp_path / "run", model__base=str(base), data__chat_template="chatml", data__sequence_length=64)
    run(job)
    assert GenerationConfig.from_pretrained(job.run_folder / "model").eos_token_id == [0, 2], "and <|im_end|>"
