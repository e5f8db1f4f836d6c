"""`compare` as a person meets it: a table, two plots, a page, and the link to MLflow's own comparison."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator import console, locations
from orchestrator.credentials import hide
from orchestrator.errors import StorageError


def compare_command(
    experiment: str, *, uri: str | None, report: Path | None, plots: Path | None, as_json: bool
) -> None:
    """Reads an experiment and shows it; raises what reading or writing raises."""
    from orchestrator.tracking.compare import collect, comparison_link, to_json
    from orchestrator.tracking.table import render_table

    store = hide(uri or locations.default_tracking_uri())
    rows = collect(store, experiment)
    link = comparison_link(store, rows) if rows else None
    pictures = _draw(store, rows, plots or default_folder(experiment)) if rows else {}
    if report is not None:
        from orchestrator.tracking.comparison_page import write_report

        write_report(report, rows, pictures, experiment=experiment, link=link)
    if as_json:
        console.print_json(to_json(rows))
        return
    if not rows:
        console.print_messages(
            f"the experiment {experiment!r} has no runs yet: orchestrator run SPEC tracking.experiment={experiment}"
        )
        return
    console.print_table(render_table(rows, experiment=experiment, width=console.width()))
    for heading, picture in pictures.items():
        console.print_lines(f"{heading + ':':<24}{picture}")
    if report is not None:
        console.print_lines(f"{'report:':<24}{report}")
    assert link is not None
    if link.command is not None:
        console.print_lines(f"\nMLflow's own comparison: start\n  {link.command}\nand open")
    else:
        console.print_lines("\nMLflow's own comparison:")
    console.print_lines(f"  {link.url}")


def default_folder(experiment: str) -> Path:
    """Where an experiment's plots go when nobody says."""
    return locations.home() / "reports" / re.sub(r"[^A-Za-z0-9._-]+", "-", experiment)


def _draw(store: str, rows: list, folder: Path) -> dict[str, Path]:  # type: ignore[type-arg]
    from orchestrator.tracking.compare import loss_curves
    from orchestrator.tracking.plots import plot_losses, plot_quality_against_cost

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "the plots cannot be written", got=f"{folder} ({error.strerror})", do="give --plots FOLDER"
        ) from error
    pictures = {"loss against tokens": folder / "loss.png", "quality against cost": folder / "quality.png"}
    plot_losses(loss_curves(store, rows), pictures["loss against tokens"])
    plot_quality_against_cost(rows, pictures["quality against cost"])
    return pictures
