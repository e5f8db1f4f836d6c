"""One HTML file that needs no network: the skeleton, style and pictures that every report of this project shares.

Comes in: a title and blocks of HTML whose texts are escaped. Goes out: a file. Used by
`advise` and `compare`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Literal

from orchestrator.errors import StorageError

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
img { max-width: 100%; height: auto; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
li { margin: .2rem 0; }
code { background: #f4f4f4; padding: .15rem .35rem; border-radius: 3px; overflow-wrap: anywhere; }
@media print { body { margin: 0; max-width: none; } img { break-inside: avoid; } }
"""


def write_page(path: Path, *, title: str, body: Iterable[str], style: str = "") -> None:
    """Write the page: `body` are blocks of HTML, `style` is CSS beside what all pages share.

    Raises StorageError when the file cannot be written.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
        *body,
        "</body></html>",
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            "the report cannot be written", got=f"{path}: {error.strerror}", do="give another --report"
        ) from error


def picture(heading: str, image: bytes, *, kind: Literal["png", "svg+xml"], shows: str | None = None) -> str:
    """A heading and the image below it, inside the page. `shows` is its text for who cannot see it."""
    data = base64.b64encode(image).decode()
    return f'<h2>{escape(heading)}</h2><img alt="{escape(shows or heading)}" src="data:image/{kind};base64,{data}">'


def listing(heading: str, lines: Iterable[str]) -> str:
    """A heading and a list of plain sentences below it; nothing when there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(heading)}</h2><ul>{items}</ul>" if items else ""
