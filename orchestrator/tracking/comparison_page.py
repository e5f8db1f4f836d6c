"""A comparison as one HTML file that needs no network: table, plots and the link to MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from orchestrator.page import picture, write_page
from orchestrator.tracking.compare import ComparisonLink
from orchestrator.tracking.rows import Group, RunRow
from orchestrator.tracking.table import HEADINGS, table_cells

_STYLE = """
tr.group td { font-weight: 600; padding-top: 1.1rem; border-bottom: 1px solid #ccc; }
tr.trial td { color: #666; }
tr.trial td.run { padding-left: .9rem; }
tr.best td.run { font-weight: 600; }
"""

_TEXT_COLUMNS = ("run", "method", "status")


def write_report(
    path: Path,
    rows: Sequence[RunRow],
    plots: Mapping[str, Path],
    *,
    experiment: str,
    link: ComparisonLink | None = None,
) -> None:
    """Write the report: the ranked rows as a table, then each plot (heading to PNG file), then the link.

    Raises StorageError when the file cannot be written.
    """
    count = f"{len(rows)} run{'' if len(rows) == 1 else 's'}"
    body = [
        f"<h1>{escape(experiment)}</h1><p class='about'>{count}, ranked by quality within each kind, metric and "
        "held-out data. lr: peak learning rate; dev-h: device hours; a search's cost is that of all its trials.</p>",
        _table(rows) if rows else "<p>There are no runs yet.</p>",
        *(picture(heading, file.read_bytes(), kind="png") for heading, file in plots.items()),
        "" if link is None or not rows else _link(link),
    ]
    write_page(path, title=f"{experiment}: comparison", body=body, style=_STYLE)


def _table(rows: Sequence[RunRow]) -> str:
    known = {row.run_id: row for row in rows}
    head = "".join(f'<th class="{_cell_class(name)}">{escape(name)}</th>' for name in HEADINGS)
    lines = [f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>']
    shown_group: Group | None = None
    for row in rows:
        above = known.get(row.parent or "")
        if above is None and row.group != shown_group:
            shown_group = row.group
            title = escape(row.group_title or row.group.title)
            lines.append(f'<tr class="group"><td></td><td colspan="{len(HEADINGS) - 1}">{title}</td></tr>')
        kind = "trial" if above is not None else "best" if row.rank == 1 else ""
        cells = "".join(
            f'<td class="{_cell_class(name)}">{escape(text)}</td>'
            for name, text in zip(HEADINGS, table_cells(row, above=above), strict=True)
        )
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell_class(heading: str) -> str:
    return heading if heading in _TEXT_COLUMNS else "number"


def _link(link: ComparisonLink) -> str:
    start = "" if link.command is None else f"<p>Start the server first: <code>{escape(link.command)}</code></p>"
    return f'<h2>In MLflow</h2><p><a href="{escape(link.url)}">Compare these runs in MLflow</a></p>{start}'
