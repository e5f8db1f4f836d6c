"""The command line: advise | plan | estimate | run | evaluate | verify-resume | compare | flush | doctor | schema, for
jobs on a cluster submit | jobs | logs | stop, and for the cluster itself cluster check | cluster render.

Every heavy import waits its turn. Exit code 0 for done, 2 for a mistake of the user's, 1 for anything else. Answers go
to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
from copy import copy
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import __version__, console
from orchestrator.cli_cluster import AsJson, cluster
from orchestrator.command_group import CommandGroup
from orchestrator.errors import SpecError

app = typer.Typer(
    name="orchestrator",
    cls=CommandGroup,
    help="Decide, plan, run and compare trainings on Ray and DeepSpeed, tracked in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cluster, name="cluster", no_args_is_help=True)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Spec file; configs/ holds some that run as they are.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Sets a field of the spec (training.steps=30); key=null clears it."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the saved state of an earlier run and start over.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Job server; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS if http(s), 127.0.0.1:8265."
    ),
]
JobName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the spec, or the job's own.")]


def main() -> None:
    """Entry point of the `orchestrator` command."""
    # Typer builds the options of all commands, 30 ms, before it looks which one was asked for.
    asked = [command for command in app.registered_commands if _name_of(command) in sys.argv[1:2]]
    groups = [group for group in app.registered_groups if group.name in sys.argv[1:2]]
    own = copy(app)
    own.registered_commands = asked or ([] if groups else app.registered_commands)
    own.registered_groups = groups or ([] if asked else app.registered_groups)
    own()


def _name_of(command: typer.models.CommandInfo) -> str:
    assert command.callback is not None, "every command is a function"
    return command.name or command.callback.__name__


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    spec: SpecPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Do it: one training, or with a search block many. The same command after any stop goes on where it was.

    Example: orchestrator run configs/pretrain/demo.yaml training.tokens=null training.steps=30
    """
    from orchestrator.commands.run import run_command

    run_command(str(spec), overrides or (), fresh=fresh, as_json=as_json)


History = Annotated[str | None, typer.Option(metavar="MLFLOW_URI", help="Learn from the runs of a store.")]
ClusterFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Plan for the nodes that this cluster file may start.", show_default=False),
]


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder that transformers loads, run folder, runs:/ID or a hub name."),
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, glob or hub name, as in data.train.")],
    overrides: Overrides = None,
    task: Annotated[
        str | None,
        typer.Option(help="causal-lm, masked-lm, text-classification, chat; by default the model's own."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column that holds the text.")] = None,
    label_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column that holds the class.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="train, validation or test of a folder with splits; held-out: as a training holds out."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="How many share the rows; all there is room for.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a worker and forward pass; what fits.")] = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """How good is this model? Measured as trainings measure theirs, on Ray; for classes each by itself as well.

    Example: orchestrator evaluate runs:/demo/reviews-search configs/data/movie-reviews/reviews.csv --split held-out
    """
    typed = dict(locals())
    from orchestrator.commands.evaluate import Options, evaluate_command

    options = Options(**{name: typed[name] for name in Options.__dataclass_fields__})
    evaluate_command(options, overrides or (), fresh=fresh, as_json=as_json)


