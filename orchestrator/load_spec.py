"""YAML file and `key=value` overrides to a `RunSpec`, with messages that name the key and the way out."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import SpecError
from orchestrator.method_names import AS_IS, EVALUATE
from orchestrator.methods.registry import METHODS, method_of
from orchestrator.spec import RunSpec, TrainingSpec, UntrainedRunSpec
from orchestrator.spec_evaluation import EvaluationSpec
from orchestrator.spec_stages import CYCLES, STAGES, StagesSpec
from orchestrator.yaml_file import parse_yaml, read_yaml

B = typing.TypeVar("B", bound=BaseModel)

MOST_PROBLEMS, LONGEST_PROBLEM, LONGEST_VALUE = 12, 500, 120
"""Of a message, in problems and characters: what a screen holds (a guess)."""

_TRAINING, _DATA = "training", "data"
_ALSO_ASKING = ("global_batch", "micro_batch", "precision", "seed", "masking_rate")
"""Fields of `training` that count where nothing is trained."""
_SAMPLES_ASKED = 64
"""Rows for each worker, shared out together, where no batch is given."""

_BRANCH = re.compile(r"[\[\]()]|^(int|float|str|literal|tuple|constrained-(int|float|str))$")
"""Names that pydantic gives to the branches of a union."""
_WANTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    "too_short": "a list of at least {min_length}",
    "finite_number": "a finite number",
    "string_type": "a text",
    "dict_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} on",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
}
"""What a field takes, by the kind of pydantic's error: its own words speak of Python."""


