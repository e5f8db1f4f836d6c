"""A comparison as one HTML file that needs no network: table, plots and the link to MLflow."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from orchestrator.errors import StorageError
from orchestrator.tracking.compare import HEADINGS, ComparisonLink, RunRow, group_title, table_cells

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       max-width: 1040px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.about { color: #666; margin: 0 0 1.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: #555; border-bottom: 1.5px solid #bbb; }
th, td { padding: .35rem .7rem .35rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eee; }
.number { text-align: right; white-space: nowrap; }
tr.group td { font-weight: 600; padding-top: 1.1rem; border-bottom: 1px solid #ccc; }
tr.trial td { color: #666; }
tr.trial td.run { padding-left: .9rem; }
tr.best td.run { font-weight: 600; }
img { max-width: 100%; height: auto; }
code { background: #f4f4f4; padding: .15rem .35rem; border-radius: 3px; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; } }
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
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(experiment)}: comparison</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(experiment)}</h1><p class='about'>{count}, ranked by quality within each kind and metric. "
        "lr: peak learning rate; dev-h: device hours; a search's cost is that of all its trials.</p>",
        _table(rows) if rows else "<p>There are no runs yet.</p>",
        *(_figure(heading, picture) for heading, picture in plots.items()),
        "" if link is None or not rows else _link(link),
        "</body></html>",
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as exc:
        raise StorageError(
            "the report cannot be written", got=f"{path}: {exc.strerror}", do="give another --report"
        ) from exc


def _table(rows: Sequence[RunRow]) -> str:
    known = {row.run_id for row in rows}
    head = "".join(f'<th class="{_cell_class(name)}">{escape(name)}</th>' for name in HEADINGS)
    lines = [f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>']
    shown_group: tuple[str, str] | None = None
    for row in rows:
        is_trial = row.parent in known
        if not is_trial and row.group != shown_group:
            shown_group = row.group
            title = escape(group_title(row.group))
            lines.append(f'<tr class="group"><td></td><td colspan="{len(HEADINGS) - 1}">{title}</td></tr>')
        kind = "trial" if is_trial else "best" if row.rank == 1 else ""
        cells = "".join(
            f'<td class="{_cell_class(name)}">{escape(text)}</td>'
            for name, text in zip(HEADINGS, table_cells(row, is_trial=is_trial), strict=True)
        )
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell_class(heading: str) -> str:
    return heading if heading in _TEXT_COLUMNS else "number"


def _figure(heading: str, picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    title = escape(heading)
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">'


def _link(link: ComparisonLink) -> str:
    start = "" if link.command is None else f"<p>Start the server first: <code>{escape(link.command)}</code></p>"
    return f'<h2>In MLflow</h2><p><a href="{escape(link.url)}">Compare these runs in MLflow</a></p>{start}'
