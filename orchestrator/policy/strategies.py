"""The six strategies as data: what each needs, what is trained, what it risks.

Nothing here decides. `labelled_quality` and `language_quality` say what each is expected to give, `pricing` what it
takes, `advise` compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["prompt", "features", "peft", "full", "continued", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way from a dataset to a model that does the task."""

    name: Name
    title: str
    needs_base: bool
    needs_labels: bool
    """Whether raw text alone is not enough."""
    trains: Literal["nothing", "head", "lora", "full"]
    """Which weights learn; also the method that time and memory are estimated for."""
    needs: str
    gives: str
    risks: str


STRATEGIES: dict[Name, Strategy] = {
    one.name: one
    for one in (
        Strategy(
            name="prompt",
            title="prompt the base model",
            needs_base=True,
            needs_labels=False,
            trains="nothing",
            needs="a base model large enough to follow a prompt; no training data",
            gives="an answer today; its quality is the base model's and does not grow with data",
            risks="chance level below about a billion parameters; every request pays for its prompt",
        ),
        Strategy(
            name="features",
            title="train a head on frozen features",
            needs_base=True,
            needs_labels=True,
            trains="head",
            needs="a base encoder near the domain, a few labels a class",
            gives="the best use of a handful of labels; forward passes alone over the base",
            risks="underfits a far domain, and stops improving where fine-tuning goes on",
        ),
        Strategy(
            name="peft",
            title="fine-tune adapters (LoRA)",
            needs_base=True,
            needs_labels=False,
            trains="lora",
            needs="the base model's weights in memory once; a learning rate about ten times that of full fine-tuning",
            gives="about what full fine-tuning gives while the data fits the adapter, and keeps more of the base",
            risks="falls behind when the data exceeds the adapter's capacity, as in continued pretraining",
        ),
        Strategy(
            name="full",
            title="fine-tune all weights",
            needs_base=True,
            needs_labels=False,
            trains="full",
            needs="memory for weights, gradients and optimizer",
            gives="the most from thousands of labels, or from in-domain text",
            risks="overfits a few examples, and forgets what the base could do",
        ),
        Strategy(
            name="continued",
            title="continue pretraining with replay, then fine-tune",
            needs_base=True,
            needs_labels=False,
            trains="full",
            needs="raw text of the domain, and old data to replay",
            gives="closes the gap to a far domain; worth most where labels are few",
            risks="forgetting without replay; useless when the domain is near or the text is not of the domain",
        ),
        Strategy(
            name="scratch",
            title="pretrain from scratch",
            needs_base=False,
            needs_labels=False,
            trains="full",
            needs="data in the order of what a base model has seen, and the compute to match",
            gives="a model that owes nothing to a base: own vocabulary, own licence, own domain",
            risks="overfits repeated data; costs most",
        ),
    )
}

# From the least commitment to the most: among equals the earlier is advised.
ORDER: tuple[Name, ...] = ("prompt", "features", "full", "peft", "continued", "scratch")
