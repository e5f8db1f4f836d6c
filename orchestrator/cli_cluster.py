"""The options of `cluster check` and `cluster render`, which `cli` puts beside the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import console

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

cluster = typer.Typer(
    rich_markup_mode=None,
    help="Cluster files: what is wrong with one and what it costs, and one that fits a wish.\n\n"
    "Example: orchestrator cluster check cluster/aws.yaml",
)


@cluster.command("check")
def check_cluster(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="For `ray up`, KubeRay or SkyPilot; see cluster/.")],
    as_json: AsJson = False,
) -> None:
    """What is wrong with a cluster file, down to the cloud's own settings, and what it costs. No cloud is asked.

    Exit code 0 when nothing is wrong, 2 else. Example: orchestrator cluster check cluster/aws.yaml
    """
    from orchestrator.commands.cluster import check_command

    with console.reporting_failures(as_json=as_json):
        code = check_command(file, as_json=as_json)
    raise typer.Exit(code)


@cluster.command("render")
def render_cluster(
    provider: Annotated[
        str,
        typer.Option(help="aws, gcp, azure, kubernetes, kubernetes-job, kubernetes-kueue, skypilot or on-premises."),
    ],
    gpu: Annotated[str, typer.Option(help="Device of the catalogue, such as H100.")],
    gpus: Annotated[int, typer.Option(help="How many of them at most.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file instead.")] = None,
) -> None:
    """A cluster file with so many GPUs, complete but for the names that only you know.

    Example: orchestrator cluster render --provider aws --gpu H100 --gpus 16 --out aws.local.yaml
    """
    from orchestrator.commands.cluster import render_command

    with console.reporting_failures(as_json=False):
        render_command(provider, gpu=gpu, gpus=gpus, out=out)
