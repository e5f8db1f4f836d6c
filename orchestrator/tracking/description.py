"""What a run says of itself in MLflow: tags, parameters and artifacts, from its spec and plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator import __version__
from orchestrator.credentials import public
from orchestrator.provenance import carried, provenance_of
from orchestrator.ranking import Goal
from orchestrator.tracking.mlflow_backend import TAG
from orchestrator.tracking.run_record import Description

if TYPE_CHECKING:
    from orchestrator.data.held_out import HeldOut
    from orchestrator.planning.run_plan import RunPlan
    from orchestrator.spec import RunSpec
    from orchestrator.spec_stages import StagedSpec


def described(
    spec: RunSpec,
    plan: RunPlan,
    *,
    data_fingerprint: str,
    held_out: HeldOut,
    tokenizer_fingerprint: str,
    run_folder: Path,
    goal: Goal | None = None,
) -> Description:
    """What MLflow shows of a run besides its metrics.

    The parameters are the spec and the plan, flattened so that MLflow can filter and compare by them. A resumed run
    keeps its first ones; the artifact `plan.json` is the plan carried out last. `goal` ranks a trial as its search.
    """
    asked, planned = public(spec.model_dump(mode="json")), public(plan.to_dict())
    figures = {key: value for key, value in planned.items() if key not in ("deepspeed", "reasons")}
    tags = run_tags(
        spec,
        data_fingerprint=data_fingerprint,
        held_out_fingerprint=held_out.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint,
        goal=goal,
    )
    measured = {key: value for key, value in held_out.to_dict().items() if key != "notes"}
    return Description(
        tags={**tags, f"{TAG}run_folder": str(run_folder)},
        params=flatten(asked) | flatten({"plan": figures, "held_out": measured}),
        artifacts={"spec.yaml": yaml.safe_dump(asked, sort_keys=False), "plan.json": json.dumps(planned, indent=2)},
    )


def described_stages(staged: StagedSpec, *, run_folder: Path) -> Description:
    """The same of a run of stages: what its stages are, and until one has run the tags of the last."""
    specs = {stage.spec.name: public(stage.spec.model_dump(mode="json")) for stage in staged.stages}
    labels = [stage.label for stage in staged.stages]
    tags = run_tags(staged.stages[-1].spec) | {
        f"{TAG}name": staged.name,
        f"{TAG}spec_fingerprint": staged.fingerprint(),
        f"{TAG}role": "stages",
        f"{TAG}stages": str(len(staged.stages)),
        f"{TAG}run_folder": str(run_folder),
    }
    return Description(
        tags=tags,
        params=flatten({"name": staged.name, "stages": labels, "budget": staged.first.budget}),
        artifacts={"stages.yaml": yaml.safe_dump(specs, sort_keys=False)},
    )


def tags_of_whole(last: Mapping[str, str | None]) -> dict[str, str]:
    """What a run of stages takes over from the tags of the last that was run: what was learnt and measured."""
    taken = ("kind", "method", "task", "data_fingerprint", "held_out_fingerprint", "tokenizer_fingerprint")
    keys = [f"{TAG}{name}" for name in (*taken, "quality_metric", "quality_mode")]
    return {key: value for key in keys if (value := last.get(key)) is not None}


def run_tags(
    spec: RunSpec,
    *,
    data_fingerprint: str | None = None,
    held_out_fingerprint: str | None = None,
    tokenizer_fingerprint: str | None = None,
    goal: Goal | None = None,
) -> dict[str, str]:
    """The tags that every run carries and `compare` reads."""
    goal = goal or spec.goal
    values = {
        "kind": spec.kind,
        "method": spec.method,
        "task": spec.task,
        "name": spec.name,
        "spec_fingerprint": spec.fingerprint(),
        "data_fingerprint": data_fingerprint,
        "held_out_fingerprint": held_out_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "quality_metric": goal.metric,
        "quality_mode": "max" if goal.higher_is_better else "min",
        "role": None if spec.search is None else "search",
        "version": __version__,
    }
    return {f"{TAG}{key}": value for key, value in values.items() if value is not None}


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c: text`; lists as JSON; None left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{path}.")
        elif value is not None:
            flat[path] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def source_tags(folder: Path) -> dict[str, str]:
    """Who started the run and from which revision: as the machine says that submitted the job, else as this one knows.

    The revision is left out when neither knows of a git checkout.
    """
    source = carried(os.environ) or provenance_of(folder)
    dirty = None if source.is_dirty is None else str(source.is_dirty).lower()
    tags = {
        "mlflow.source.name": "orchestrator",
        "mlflow.user": source.user,
        "mlflow.source.git.commit": source.commit,
        f"{TAG}git_dirty": dirty,
    }
    return {key: value for key, value in tags.items() if value is not None}
