from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.load_spec import apply_override, parse_spec
from tests.specs import PRETRAIN, raw

BEYOND_USE = {
    "training.steps": "1e16",
    "data.sequence_length": "1e9",
    "training.global_batch": "1e12",
    "training.micro_batch": "1e12",
    "training.learning_rate": "1e30",
    "training.seed": "4294967296",
    "training.weight_decay": "1e7",
    "lora.rank": "1e7",
    "resources.workers": "1e7",
    "resources.cpus_per_worker": "1e6",
    "resources.max_failures": "1e9",
    "resources.capacity_timeout_s": "1e10",
    "resources.hang_timeout_s": "1e10",
    "resources.usd_per_device_hour": "1e9",
    "checkpoint.keep": "1e9",
    "checkpoint.every_steps": "1e300",
    "model.vocab_size": "1e400",
    "data.max_train_examples": "9" * 400,
    "budget": "1e300usd",
}


def refusal(value: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(value)
    return str(caught.value)


@pytest.mark.parametrize("path", BEYOND_USE)
def test_a_number_beyond_all_use_is_refused_by_its_field(path: str) -> None:
    value = raw(PRETRAIN)
    apply_override(value, f"{path}={BEYOND_USE[path]}")
    assert path in refusal(value)


FLOATS = (
    *("training.learning_rate", "training.epochs", "training.weight_decay", "training.gradient_clip", "lora.alpha"),
    *("training.adam_beta1", "training.adam_epsilon", "training.warmup_fraction", "data.validation_fraction"),
    *("resources.capacity_timeout_s", "resources.hang_timeout_s", "resources.usd_per_device_hour", "lora.dropout"),
    "model.overrides.resid_pdrop",
)


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize("path", FLOATS)
def test_infinity_and_what_is_no_number_are_refused_by_every_field(path: str, number: str) -> None:
    value = raw(PRETRAIN)
    apply_override(value, f"{path}={number}")
    assert path in refusal(value)


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_is_none_is_refused_also_deep_in_deepspeed_keys(number: float) -> None:
    text = refusal(raw(PRETRAIN, deepspeed={"comms_logger": {"ratios": [1.0, number]}}))
    assert "deepspeed.comms_logger.ratios.1 is no finite number" in text


def test_a_batch_split_over_a_million_workers_is_checked_at_once() -> None:
    value = raw(PRETRAIN, training__global_batch=99_999_989, resources={"workers": [3, 10**6]})
    assert "cannot be split over any number of workers from 3 to 1000000" in refusal(value)
    parse_spec(raw(PRETRAIN, training__global_batch=73_513_440, resources={"workers": [3, 10**6]}))


def test_a_bare_no_or_a_number_for_a_text_says_to_quote_it() -> None:
    value = raw(PRETRAIN)
    apply_override(value, "tracking.experiment=no")
    text = refusal(value)
    assert "tracking.experiment is a text, and YAML reads a bool here" in text
    assert "put it in 'quotes'" in text
