"""`flush` as a person meets it: what killed drivers and absent servers left on this machine's disks goes to MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import console, locations
from orchestrator.errors import SpecError, StorageError

if TYPE_CHECKING:
    from orchestrator.tracking.reconcile import Shipment


def flush_command(folder: Path | None, *, everything: bool, as_json: bool) -> int:
    """Ships a run, or all below a folder; shows what became of each and gives the exit code: 1 where something waits.

    Raises SpecError for a folder without runs.
    """
    from orchestrator.scheduling.run_folder import fetch_points
    from orchestrator.tracking.reconcile import flush
    from orchestrator.tracking.run_record import find_runs

    if folder is not None and everything:
        raise SpecError("flush takes a folder or --all, not both", got=folder, do="leave out one of them")
    root = locations.home() / "runs" if folder is None else folder.expanduser().absolute()
    found = find_runs(root)
    if not found and folder is not None:
        raise SpecError(
            "there is no tracked run in this folder",
            got=root,
            allowed="a run folder (`run --json` names it), or a folder that holds some",
            do="`orchestrator flush` without a folder takes all runs of the default storage",
        )
    for run in found:
        try:
            fetch_points(run)
        except StorageError as error:
            console.print_messages(f"{run}: {error.what} ({error.got})")
    shipments = flush(found)
    waiting = [shipment for shipment in shipments if shipment.why is not None]
    if as_json:
        console.print_json(
            {
                "status": "waiting" if waiting else "shipped",
                "sent": sum(shipment.sent for shipment in shipments),
                "waiting": sum(shipment.waiting for shipment in shipments),
                "runs": [shipment.to_dict() for shipment in shipments],
            }
        )
    else:
        _show(shipments, root)
    return 1 if waiting else 0


def _show(shipments: Sequence[Shipment], root: Path) -> None:
    for shipment in shipments:
        if shipment.sent or shipment.why:
            console.print_lines(
                f"{shipment.name}  {shipment.status}  {shipment.sent} points sent, {shipment.waiting} wait"
            )
            console.print_lines(f"  {shipment.folder}" + (f"  MLflow run {shipment.run_id}" if shipment.run_id else ""))
        if shipment.why:
            remedy = "; remove its folder to forget it" if shipment.is_final else ""
            console.print_messages(f"{shipment.name}: {shipment.why}{remedy}")
    waiting = sum(shipment.why is not None for shipment in shipments)
    runs = f"{len(shipments)} run{'s' * (len(shipments) != 1)}"
    console.print_lines(f"{runs} below {root}: {len(shipments) - waiting} in MLflow, {waiting} waiting")
