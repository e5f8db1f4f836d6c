"""A spec to the job that runs it on a cluster: what starts it, what it is called, what it takes along. Pure, but for a
look at which files there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.credentials import without_credentials
from orchestrator.errors import SpecError
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import STAGES, StagedSpec
from orchestrator.submission.upload import files_at
from orchestrator.yaml_file import read_yaml

DEFAULT_ENVIRONMENT: Mapping[str, str] = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
"""Of a job whose folder has no RUNTIME_ENV: as in the one that is shipped."""
RUNTIME_ENV = Path("jobs/runtime-env.yaml")
"""In a working directory: the job's environment, as `ray job submit --runtime-env` takes it."""
OUTSIDE = "submitted"
"""Folder of the job's working directory for a spec that lies outside of the one here."""
NAME, OWNER, KIND, BUDGET = "name", "owner", "kind", "budget"
"""Keys of a job's metadata."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of the job server, beside the files."""

    name: str
    """Of the spec."""
    kind: str
    """`pretrain`, `finetune` or `tune`."""
    entrypoint: str
    metadata: Mapping[str, str]
    needed: tuple[tuple[str, Path], ...]
    """Files that travel in any case: (path in the job's folder, file here)."""
    stays: tuple[str, ...]
    """What the spec reads that does not travel, in words."""


def job_kind(spec: RunSpec | StagedSpec) -> str:
    """The module of `jobs/` that runs a spec: `pretrain`, `finetune` or `tune`; of stages that of the first."""
    first = spec.first if isinstance(spec, StagedSpec) else spec
    return first.kind if first.search is None else "tune"


def job_request(
    spec: RunSpec | StagedSpec,
    file: Path,
    overrides: Sequence[str],
    *,
    folder: Path,
    owner: str | None,
    fresh: bool,
) -> JobRequest:
    """The job of a spec that was read from `file` within the working directory `folder`, which relative paths in it
    begin at.

    Raises SpecError where results would be lost with the job's copy of that folder, or a password be seen.
    """
    for override in overrides:
        if without_credentials(override) != override:
            raise SpecError(
                "a password in a key=value would stand in the cluster's list of jobs",
                got=override,
                do="put it into the spec file, or into the environment of the nodes",
            )
    specs = _trainings(spec)
    for one in specs:
        _check_outlives(one)
    inside = file.resolve().is_relative_to(folder.resolve())
    name = file.resolve().relative_to(folder.resolve()).as_posix() if inside else f"{OUTSIDE}/{file.name}"
    found = {location: files_at(location, folder) for location in _locations(specs)}
    kind, budget = job_kind(spec), specs[0].budget
    words = ["python", "-m", f"jobs.{kind}", "--config", name, *(["--fresh"] if fresh else []), *overrides]
    metadata = {NAME: spec.name, OWNER: owner, KIND: kind, BUDGET: budget}
    return JobRequest(
        name=spec.name,
        kind=kind,
        entrypoint=shlex.join(words),
        metadata={key: value for key, value in metadata.items() if value is not None},
        needed=(
            (name, file),
            *_deepspeed_file(file, name, folder),
            *(one for files in found.values() for one in files),
        ),
        stays=tuple(
            f"{location} does not travel: the job reads it on the cluster"
            for location in found
            if location.startswith(("/", "~"))
        ),
    )


def _trainings(spec: RunSpec | StagedSpec) -> list[RunSpec]:
    """Every training of a spec: stages, and of a search its trials, which may name data of their own."""
    each = [stage.spec for stage in spec.stages] if isinstance(spec, StagedSpec) else [spec]
    return [one for whole in each for one in (whole, *(trial.spec for trial in _trials(whole)))]


def _trials(spec: RunSpec) -> Sequence[Any]:
    return () if spec.search is None else trials(spec)


def _locations(specs: Sequence[RunSpec]) -> Iterator[str]:
    """Each place once that trainings read from, as their specs name it."""
    seen: dict[str, None] = {}
    for spec in specs:
        data = [spec.data.train, spec.data.validation, spec.data.test, spec.data.chat_template]
        data.append(None if spec.retain is None else spec.retain.data)
        model = [spec.model.base, spec.model.adapter, spec.model.config]
        model += [] if spec.model.tokenizer == "auto" else [spec.model.tokenizer]
        for value in (*data, *model):
            seen.update(dict.fromkeys([value] if isinstance(value, str) else value or ()))
    yield from seen


def _check_outlives(spec: RunSpec) -> None:
    """Results in a relative folder would lie in the job's copy of the working directory, which goes with the job."""
    storage, uri = spec.checkpoint.storage, spec.tracking.uri
    if storage is not None and not spec.checkpoint.in_a_bucket and not storage.startswith(("/", "~")):
        raise SpecError(
            "checkpoint.storage is a relative folder, which would be lost with the job's copy of this one",
            got=storage,
            allowed="an absolute folder that every node sees, or a bucket such as s3://BUCKET/runs",
            do="or leave it out: runs are kept in ORCHESTRATOR_HOME of the nodes",
        )
    if uri is not None and re.match(r"sqlite:///(?!/)", uri):
        raise SpecError(
            "tracking.uri is a relative file, which would be lost with the job's copy of this folder",
            got=uri,
            allowed="the URI of a server, or sqlite://// and an absolute path",
            do="or leave it out: the nodes' MLFLOW_TRACKING_URI, else ORCHESTRATOR_HOME, says where",
        )


def _deepspeed_file(file: Path, name: str, folder: Path) -> list[tuple[str, Path]]:
    """The JSON files that a spec names for DeepSpeed, in this folder or beside the spec."""
    raw = read_yaml(file)
    stages = raw.get(STAGES) if isinstance(raw.get(STAGES), list) else []
    named = [block.get("deepspeed") for block in (raw, *(stages or [])) if isinstance(block, dict)]
    found = []
    for one in named:
        if isinstance(one, str) and one != "auto" and not one.startswith("/"):
            beside = (Path(name).parent / one).as_posix()
            found += [(one, folder / one)] if (folder / one).is_file() else [(beside, file.parent / one)]
    return found


def submission_id(name: str, taken: Sequence[str]) -> str:
    """A name that a person can type: the spec's with the first number that is free."""
    numbers = [int(found[1]) for one in taken if (found := re.fullmatch(re.escape(name) + r"-([0-9]+)", one))]
    return f"{name}-{max(numbers, default=0) + 1}"
