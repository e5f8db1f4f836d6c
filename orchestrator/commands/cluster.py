"""`cluster check` and `cluster render` as a person meets them."""

from __future__ import annotations

from pathlib import Path

from orchestrator import console
from orchestrator.errors import StorageError


def check_command(path: Path, *, as_json: bool) -> int:
    """Shows what is wrong with a cluster file and what it costs; gives the exit code, 2 where something is wrong.

    Raises SpecError for a file that cannot be read or is no cluster file.
    """
    from orchestrator.cluster_files.check import check_file

    report = check_file(path)
    if as_json:
        console.print_json(report.to_dict())
    else:
        console.print_lines(*report.lines())
    return report.exit_code


def render_command(provider: str, *, gpu: str, gpus: int, out: Path | None) -> None:
    """Writes a cluster file with so many GPUs to a file, or to standard output.

    Raises SpecError for a wish that cannot be met, and StorageError where the file cannot be written.
    """
    from orchestrator.cluster_files.render import render

    rendered = render(provider, gpu=gpu, gpus=gpus)
    if out is None:
        console.print_lines(*rendered.text.splitlines())
        return
    try:
        out.write_text(rendered.text, encoding="utf-8")
    except OSError as error:
        raise StorageError("the cluster file cannot be written", got=f"{out} ({error.strerror})") from error
    console.print_messages(f"{out}: {rendered.summary}", f"fill in its names, then: orchestrator cluster check {out}")
