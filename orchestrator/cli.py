"""The command line: run | plan | compare | doctor | schema. Parses, calls, prints; every heavy import waits its turn.

Exit code 0 for done, 2 for a mistake of the user's, 1 for anything else. Answers go to standard output, everything
else to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import __version__, console
from orchestrator.errors import SpecError

app = typer.Typer(
    name="orchestrator",
    help="Decide, plan, run and compare trainings on Ray and DeepSpeed, tracked in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Spec file; configs/ holds some that run as they are.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Sets a field of the spec (training.steps=30); key=null clears it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def main() -> None:
    """Entry point of the `orchestrator` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run of this spec.")] = False,
    as_json: AsJson = False,
) -> None:
    """Do it: one training, or with a search block many. The same command after any stop goes on where it was.

    Example: orchestrator run configs/pretrain/demo.yaml training.tokens=null training.steps=30
    """
    from orchestrator.running import run_command

    run_command(str(spec), overrides or (), fresh=fresh, as_json=as_json)


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this GPU instead of this machine.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them, over all nodes.")] = 1,
    nodes: Annotated[int, typer.Option(help="On how many machines.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What will it take? Workers, ZeRO stage, batch split, memory, hours and money; nothing is started.

    Example: orchestrator plan configs/pretrain/demo.yaml --gpu H100 --gpus 8 resources.workers=8
    """
    from orchestrator.planning.hardware import local_cluster, requested_cluster
    from orchestrator.planning.plan import make_plan
    from orchestrator.planning.show import plan_answer, plan_table
    from orchestrator.spec_file import load_spec
    from orchestrator.tracking.finished_model import with_base_found

    with console.reporting_failures(as_json=as_json):
        loaded = with_base_found(load_spec(spec, overrides or ()))
        cluster = local_cluster() if gpu is None else requested_cluster(gpu, gpus, nodes)
        made = make_plan(loaded, cluster)
        if as_json:
            console.print_json(plan_answer(made))
        else:
            console.print_table(plan_table(made))


@app.command()
def compare(
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "default",
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow store; the default one when not given.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write one self-contained page.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the PNGs go; reports/EXPERIMENT when not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What came out? Runs ranked by quality with their cost, two plots, and the link to MLflow's own comparison.

    Example: orchestrator compare --experiment demo --report demo.html
    """
    from orchestrator.comparing import compare_command

    with console.reporting_failures(as_json=as_json):
        compare_command(experiment, uri=tracking_uri, report=report, plots=plots, as_json=as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Is this machine ready? Versions, devices, ports, disk, DeepSpeed's ops and the MLflow store, with remedies.

    Example: orchestrator doctor --json
    """
    from orchestrator import locations
    from orchestrator.scheduling.doctor import diagnose, exit_code, render, to_json
    from orchestrator.tracking.store import check_store

    with console.reporting_failures(as_json=as_json):
        findings = diagnose(tracking_uri=locations.default_tracking_uri(), check_store=check_store)
        if as_json:
            console.print_json(to_json(findings))
        else:
            console.print_table(render(findings))
    raise typer.Exit(exit_code(findings))


@app.command()
def schema(
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file instead.")] = None,
) -> None:
    """The JSON schema of a spec, so that editors complete and check the file.

    Example: orchestrator schema > configs/spec.schema.json
    """
    import json

    from orchestrator.spec_file import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if write is None:
        sys.stdout.write(text)
        return
    with console.reporting_failures(as_json=False):
        try:
            write.write_text(text)
        except OSError as error:
            raise SpecError("the schema cannot be written", got=f"{write} ({error.strerror})") from error