def load_spec(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunSpec:
    """The spec of one training or search in a YAML file, with `key=value` overrides applied.

    Raises SpecError when the file cannot be read, is not YAML, has an unknown key or an impossible value.
    """
    return spec_of_file(read_yaml(path), path, overrides)


def spec_of_file(raw: dict[str, Any], path: str | Path, overrides: typing.Sequence[str]) -> RunSpec:
    """See `load_spec`; `raw` is what the file holds."""
    if raw.get(STAGES) is not None:
        raise SpecError(
            "this command takes one training or search, and this spec has stages",
            got=str(path),
            allowed="commands that take stages: plan, run",
            do="give a spec with the fields of one stage, and as its model.base the model of the stage before",
        )
    for override in overrides:
        apply_override(raw, override)
    inline_deepspeed_file(raw, Path(path).parent)
    return parse_spec(raw, source=str(path))


def parse_spec(raw: dict[str, Any], source: str = "the spec") -> RunSpec:
    """A typed spec from a plain mapping; raises SpecError that names each wrong key."""
    spec: RunSpec
    if raw.get("kind") == EVALUATE:
        spec = parse_as(EvaluationSpec, _without_training({"method": AS_IS, **raw}), source)
    elif _trains(raw):
        spec = parse_as(RunSpec, raw, source)
    else:
        spec = parse_as(UntrainedRunSpec, _without_training(raw), source)
    if (problem := method_of(spec.method).problem(spec)) is not None:
        raise SpecError(f"{source}: {problem}")
    if spec.data.test is not None and (problem := _unmeasurable(spec)) is not None:
        raise SpecError(f"{source}: data.test is for a model that is left to be measured, and {problem}: remove it")
    return spec


def _unmeasurable(spec: RunSpec) -> str | None:
    """Why a run leaves no model that `kind: evaluate` could measure."""
    method = method_of(spec.method)
    if not method.trains:
        return f"method: {method.name} leaves none"
    return f"method: {method.name} leaves an adapter beside weights of 4 bits" if method.cost.is_quantised else None


def _trains(raw: dict[str, Any]) -> bool:
    return raw.get("method") not in [method.name for method in METHODS if not method.trains]


def _without_training(raw: dict[str, Any]) -> dict[str, Any]:
    """A spec whose method trains nothing: of its training counts what is no part of that, so that one file serves all
    methods. Keys that nobody knows stay, to be refused by their names."""
    given, resources, checkpoint = (raw.get(name) or {} for name in (_TRAINING, "resources", "checkpoint"))
    if not all(isinstance(block, dict) for block in (given, resources, checkpoint)):
        return raw  # to be refused
    workers = resources.get("workers")
    numbers = [one for one in (workers if isinstance(workers, list | tuple) else [workers]) if type(one) is int]
    batch = _SAMPLES_ASKED * max(1, *numbers, 1)
    kept = {
        name: value for name, value in given.items() if name in _ALSO_ASKING or name not in TrainingSpec.model_fields
    }
    return {
        **raw,
        _TRAINING: {"global_batch": batch, **kept, "steps": 0, "learning_rate": 0},
        "checkpoint": {name: value for name, value in checkpoint.items() if name != "keep"},
    }


def parse_as(kind: type[B], raw: dict[str, Any], source: str) -> B:
    """A block from a plain mapping; raises SpecError that names each wrong key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _spec_error(error, source) from error


def parse_value(text: str) -> Any:
    """The value on the right of `key=value`, read as YAML; raises SpecError when it is none."""
    return parse_yaml(text, source="the value")


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted path and the value of `a.b=value`. Raises SpecError when it is none."""
    path, found, text = override.partition("=")
    if not found or not path.strip():
        raise SpecError(
            "an override is key=value",
            got=override,
            do="for example training.learning_rate=3e-4 or training.tokens=null",
        )
    try:
        return path.strip(), parse_value(text)
    except SpecError as error:
        raise SpecError(
            f"the value of an override is not valid YAML: {error.got}",
            got=override,
            do='quote what YAML would read as structure, such as name="[a]"',
        ) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` in a nested mapping, in place; `null` clears. Raises SpecError when it cannot."""
    path, value = parse_override(override)
    set_path(raw, path, value)
    *parents, last = path.split(".")
    if value is None and not takes_null((*parents, last)):
        where = raw
        for part in parents:
            where = where[part]
        del where[last]


def takes_null(place: tuple[str, ...]) -> bool:
    """Whether null is a value of a field, and does not leave it to its default. One that nobody knows keeps its null,
    to be refused by its name."""
    block = block_at(place[:-1])
    field = None if block is None else block.model_fields.get(place[-1])
    return field is None or type(None) in typing.get_args(field.annotation)


def set_path(raw: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path in a nested mapping, in place. Raises SpecError when a parent is not a mapping."""
    *parents, last = path.split(".")
    where = raw
    for depth, key in enumerate(parents):
        child = where.get(key)
        if child is None or (child == "auto" and key == "deepspeed"):
            child = where[key] = {}
        if not isinstance(child, dict):
            raise SpecError(
                f"{path} cannot be set: {'.'.join(parents[: depth + 1])} is not a block", got=f"{key}: {child}"
            )
        where = child
    where[last] = value


def inline_deepspeed_file(raw: dict[str, Any], folder: Path) -> None:
    """Replaces `deepspeed: FILE.json` by what the file holds, so that the spec says everything itself."""
    name = raw.get("deepspeed")
    if not isinstance(name, str) or name == "auto":
        return
    candidates = [Path(name), folder / name]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise SpecError("deepspeed names no file", got=name, allowed="auto, a mapping, or the path of a JSON file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{file} is not valid JSON", got=str(error)) from error
    if not isinstance(content, dict):
        raise SpecError(f"{file} must hold a JSON object", got=type(content).__name__)
    raw["deepspeed"] = content


def _spec_error(error: ValidationError, source: str) -> SpecError:
    """One readable error from pydantic's list: a lone problem in full, several as lines."""
    by_path: dict[str, list[dict[str, Any]]] = {}
    for item in error.errors():
        by_path.setdefault(_dotted(tuple(item["loc"])), []).append(dict(item))
    problems = [
        _describe(items[0]) if len(items) == 1 else _describe_choice(path, items) for path, items in by_path.items()
    ]
    what, got, allowed, do = problems[0]
    if len(problems) == 1:
        return SpecError(f"{source}: {what}", got=got, allowed=allowed, do=do)
    lines = [
        f"\n  - {w[:LONGEST_PROBLEM]}"
        + (f" (got {g})" if g else "")
        + (f"; {d}" if d else f"; allowed: {a}" if a else "")
        for w, g, a, d in problems[:MOST_PROBLEMS]
    ]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"\n  - and {len(problems) - MOST_PROBLEMS} more")
    return SpecError(f"{source} has {len(problems)} problems:{''.join(lines)}")


def _describe(item: dict[str, Any]) -> tuple[str, str | None, str | None, str | None]:
    """(what, got, allowed, do) of one pydantic error."""
    place = tuple(item["loc"])
    path = _dotted(place)
    given = item.get("input")
    shown = None if given is None or isinstance(given, dict | list | BaseModel) else _short(given)
    if item["type"] == "extra_forbidden":
        valid = _fields_at(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), valid, n=1, cutoff=0.5)
        fix = f"did you mean {_dotted((*place[:-1], near[0]))}?" if near else "remove it"
        return f"unknown key {path}", None, ", ".join(valid), fix
    if item["type"] == "missing":
        return f"{path} is required", None, None, f"add {path}"
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        return (f"{path}: {text}" if path and not text.startswith(path) else text), None, None, None
    if item["type"] == "model_type":
        fields = _fields_at(place)
        return f"{path} is a block of fields", shown, ", ".join(fields), f"for example {path}.{fields[0]}: ..."
    if item["type"] == "string_type" and isinstance(given, bool | int | float):
        # YAML reads yes, no, on and off as truth, and digits as a number.
        return f"{path} is a text, and YAML reads a {type(given).__name__} here", shown, None, "put it in 'quotes'"
    if (wanted := _wanted(item)) is not None:
        return f"{path} does not take this value", None if given is None else _short(given), wanted, None
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}", shown, None, None


def _describe_choice(path: str, items: list[dict[str, Any]]) -> tuple[str, str | None, str | None, str | None]:
    """One problem of a field that takes one of several kinds of value: pydantic complains once for each kind."""
    kinds = [_wanted(item) or item["msg"].removeprefix("Input should be ").partition(",")[0] for item in items]
    return f"{path} does not take this value", _short(items[0].get("input")), " or ".join(dict.fromkeys(kinds)), None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes out
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _wanted(item: dict[str, Any]) -> str | None:
    """What a field takes, where pydantic's error is of a kind that we have words for."""
    words = _WANTED.get(item["type"])
    return None if words is None else words.format(**item.get("ctx", {}))


def _dotted(place: tuple[Any, ...]) -> str:
    """A pydantic location as a dotted path, without the names of union branches."""
    return ".".join(str(part) for part in place if not _BRANCH.search(str(part)))


def _fields_at(place: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the block at a location, in the order of the class; none where there is no block."""
    block = block_at(place)
    return [] if block is None else list(block.model_fields)


def block_at(place: tuple[Any, ...]) -> type[BaseModel] | None:
    """The class of the block at a place in a spec; None where there is no block."""
    block: type[BaseModel] | None = RunSpec
    for part in place:
        field = None if block is None else block.model_fields.get(str(part))
        block = None if field is None else _block_type(field.annotation)
    return block


def _block_type(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a spec file, for editors; `deepspeed` also takes `auto` or a file name."""
    schema = RunSpec.model_json_schema()
    schema["title"] = "orchestrator run spec"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    deepspeed = schema["properties"]["deepspeed"]
    description = deepspeed.pop("description", "")
    deepspeed.pop("default", None)
    block = schema["$defs"]["DeepSpeedSpec"]
    block["additionalProperties"] = True
    schema["properties"]["deepspeed"] = {
        "description": description,
        "default": "auto",
        "anyOf": [{"$ref": "#/$defs/DeepSpeedSpec"}, {"type": "string"}],
    }
    return _with_stages(schema)


def _with_stages(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a file that may have stages, which share the fields beside them: what a training needs is needed
    beside no stages only, also in the blocks that every training has."""
    fields = StagesSpec.model_json_schema()["properties"]
    blocks = {name: found for name in schema["required"] if (found := block_at((name,))) is not None}
    needed = {name: {"required": needs} for name, one in blocks.items() if (needs := _taken_out(schema, one))}
    stage = {"type": "object", "properties": {key: {"$ref": f"#/properties/{key}"} for key in schema["properties"]}}
    fields[STAGES]["items"] = {**stage, "required": ["name"], "additionalProperties": False}
    schema["properties"] |= {STAGES: fields[STAGES], CYCLES: fields[CYCLES]}
    schema["if"] = {"required": [STAGES]}
    schema["then"] = {"required": ["name"]}
    # A method that trains nothing needs no `training`, and what is only measured no data to train on.
    always = [name for name in schema.pop("required") if name != _TRAINING]
    training = {"required": [_TRAINING], "properties": {_TRAINING: needed.pop(_TRAINING)}}
    asks = {"required": ["method"], "properties": {"method": {"enum": [m.name for m in METHODS if not m.trains]}}}
    trained = {"properties": {_DATA: needed.pop(_DATA)}, "if": asks, "else": training}
    measured = {"required": ["kind"], "properties": {"kind": {"const": EVALUATE}}}
    schema["else"] = {"required": always, "properties": needed, "if": measured, "else": trained}
    return schema


def _taken_out(schema: dict[str, Any], block: type[BaseModel]) -> list[str]:
    needs: list[str] = schema["$defs"][block.__name__].pop("required", [])
    return needs
