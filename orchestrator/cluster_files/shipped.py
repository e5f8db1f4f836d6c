"""The shipped cluster files: `cluster/` in a checkout, `shipped/` beside this module in an installed package."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {
    "on-premises": "on-premises.yaml",
    "aws": "aws.yaml",
    "gcp": "gcp.yaml",
    "azure": "azure.yaml",
    "kubernetes": "kubernetes/ray-cluster.yaml",
    "kubernetes-job": "kubernetes/ray-job.yaml",
    "kubernetes-kueue": "kubernetes/ray-job-kueue.yaml",
    "skypilot": "skypilot.yaml",
}
"""By what `cluster render --provider` takes."""


def folder() -> Path:
    """Where they lie."""
    beside = Path(__file__).with_name("shipped")
    return beside if beside.is_dir() else Path(__file__).parents[2] / "cluster"


def shipped_text(provider: str) -> str:
    """One of them. Raises KeyError for a provider that is none of SHIPPED."""
    return (folder() / SHIPPED[provider]).read_text(encoding="utf-8")
