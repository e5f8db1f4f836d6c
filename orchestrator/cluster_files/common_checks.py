"""Checks that every kind of cluster file shares: names still to fill in, token authentication, storage. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from orchestrator.cluster_files.findings import Problem

PLACEHOLDER = re.compile(r"\bEDIT_[A-Z0-9_]+")
"""A name in a shipped file that only the user knows."""
_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)


def scalars(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every text in a YAML value; comments inside of shell commands are left out."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from scalars(below, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from scalars(below, f"{at}.{number}")
    elif isinstance(value, str):
        yield at, _COMMENT.sub("", value)


def unknown_fields(
    given: Mapping[str, Any], known: Collection[str], *, what: str, at: Callable[[str], str]
) -> Iterator[Problem]:
    """One problem for each key that is none of the known ones; `at` gives its place."""
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        yield Problem(
            at=at(name),
            what=what,
            got=name,
            allowed=", ".join(sorted(known)),
            do=f"did you mean {near[0]}?" if near else "remove it",
        )


def unfilled(value: Any) -> Iterator[Problem]:
    """One problem for each name that is not filled in, at its first place (an anchor repeats it)."""
    seen = set[str]()
    for at, text in scalars(value):
        for name in PLACEHOLDER.findall(text):
            if name not in seen:
                seen.add(name)
                yield Problem(at=at, what="a name that only you know is not filled in", got=name, do="fill it in")


def no_token(value: Any, *, at: str) -> Iterator[Problem]:
    """A problem where nothing turns token authentication on."""
    texts = [text for _, text in scalars(value)]
    if any("RAY_AUTH_MODE" in text and "token" in text for text in texts) or any("env.sh" in text for text in texts):
        return
    if _auth_option(value) == "token":
        return
    yield Problem(
        at=at,
        what="nothing turns token authentication on: whoever reaches the dashboard's port can run code here",
        allowed="RAY_AUTH_MODE=token where Ray starts (the shipped files' env.sh sets it), and the token on every node",
        do="export RAY_AUTH_MODE=token before `ray start`, and mount ~/.ray/auth_token",
    )


def _auth_option(value: Any) -> str | None:
    """KubeRay's own switch, `authOptions.mode` of a RayCluster's spec."""
    if isinstance(value, dict):
        options = value.get("authOptions")
        if isinstance(options, dict):
            return str(options.get("mode"))
        return next((found for below in value.values() if (found := _auth_option(below))), None)
    return None


_STORAGE = re.compile(r"^\s*(?:export )?(?:SHARED|STORAGE|ORCHESTRATOR_HOME)=(\S+)", re.MULTILINE)
_BUCKET = re.compile(r"\b(?:s3|gs|abfss?|az)://\S+")


def no_storage(value: Any, *, at: str, machines: int) -> Iterator[Problem]:
    """A problem where several machines are given no folder or bucket that all of them see."""
    texts = list(scalars(value))
    named = any(_STORAGE.search(text) or _BUCKET.search(text) for _, text in texts)
    mounted = any(path.endswith("persistentVolumeClaim.claimName") for path, _ in texts)
    if named or mounted or machines < 2:
        return
    yield Problem(
        at=at,
        what=f"no storage is named that all of up to {machines} machines see: a training over two of them would fail",
        allowed="SHARED=/a/folder/that/all/mount or STORAGE=s3://BUCKET in ~/orchestrator.names",
        do="name one of them (cluster/on-premises.yaml and cluster/aws.yaml show how)",
    )
