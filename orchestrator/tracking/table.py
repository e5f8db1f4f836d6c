"""Ranked rows as a table for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from orchestrator.quantities import human_count
from orchestrator.tracking.rows import Group, RunRow, group_titles

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("#", "run", "method", "lr", "steps", "quality", "tokens", "dev-h", "USD", "status")
"""Columns of the table: learning rate, device hours and US dollars under their short names."""
_WIDEST = {"run": 34, "status": 24}
_NARROWEST = {"run": 25, "status": 12}
"""Room for `finetune, eval/accuracy ↑` and for `stopped early`, wrapped."""
_LEFT_OUT_FIRST = ("tokens", "lr", "steps", "dev-h", "USD", "#", "method")


def render_table(rows: Sequence[RunRow], *, experiment: str, width: int = 100) -> Table:
    """A table for a terminal of `width` columns; narrow ones do without the figures that say least."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not rows:
        message = Table(show_header=False, box=None)
        message.add_row(Text(f"No runs in {experiment!r} yet. Start one: orchestrator run SPEC"))
        return message
    known = {row.run_id: row for row in rows}
    lines = [(row, table_cells(row, above=known.get(row.parent or ""))) for row in rows]
    titles = group_titles(row.group for row in rows if row.parent not in known)
    widths = _column_widths([cells for _, cells in lines], titles=chain(*titles.values()), width=width)
    title = Text(f"{experiment}: {len(rows)} run{'s' if len(rows) > 1 else ''}", style="bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, columns in widths.items():
        left = heading in ("run", "method", "status")
        table.add_column(
            heading,
            width=columns,
            justify="left" if left else "right",
            overflow="fold" if heading == "status" else "ellipsis",
            no_wrap=heading != "status",
        )
    shown_group: Group | None = None
    for row, cells in lines:
        if row.parent not in known and row.group != shown_group:
            shown_group = row.group
            table.add_section()
            for line in chain(*(_wrapped(line, widths["run"]) for line in titles[row.group])):
                table.add_row(*([""] * list(widths).index("run")), Text(line, style="bold"))
        texts = [Text(text) for heading, text in zip(HEADINGS, cells, strict=True) if heading in widths]
        table.add_row(*texts, style="dim" if row.parent in known else None)
    return table


def _wrapped(title: str, width: int) -> list[str]:
    """In lines of so many columns; the arrow stays beside its metric."""
    lines = textwrap.wrap(re.sub(r" (?=[↑↓])", "\N{NO-BREAK SPACE}", title), width)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def table_cells(row: RunRow, *, above: RunRow | None) -> list[str]:
    """A row's text under `HEADINGS`; a trial or stage is marked as belonging to the run above it, and says which metric
    its quality is where that is another one."""
    name = row.name if above is None else f"└ {row.name}"
    metric = (row.quality_metric or "").rpartition("/")[2]
    named = f" {metric}" if above is not None and row.quality_metric != above.quality_metric else ""
    if row.trials:
        name += f" ({row.trials} stages)" if row.role == "stages" else f" (best of {row.trials})"
    return [
        "" if row.rank is None else str(row.rank),
        name,
        row.method or "-",
        "-" if row.learning_rate is None else f"{row.learning_rate:.2g}",
        "-" if row.steps is None else str(row.steps),
        "-" if row.quality is None else f"{row.quality:.4g}{named}",
        "-" if row.tokens is None else human_count(row.tokens),
        "-" if row.gpu_hours is None else f"{row.gpu_hours:.3g}",
        "-" if row.usd is None else f"{row.usd:.3g}",
        row.status.partition(" at step ")[0] + (f"; {row.note}" if row.note else ""),  # steps have their column
    ]


def _column_widths(lines: Sequence[Sequence[str]], *, titles: Iterable[str], width: int) -> dict[str, int]:
    """Columns to show and how wide: names and status give way a little, then figures are left out."""
    widths = {
        heading: min(max(len(heading), *(len(cells[place]) for cells in lines)), _WIDEST.get(heading, width))
        for place, heading in enumerate(HEADINGS)
    }
    widths["run"] = max(widths["run"], min(_WIDEST["run"], max([_NARROWEST["run"], *map(len, titles)])))
    give = {heading: widths[heading] - min(widths[heading], narrowest) for heading, narrowest in _NARROWEST.items()}
    for unwanted in ("", *_LEFT_OUT_FIRST):
        widths.pop(unwanted, None)
        excess = sum(widths.values()) + 2 * len(widths) - width  # rich puts two blanks between columns
        if excess <= sum(give.values()):
            break
    for heading, most in give.items():
        taken = min(most, max(0, excess))
        widths[heading] -= taken
        excess -= taken
    return widths
