"""Command lines of `advise` and `estimate` with options that contradict each other, or are out of all proportion."""

from __future__ import annotations

from random import Random

from tests.fuzz.case import Case
from tests.fuzz.values import NUMBERS, WORDS

COUNTS = (
    *(
        "1",
        "2",
        "3",
        "7",
        "100",
        "2000",
        "1k",
        "10k",
        "1M",
        "20M",
        "125M",
        "1.5B",
        "7B",
        "70B",
        "1T",
        "1e12",
        "1e15",
        "40T",
    ),
    *(
        "0",
        "1e18",
        "1e30",
        "1e38",
        "1e100",
        "1e300",
        "1e400",
        "-1",
        "0.5",
        "1.5",
        "nan",
        "inf",
        "",
        " ",
        "x",
        "1e",
        "10 M",
    ),
    "9" * 40,
)
BUDGETS = (
    *(
        "500usd",
        "20usd",
        "1usd",
        ".001usd",
        "0.001usd",
        "1e-9usd",
        "1e15usd",
        "1e40usd",
        "100gpu-hours",
        "1e-6gpu-hours",
    ),
    *("1e20flops", "1flops", "1e40flops", "8hours", "0.01hours", "1e9hours", "1_000usd", "5USD", "5 usd", "1e-9hours"),
    *("0usd", "1e-300usd", "1e300usd", "1e400usd", "1e308flops", "-1usd", "usd", "5", "nanusd", "infhours", ""),
    "9" * 400 + "usd",
)
DEVICES = ("H100", "A100", "T4", "V100", "RTX 4090", "L4", "cpu", "TPU v4", "MI300X", "nothing", "")
TASKS = ("causal-lm", "masked-lm", "text-classification", "chat", "image-classification", "x")
METHODS = ("full", "lora", "qlora", "prefix", "prompt", "ia3", "adapter", "head", "scratch", "x")
SMALL = ("1", "2", "4", "8", "64", "1000", "0", "-1", "1000000", "1000000000000", "99999999999999999999", "x", "1.5")

ADVISE: dict[str, tuple[float, tuple[str, ...], int]] = {
    "--examples": (0.5, COUNTS, 18),
    "--tokens": (0.4, COUNTS, 18),
    "--task": (0.4, TASKS, 4),
    "--labels-per-class": (0.15, COUNTS, 14),
    "--classes": (0.25, COUNTS[1:], 12),
    "--base-params": (0.5, COUNTS, 18),
    "--base-tokens": (0.2, COUNTS, 18),
    "--domain-distance": (0.3, ("same", "near", "far", "x"), 3),
    "--unlabeled-tokens": (0.2, COUNTS, 18),
    "--budget": (0.6, BUDGETS, 20),
    "--gpu": (0.5, DEVICES, 9),
    "--gpus": (0.3, SMALL, 6),
    "--goal": (0.4, ("quality", "cost", "retain", "x"), 3),
    "--inference-tokens": (0.25, COUNTS, 18),
}
ESTIMATE: dict[str, tuple[float, tuple[str, ...], int]] = {
    "--params": (1.0, COUNTS, 17),
    "--tokens": (1.0, COUNTS, 18),
    "--gpu": (1.0, DEVICES, 9),
    "--gpus": (0.6, SMALL, 6),
    "--nodes": (0.1, SMALL, 4),
    "--method": (0.5, METHODS, 9),
    "--precision": (0.3, ("fp32", "bf16", "fp16", "x"), 3),
    "--optimizer": (0.2, ("adamw", "adamw-8bit", "paged-adamw", "x"), 3),
    "--zero-stage": (0.3, ("0", "1", "2", "3", "4", "-1"), 4),
    "--offload": (0.15, ("none", "optimizer", "all", "x"), 3),
    "--seq": (0.3, COUNTS, 12),
    "--micro-batch": (0.3, SMALL, 6),
    "--layers": (0.06, SMALL, 6),
    "--hidden": (0.06, ("768", "4096", *SMALL), 7),
    "--heads": (0.06, SMALL, 5),
    "--kv-heads": (0.05, SMALL, 4),
    "--vocab": (0.08, COUNTS, 12),
    "--lora-rank": (0.2, SMALL, 6),
}
"""Option: how often it is given, its values, and how many of them, the first, can be meant."""


def option_case(random: Random) -> Case:
    """`advise` or `estimate` from options alone, half of them with values that cannot be meant."""
    command, options = random.choice((("advise", ADVISE), ("estimate", ESTIMATE)))
    wild = random.random() < 0.35
    arguments = [command]
    for option, (chance, values, meant) in options.items():
        if random.random() < chance:
            strange = wild and random.random() < 0.3
            arguments += [
                option,
                _strange(random) if strange and random.random() < 0.5 else _chosen(random, values, strange, meant),
            ]
    flags = ("--no-base-model",) if command == "advise" else ("--activation-checkpointing", "--master-weights")
    arguments += [
        flag for flag in flags if random.random() < (0.15 if "--base-params" not in arguments or wild else 0.0)
    ]
    if wild and command == "advise" and random.random() < 0.2:
        arguments += ["--base-model", random.choice(WORDS)]
    if random.random() < 0.6:
        arguments.append("--json")
    return Case(arguments=tuple(arguments))


def _chosen(random: Random, values: tuple[str, ...], strange: bool, meant: int) -> str:
    return random.choice(values if strange else values[:meant])


def _strange(random: Random) -> str:
    try:
        return str(random.choice((random.choice(NUMBERS), random.choice(WORDS))))
    except ValueError:  # more digits than Python writes at once
        return "9" * 5000
