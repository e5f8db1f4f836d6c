"""Specs gone wrong: the shipped ones with fields dropped, added, retyped and made extreme, and YAML gone wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

import yaml

from orchestrator.load_spec import set_path
from orchestrator.method_names import MethodName
from orchestrator.spec import RunSpec
from tests.fuzz.case import Case
from tests.fuzz.values import WORDS, any_value, near_number
from tests.specs import CLASSIFY, PRETRAIN

CONFIGS = Path(__file__).parents[2] / "configs"
_LARGE = {"sysconfig://stdlib/**/*.py": "corpus", "configs/data/movie-reviews/reviews.csv": "rows.csv"}
"""Data of the shipped specs, and what stands for it here."""


def _with_small_data(text: str) -> str:
    for large, small in _LARGE.items():
        text = text.replace(large, small)
    return text


BASE_TEXTS = tuple(_with_small_data(file.read_text()) for file in sorted(CONFIGS.glob("*/*.yaml")))
BASES: tuple[dict[str, Any], ...] = (*map(yaml.safe_load, BASE_TEXTS), PRETRAIN, CLASSIFY)
_ROWS = "".join(f"{'good' if n % 3 else 'bad'} words of row {n},{'no' if n % 3 else 'yes'}\n" for n in range(60))
WITH_DATA = 0.25
DATA = {
    "rows.csv": ("text,label\n" + _ROWS).encode(),
    "corpus/one.txt": (_ROWS * 9).encode(),
    "corpus/two.txt": b"a short one",
}
"""What the specs train on, when it is there."""


def _paths(block: Any, prefix: str = "") -> Iterator[str]:
    for name, field in block.model_fields.items():
        yield f"{prefix}{name}"
        default = field.default
        inner = getattr(field.annotation, "model_fields", None) or getattr(type(default), "model_fields", None)
        if inner:
            owner = field.annotation if hasattr(field.annotation, "model_fields") else type(default)
            yield from _paths(owner, f"{prefix}{name}.")


FIELDS = tuple(_paths(RunSpec))
SEARCHED = (
    "training.learning_rate",
    "training.global_batch",
    "method",
    "model.vocab_size",
    "data.sequence_length",
    "x",
)
DISTRIBUTIONS = ("grid", "choice", "uniform", "loguniform", "int_uniform", "normal")
DEVICES = ("H100", "A100", "T4", "V100", "h100", "TPU v4", "cpu", "nothing", "", "é")

YAML_PIECES = (
    *(
        "\t",
        "  \t",
        ":",
        ": ",
        "- ",
        "'",
        '"',
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "*b",
        "!!int x",
        "!!float x",
        "!!bool x",
    ),
    *(
        "!!timestamp x",
        "!!binary x",
        "!!python/object:os.system x",
        "!x ",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
    ),
    *("!!null x", "!!str 5", "!!seq 5", "!!map 5", "2026-99-99", "0b2", "0o9", "1:99:99", "9" * 5000, "---\n", "...\n"),
    *(
        "<<: *a\n",
        "<<: 3\n",
        "<<: [1]\n",
        "? [a]\n",
        "? {a: b}\n",
        "? \n",
        "|\n",
        ">-\n",
        "%YAML 9.9\n",
        "%TAG x\n",
        "#",
    ),
    *("\x00", "\x07", "\ufeff", "\u2028", "\x85", "\r", "\r\n", "\n\n", "name: twice\n", "training:\n", ", ", "@", "`"),
    *("\\", '"\\x"', '"\\u12"', "'\n", "é", "~", "null", "=", ".inf", ".nan", "1e999", "<<", "&a &b ", "- - - - "),
)
WHOLE = (
    *(
        "",
        " ",
        "\n",
        "# only a comment\n",
        "---\n",
        "--- \n...\n",
        "null",
        "3",
        "text",
        "- a\n- b\n",
        "a",
        "'",
        '"',
        "{",
        "[",
    ),
    *(
        "{}",
        "[]",
        "? a",
        "a: b: c",
        "a:\n\tb: 1",
        "a: 1\n b: 2",
        "a: 1\n---\nb: 2\n",
        "\ufeffname: x\n",
        "a: &a [*a]\n",
    ),
    *(
        "a: &a {b: *a}\n",
        "&a [*a]",
        "*a",
        "a: &a 1\nb: *c\n",
        "&x a: 1\n*x : 2\n",
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000,
    ),
    *(
        "a: [1\nb: 2\n",
        "a: 'x\nb: y\n",
        "%YAML 1.3\n---\na: 1\n",
        "!!map [a]",
        "!!python/none x",
        "a: !!int ''\n",
        "\x00",
    ),
    *(
        "name: 2026-02-30\n",
        "name: !!timestamp 2026\n",
        "? [1, 2]\n: 3\n",
        "{[1]: 2}",
        "{{a: 1}: 2}",
        "a: 1\na: 2\n",
        "- a: 1",
    ),
    *(
        "<<: {a: 1}\n",
        "<<: {<<: {<<: 1}}\n",
        "a: 0x\n",
        "a: 1__0\n",
        "a: ._\n",
        "a: -_\n",
        "a: 0b\n",
        "a: +\n",
        "a: 1:60\n",
    ),
)


def laughs(levels: int, width: int, *, merged: bool = False) -> str:
    """Aliases of aliases, `width` to the power of `levels` nodes from a few lines."""
    lines = ["a0: &a0 {x: 1}" if merged else "a0: &a0 [x, x]"]
    for level in range(1, levels):
        refs = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{refs}], y{level}: 1}}" if merged else f"[{refs}]"))
    return "\n".join(lines) + "\n"


def spec_case(random: Random) -> Case:
    """`plan` of a spec that is mostly wrong, with overrides that may be, or of one with values out of proportion."""
    if random.random() < 0.45:
        return _out_of_proportion(random)
    content = random.choices((_mutated, _broken_text, _strange_text), weights=(70, 18, 12))[0](random)
    arguments = ["plan", "spec.yaml", *(_override(random) for _ in range(random.choice((0, 0, 0, 0, 1, 1, 2, 4))))]
    if random.random() < 0.3:
        arguments += ["--gpu", random.choice(DEVICES)]
        if random.random() < 0.7:
            arguments += ["--gpus", str(random.choice((1, 2, 4, 8, 64, 512, 0, -1, 10**6, 10**12)))]
        if random.random() < 0.3:
            arguments += ["--nodes", str(random.choice((1, 2, 8, 0, -3, 10**9)))]
    if random.random() < 0.5:
        arguments.append("--json")
    return Case(arguments=tuple(arguments), files=_beside_data(random, content))


def _beside_data(random: Random, content: bytes) -> dict[str, bytes]:
    return {"spec.yaml": content, **(DATA if random.random() < WITH_DATA else {})}


def _out_of_proportion(random: Random) -> Case:
    value = copy.deepcopy(random.choice(BASES))
    value.pop("deepspeed", None)
    if random.random() < 0.8:
        value["resources"] = {"workers": 1}
    _gently(random, value)
    arguments = ["plan", "spec.yaml"]
    if random.random() < 0.6:
        gpus, nodes = random.choice(((1, 1), (8, 1), (8, 2), (64, 8), (10**6, 1000), (10**6, 1), (5040, 630)))
        arguments += ["--gpu", random.choice(DEVICES[:5]), "--gpus", str(gpus), "--nodes", str(nodes)]
    if random.random() < 0.5:
        arguments.append("--json")
    return Case(arguments=tuple(arguments), files=_beside_data(random, yaml.dump(value, sort_keys=False).encode()))


def _mutated(random: Random) -> bytes:
    value = copy.deepcopy(random.choice(BASES))
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 6))):
        random.choices((_set, _drop, _add_key, _search, _deepspeed, _retype), weights=(60, 8, 6, 12, 8, 6))[0](
            random, value
        )
    try:
        text = yaml.dump(value, sort_keys=False, allow_unicode=random.random() < 0.5)
    except (yaml.YAMLError, TypeError):
        text = repr(value)
    return text.encode("utf-8", errors="surrogatepass")


SIZES = (
    1,
    2,
    3,
    4,
    6,
    7,
    8,
    16,
    30,
    60,
    64,
    97,
    120,
    1000,
    4096,
    5040,
    65536,
    720720,
    10**6,
    73513440,
    99999989,
    10**8,
)
RATES = (1e-30, 1e-12, 1e-8, 1e-3, 0.1, 1, 3.5, 1000, 1e6)
WORKERS = (1, 2, 3, 8, 97, "auto", [1, 4], [1, 1000], [2, 10**6], [10**6, 10**6], [999, 5040], [1, 2], 10**6, 5040)
GENTLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("data.sequence_length", "training.global_batch", "model.vocab_size", "training.micro_batch"), SIZES
    ),
    **dict.fromkeys(("training.steps", "training.tokens", "training.eval_every_steps"), (*SIZES, 10**12, 10**15)),
    **dict.fromkeys(("training.epochs", "training.learning_rate", "lora.alpha", "training.weight_decay"), RATES),
    "export": ("auto", "merged", "adapter", "both"),
    "lora.targets": ("all-linear", "attention", ["query"], ["c_attn", "nothing"], []),
    "lora.dora": (True, False),
    "layerwise": ({"decay": 1e-30}, {"decay": 0.5, "unfreeze_fraction": 0.999999}, {"unfreeze_fraction": 1e-30}),
    **dict.fromkeys(("last_layers.layers", "prefix.tokens", "prompt_tuning.tokens"), (1, 2, 100, 10**4)),
    **dict.fromkeys(("lora.rank", "checkpoint.keep", "resources.max_failures"), (1, 2, 1000, 10**6)),
    "resources.workers": WORKERS,
    "resources.cpus_per_worker": (1, 2, 8, 10_000),
    "resources.gpus_per_worker": (0, 1, "auto"),
    "resources.usd_per_device_hour": (0, 1e-30, 1, 1e6),
    "budget": ("50usd", "1e-9usd", ".001usd", "8hours", "1e-9hours", "1e40flops", "1flops", "1e40usd", "1e-9gpu-hours"),
    "training.precision": ("auto", "fp32", "bf16", "fp16"),
    "deepspeed": ("auto", {"zero_stage": 0}, {"zero_stage": 3, "offload": "all"}, {"offload": "optimizer"}),
    "training.activation_checkpointing": (True, False, "auto"),
    "method": get_args(MethodName),
    "training.warmup_fraction": (0, 1e-300, 0.5, 0.9999999999999999),
    "data.validation_fraction": (1e-300, 0.5, 0.9999999999999999),
    "model.overrides": (
        {"n_layer": 10**6},
        {"n_embd": 10**9, "n_head": 1},
        {"n_head": 10**9},
        {"n_layer": 0},
        {"n_embd": -4},
        {"n_layer": "x"},
        {"n_embd": 2.5},
        {"resid_pdrop": 5},
        {"n_inner": 10**18},
        {"n_positions": 1},
        {"n_positions": "x"},
        {"n_inner": "x"},
        {"activation_function": 3},
        {"n_layer": True},
        {"tie_word_embeddings": "x"},
        {"vocab_size": 5},
        {"n_embd": 10**30, "n_head": 10**30},
    ),
    "model.config": ("gpt2", "llama", "bert", "roberta"),
}
"""Values that the types of the fields take, so that the planner meets them."""


def _gently(random: Random, value: dict[str, Any]) -> None:
    for path in random.sample(list(GENTLE), random.choice((1, 1, 2, 3))):
        chosen = random.choice(GENTLE[path])
        training = value.setdefault("training", {})
        if path in ("training.steps", "training.tokens", "training.epochs"):
            for other in ("steps", "tokens", "epochs"):
                training.pop(other, None)
        if path == "resources.workers" and random.random() < 0.8:
            most = chosen[1] if isinstance(chosen, list) else chosen if isinstance(chosen, int) else 64
            training["global_batch"] = random.choice([n for n in SIZES if n % most == 0] or [most])
        set_path(value, path, copy.deepcopy(chosen))


def _set(random: Random, value: dict[str, Any]) -> None:
    *parents, last = random.choice(FIELDS).split(".")
    where = value
    for key in parents:
        child = where.get(key)
        if not isinstance(child, dict):
            child = where[key] = {}
        where = child
    where[last] = near_number(random) if random.random() < 0.25 else any_value(random)


def _places(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict):
        return []
    return [(value, key) for key in value] + [place for child in value.values() for place in _places(child)]


def _drop(random: Random, value: dict[str, Any]) -> None:
    places = _places(value)
    if places:
        owner, key = random.choice(places)
        del owner[key]


def _retype(random: Random, value: dict[str, Any]) -> None:
    places = _places(value)
    if places:
        owner, key = random.choice(places)
        changes: tuple[Callable[[Any], Any], ...] = (str, repr, lambda x: [x], lambda x: {"x": x}, lambda x: [x] * 50)
        owner[key] = random.choice(changes)(owner[key])


def _add_key(random: Random, value: dict[str, Any]) -> None:
    blocks = [value, *(child for child in value.values() if isinstance(child, dict))]
    random.choice(blocks)[random.choice((*WORDS[:40], 3, None, True, 1.5))] = any_value(random)


def _search(random: Random, value: dict[str, Any]) -> None:
    value["search"] = {
        "space": {random.choice(SEARCHED): _distribution(random) for _ in range(random.randrange(1, 4))},
        "scheduler": "none",
        "samples": random.choice((1, 1, 2, 5, 1000, 10**9)),
    }
    value["resources"] = {"workers": 1}
    if random.random() < 0.3:
        value["search"][random.choice(("seed", "grace_steps", "max_concurrent", "metric", "space"))] = any_value(random)


def _distribution(random: Random, depth: int = 0) -> Any:
    if random.random() < 0.08:
        return any_value(random)
    kind = random.choice(DISTRIBUTIONS)
    if kind in ("grid", "choice"):
        if depth < 3 and random.random() < 0.3:
            own = {random.choice(SEARCHED): _distribution(random, depth + 1)}
            return {kind: {random.choice(("full", "lora", 3, None)): random.choice((own, {}, None, any_value(random)))}}
        return {kind: [any_value(random) for _ in range(random.choice((0, 1, 3, 40)))]}
    return {kind: [any_value(random) if random.random() < 0.5 else near_number(random) for _ in range(2)]}


def _deepspeed(random: Random, value: dict[str, Any]) -> None:
    keys = ("zero_stage", "offload", "raw", "zero_optimization", "train_batch_size", "comms_logger", "steps_per_print")
    value["deepspeed"] = {random.choice(keys): any_value(random) for _ in range(random.randrange(1, 4))}


def _broken_text(random: Random) -> bytes:
    text = random.choice(BASE_TEXTS)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(text) + 1)
        end = min(len(text), at + random.choice((0, 1, 1, 5, 80)))
        text = text[:at] + random.choice((random.choice(YAML_PIECES), "")) + text[end:]
    content = text.encode("utf-8", errors="surrogatepass")
    encoding = random.random()
    if encoding < 0.05:
        return text.encode("utf-16")
    if encoding < 0.08:
        return text.encode("latin-1", errors="replace") + b"# \xe9\xff\n"
    if encoding < 0.10:
        return b"\xef\xbb\xbf" + content
    return content


def _strange_text(random: Random) -> bytes:
    pick = random.random()
    if pick < 0.15:
        text = laughs(random.randrange(2, 40), random.randrange(2, 12), merged=random.random() < 0.5)
        return (text + random.choice(BASE_TEXTS)).encode()
    if pick < 0.4:
        return (random.choice(BASE_TEXTS) + "\n" + random.choice(WHOLE)).encode("utf-8", errors="surrogatepass")
    if pick < 0.5:
        merged = "defaults: &d {steps: 3, global_batch: 4, learning_rate: 1e-3}\n"
        rest = "name: m\nkind: pretrain\nmodel: {config: gpt2}\ndata: {train: x}\ntraining: {<<: *d}\n"
        return (merged + rest).encode()
    return random.choice(WHOLE).encode("utf-8", errors="surrogatepass")


def _override(random: Random) -> str:
    path = random.choice(FIELDS)
    if random.random() < 0.15:
        path = random.choice(
            (*WORDS[:30], "", "a..b", ".", "training.", "search.space.a.b.c", "__class__.x", "model.x.y")
        )
    if random.random() < 0.05:
        return path
    value = near_number(random) if random.random() < 0.3 else any_value(random)
    if random.random() < 0.2:
        return f"{path}={random.choice(YAML_PIECES)}"
    try:
        text = str(value) if len(str(value)[:10]) else ""
    except ValueError:  # more digits than Python writes at once
        text = "9" * 5000
    return f"{path}={text}".replace("\x00", "")