@app.command()
def submit(
    spec: SpecPath,
    overrides: Overrides = None,
    address: Address = None,
    cluster: ClusterFile = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Travels with the job, which starts in it.", show_default=False)
    ] = Path(),
    fresh: Fresh = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Leave once it is submitted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Do it on a cluster: plans, asks, submits a job and follows it. The same command after any stop goes on.

    Example: orchestrator submit configs/pretrain/demo.yaml --address http://127.0.0.1:8265
    """
    from orchestrator.commands.submit import submit_command

    with console.reporting_failures(as_json=as_json):
        code = submit_command(
            str(spec),
            overrides or (),
            address=address,
            cluster_file=cluster,
            working_dir=working_dir,
            fresh=fresh,
            yes=yes,
            follow=not no_follow,
            as_json=as_json,
        )
    raise typer.Exit(code)


@app.command()
def jobs(address: Address = None, as_json: AsJson = False) -> None:
    """Who runs what? The jobs of a cluster: state, place in the queue, step, time and budget left.

    Example: orchestrator jobs --json
    """
    from orchestrator.commands.jobs import jobs_command

    with console.reporting_failures(as_json=as_json):
        jobs_command(address=address, as_json=as_json)


@app.command()
def logs(
    name: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    address: Address = None,
) -> None:
    """What does a job say? With --follow the exit code is 0 where it succeeds.

    Example: orchestrator logs gpt-demo --follow
    """
    from orchestrator.commands.jobs import logs_command

    with console.reporting_failures(as_json=False):
        code = logs_command(name, address=address, follow=follow)
    raise typer.Exit(code)


@app.command()
def stop(name: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """Stop a job: it saves a checkpoint first, and this waits until it has ended.

    Example: orchestrator stop gpt-demo
    """
    from orchestrator.commands.jobs import stop_command

    with console.reporting_failures(as_json=as_json):
        stop_command(name, address=address, as_json=as_json)


@app.command("verify-resume")
def verify_resume(
    spec: SpecPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="How many steps of the training to take.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Does it survive? Takes a few steps, kills a worker, resumes, and compares every figure and tensor bit by bit.

    Example: orchestrator verify-resume configs/pretrain/demo.yaml --steps 8
    """
    from orchestrator.commands.verify_resume import verify_command

    with console.reporting_failures(as_json=as_json):
        code = verify_command(str(spec), overrides or (), steps=steps, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def advise(
    dataset: Annotated[
        str | None, typer.Option(metavar="PATH", help="File, folder, glob or hub name; measured.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(metavar="N", help="Labelled examples, when there is no dataset.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens of the data, such as 20M.")] = None,
    task: Annotated[str | None, typer.Option(help="causal-lm, masked-lm, chat, text- or image-classification.")] = None,
    labels_per_class: Annotated[str | None, typer.Option(metavar="N", help="Labelled examples of each class.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="N", help="Number of classes.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_NAME", help="Pretrained model to start from.")
    ] = None,
    base_params: Annotated[
        str | None, typer.Option(metavar="N", help="Its parameters, when only these are known.")
    ] = None,
    base_tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens it was trained on.")] = None,
    no_base_model: Annotated[bool, typer.Option("--no-base-model", help="There is none to start from.")] = False,
    domain_distance: Annotated[
        str | None, typer.Option(metavar="same|near|far", help="From the base's data; measured with --dataset.")
    ] = None,
    unlabeled_tokens: Annotated[str | None, typer.Option(metavar="N", help="Raw text of the same domain.")] = None,
    budget: Annotated[str | None, typer.Option(help="500usd, 100gpu-hours, 1e20flops or 8hours.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Device of the catalogue, such as H100.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    goal: Annotated[str, typer.Option(metavar="quality|cost|retain", help="What counts most.")] = "quality",
    inference_tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens the result will process.")] = None,
    history: History = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the dataset that holds the text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column that holds the class.")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of csv and tsv files: comma, semicolon, tab, bar or a character; else found.")
    ] = None,
    write_spec: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the spec that `run` takes.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write one page with pictures.")] = None,
    as_json: AsJson = False,
) -> None:
    """What should I do? Prompt, features, adapters, full fine-tuning, continued pretraining or from scratch, priced.

    Example: orchestrator advise --examples 2000 --task text-classification --base-params 125M --budget 20usd
    """
    typed = dict(locals())
    from orchestrator.commands.advise import Options, advise_command

    with console.reporting_failures(as_json=as_json):
        options = Options(**{name: typed[name] for name in Options.__dataclass_fields__})
        advise_command(options, write_spec=write_spec, report=report, as_json=as_json)


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this GPU instead of this machine.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of them, over all nodes.")] = 1,
    nodes: Annotated[int, typer.Option(help="On how many machines.")] = 1,
    cluster: ClusterFile = None,
    history: History = None,
    as_json: AsJson = False,
) -> None:
    """What will it take? Looks at the data; workers, ZeRO stage, batch, memory, hours and money; nothing is started.

    Example: orchestrator plan configs/pretrain/demo.yaml --gpu H100 --gpus 8 resources.workers=8
    """
    from orchestrator.commands.plan import Where, plan_command

    with console.reporting_failures(as_json=as_json):
        where = Where(gpu=gpu, gpus=gpus, nodes=nodes, cluster_file=cluster)
        plan_command(str(spec), overrides or (), where=where, history=history, as_json=as_json)


Size = Annotated[int | None, typer.Option(help="Of the model; that of published models when not given.")]
Master = Annotated[
    bool | None,
    typer.Option(help="Keep fp32 copies of 16-bit weights; by default not with --precision bf16.", show_default=False),
]
Recompute = Annotated[bool, typer.Option("--activation-checkpointing", help="Keep fewer activations, compute more.")]


@app.command()
def estimate(
    params: Annotated[str, typer.Option(metavar="N", help="Weights of the model, such as 7B.")],
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to train on, every epoch counted, such as 1T.")],
    gpu: Annotated[str, typer.Option(help="Device of configs/devices.yaml, or cpu.")],
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    nodes: Annotated[int | None, typer.Option(help="On how many machines.")] = None,
    method: Annotated[str, typer.Option(help="full, last_layers, lora, qlora, ia3, prefix, prompt or head.")] = "full",
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; else what `run` takes.")] = None,
    master_weights: Master = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or paged-adamw.")] = "adamw",
    zero_stage: Annotated[int | None, typer.Option(help="0 to 3; the least that fits when not given.")] = None,
    offload: Annotated[str, typer.Option(help="none, optimizer or all.")] = "none",
    seq: Annotated[str, typer.Option(metavar="N", help="Tokens of a sample.")] = "2048",
    micro_batch: Annotated[int, typer.Option(help="Samples per device and forward pass.")] = 1,
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    vocab: Annotated[str | None, typer.Option(metavar="N", help="Entries of the tokenizer.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA's adapters.")] = 8,
    activation_checkpointing: Recompute = False,
    as_json: AsJson = False,
) -> None:
    """What would a training of some size take? Peak memory, hours and money, without a spec.

    Example: orchestrator estimate --params 7B --tokens 1T --gpu H100 --gpus 64
    """
    from orchestrator.architectures.standard_shape import given_shape
    from orchestrator.planning import views
    from orchestrator.planning.estimate import Workload
    from orchestrator.planning.estimate import estimate as priced
    from orchestrator.planning.hardware import find_device

    with console.reporting_failures(as_json=as_json):
        size, words = _count("--params", params), None if vocab is None else _count("--vocab", vocab)
        shape = given_shape(size, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, vocab=words)
        workload = Workload(
            parameters=size,
            tokens=_count("--tokens", tokens),
            sequence_length=_count("--seq", seq),
            method=method,
            precision=precision,  # type: ignore[arg-type]  # words that are none are refused with the list of them
            optimizer=optimizer,  # type: ignore[arg-type]
            offload=offload,  # type: ignore[arg-type]
            device=find_device(gpu),
            gpus=gpus,
            nodes=nodes,
            master_weights=master_weights,
            zero_stage=zero_stage,
            micro_batch=micro_batch,
            shape=shape,
            lora_rank=lora_rank,
            activation_checkpointing=activation_checkpointing,
        )
        found = priced(workload)
        if as_json:
            console.print_json(views.estimate_answer(found))
        else:
            console.print_table(views.estimate_table(found))


def _count(option: str, text: str) -> int:
    """A positive whole number such as 7B or 1e12; raises SpecError when the text is none."""
    from orchestrator.quantities import parse_count

    number = parse_count(text)
    if not isinstance(number, int) or number < 1:
        raise SpecError(f"{option} is no positive whole number", got=text, allowed="such as 2000000, 7B, 1.5T or 1e12")
    return number


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
    from orchestrator.commands.compare import compare_command

    with console.reporting_failures(as_json=as_json):
        compare_command(experiment, uri=tracking_uri, report=report, plots=plots, as_json=as_json)


@app.command()
def flush(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="A run's folder, or one that holds some.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All runs of the default storage; so without a folder, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload metrics buffered while MLflow was unreachable, and close the records of runs whose driver was killed.

    Exit code 0 when MLflow has everything, 1 when something still waits. Example: orchestrator flush --all
    """
    from orchestrator.commands.flush import flush_command

    with console.reporting_failures(as_json=as_json):
        code = flush_command(folder, everything=everything, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Is this machine ready? Versions, devices, ports, disk, DeepSpeed's ops and the MLflow store, with remedies.

    Example: orchestrator doctor --json
    """
    from orchestrator import locations
    from orchestrator.doctor.report import diagnose, exit_code, render, to_json
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

    from orchestrator.load_spec import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if write is None:
        sys.stdout.write(text)
        return
    with console.reporting_failures(as_json=False):
        try:
            write.write_text(text)
        except OSError as error:
            raise SpecError("the schema cannot be written", got=f"{write} ({error.strerror})") from error
