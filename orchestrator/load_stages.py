"""A YAML file with `stages:` to a `StagedSpec`: every stage is checked as a whole spec, whatever comes before it.

A stage's fields are laid over those that all share, block by block, as `key=value` overrides are;
`stages.NAME.key=value` sets a field of one stage.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.load_spec import (
    apply_override,
    block_at,
    inline_deepspeed_file,
    parse_as,
    parse_override,
    parse_spec,
    set_path,
    spec_of_file,
    takes_null,
)
from orchestrator.methods.registry import method_of
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import CYCLES, STAGES, Stage, StagedSpec, StagesSpec
from orchestrator.yaml_file import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Of a stage: as that of a run, without the dot that parts it from the run's and from its fields."""
_OF_THE_WHOLE = ("budget", "tracking", STAGES, CYCLES)
"""Fields that no stage has for itself."""


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec | StagedSpec:
    """The spec in a YAML file with `key=value` overrides applied, of stages where it has any.

    Raises SpecError as `load_spec` does, with the name of the stage that is wrong.
    """
    raw = read_yaml(path)
    if raw.get(STAGES) is None:
        return spec_of_file(raw, path, overrides)
    for override in overrides:
        _apply(raw, override)
    return parse_stages(raw, source=str(path), folder=Path(path).parent)


def parse_stages(raw: Mapping[str, Any], *, source: str = "the spec", folder: Path = Path()) -> StagedSpec:
    """The stages of a plain mapping, over all cycles; files that they name lie in `folder`, if not where it says.

    Raises SpecError that names the stage and each wrong key.
    """
    shared = {key: value for key, value in raw.items() if key not in (STAGES, CYCLES)}
    found = parse_as(StagesSpec, {key: raw[key] for key in (STAGES, CYCLES) if raw.get(key) is not None}, source)
    if not isinstance(shared.get("name"), str):
        raise SpecError(f"{source}: the whole needs a name", got=shared.get("name"), do="add name beside stages")
    if shared.get("search") is not None:
        raise _no_search(source)
    _check_names(found.stages, source)
    stages: list[Stage] = []
    for cycle in range(1, found.cycles + 1):
        for own in found.stages:
            before = stages[-1] if stages else None
            stages.append(_stage(shared, own, cycle, found.cycles, before, source, folder))
    for stage, after in itertools.pairwise(stages):
        _check_followed(stage, after, source)
    return StagedSpec(name=shared["name"], stages=tuple(stages))


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets a field that all share, or of one stage; a null of a stage stays, to clear what all share."""
    path, value = parse_override(override)
    block, _, rest = path.partition(".")
    if block != STAGES:
        apply_override(raw, override)
        return
    name, _, inside = rest.partition(".")
    stages = raw[STAGES] if isinstance(raw[STAGES], list) else []
    named = {str(one.get("name")): one for one in stages if isinstance(one, dict)}
    if name not in named or not inside:
        raise SpecError(
            "an override of a stage is stages.NAME.key=value",
            got=override,
            allowed=", ".join(named),
            do=f"for example stages.{next(iter(named), 'NAME')}.training.learning_rate=3e-4",
        )
    set_path(named[name], inside, value)


def _check_names(stages: Sequence[Mapping[str, Any]], source: str) -> None:
    names = [stage.get("name") for stage in stages]
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SpecError(
                f"{source}: stage {number} needs a name",
                got=name,
                allowed="letters, digits, _ and -, with a letter or digit first",
                do=f"for example name: stage{number}",
            )
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise SpecError(
            f"{source}: {len(twice)} name{'s' * (len(twice) > 1)} of stages {'is' if len(twice) == 1 else 'are'} there "
            "twice",
            got=", ".join(map(str, twice)),
            do="give each stage a name of its own; cycles: N runs all of them N times",
        )


def _stage(
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    cycle: int,
    cycles: int,
    before: Stage | None,
    source: str,
    folder: Path,
) -> Stage:
    """A stage as a whole spec."""
    name = own["name"]
    where = f"{source}, stage {name}"
    wrong = [key for key in _OF_THE_WHOLE if key in own]
    if wrong:
        raise SpecError(f"{where}: {wrong[0]} belongs to all stages together", do=f"set {wrong[0]} beside stages")
    if own.get("search") is not None:
        raise _no_search(where)
    values = merged(shared, {key: value for key, value in own.items() if key != "name"})
    values["name"] = f"{shared.get('name')}.{name}" + (f".{cycle}" if cycle > 1 else "")
    if before is not None:
        values["model"] = {"base": f"stage:{before.name}"}
        if cycle == 1 and own.get("model") is not None:
            raise SpecError(
                f"{where}: it begins with the model of stage {before.name}, and cannot name another",
                got=f"model: {own['model']}",
                do="remove model from it; beside stages, model says what the first begins with",
            )
    inline_deepspeed_file(values, folder)
    return Stage(name=name, cycle=cycle, cycles=cycles, spec=parse_spec(values, source=where))


def merged(shared: Mapping[str, Any], own: Mapping[str, Any], place: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a stage over those that all share: blocks field by field, all else as a whole; null clears."""
    values = dict(shared)
    for key, value in own.items():
        at, below = (*place, str(key)), values.get(key)
        if value is None and not takes_null(at):
            values.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping) and block_at(at) is not None:
            values[key] = merged(below, value, at)
        else:
            values[key] = value
    return values


def _check_followed(stage: Stage, after: Stage, source: str) -> None:
    """Raises SpecError where a stage leaves no model for the next, or the next does not take it."""
    where = f"{source}, stage"
    if not method_of(stage.spec.method).saves_merged(stage.spec):
        method = method_of(stage.spec.method)
        left = "an adapter alone" if method.trains else "no model"
        raise SpecError(
            f"{where} {stage.name}: it leaves {left}, and stage {after.name} begins with a whole model",
            got=f"method: {stage.spec.method}, export: {stage.spec.export}",
            do="set export=merged or both for it" if method.can_merge else "make it the last stage",
        )
    if method_of(after.spec.method).is_from_scratch:
        raise SpecError(
            f"{where} {after.name}: method: {after.spec.method} would draw new weights in place of what the stages "
            "before have learnt",
            do="use another method, or compare with new weights in a spec of its own",
        )


def _no_search(where: str) -> SpecError:
    return SpecError(
        f"{where}: stages are single trainings, and search makes many",
        do="search in a spec of its own first, and set the best values here",
    )
