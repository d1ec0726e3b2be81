"""A report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edgelm.pages.numbers import number
from edgelm.pages.style import STYLE
from edgelm.places import Kind
from edgelm.sizes import format_size

_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
# Control characters, halves of surrogate pairs, and marks that turn the direction of whatever follows.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def _foreign(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(2000)
    ours = start.startswith(_START.encode()) and b"<style>" + STYLE[:30].encode() in start
    return None if ours else "is no report that EdgeLM wrote"


REPORT = Kind("a report", _foreign, is_folder=False)
"""What `document` makes."""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections that are HTML already; characters that would garble it are replaced."""
    page = (
        _START + '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><title>{escape(title)}</title></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


@dataclass(frozen=True)
class Column:
    """A column of a table. `kind` is a class of the style sheet: "num" for numbers, "long" for text that wraps."""

    title: str
    kind: str = ""


@dataclass(frozen=True)
class Html:
    """A cell that is HTML already; others are escaped."""

    text: str


Cell = str | Html


def table(name: str, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], marks: Sequence[str] = ()) -> str:
    """A table that scrolls inside its own container where the window is narrow.

    Args:
        name: what it holds, for screen readers.
        columns: title and kind of each.
        rows: a cell for each column.
        marks: a class of the style sheet for each row.
    """
    head = "".join(f"<th{_class(column.kind)}>{escape(column.title)}</th>" for column in columns)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td{_class(column.kind)}>{cell.text if isinstance(cell, Html) else escape(cell)}</td>"
            for column, cell in zip(columns, row, strict=True)
        )
        body.append(f"<tr{_class(marks[index] if marks else '')}>{cells}</tr>")
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def facts_table(name: str, facts: Mapping[str, object]) -> str:
    """Two columns: names, in which underscores become spaces, and values."""
    rows = [(key.replace("_", " "), _fact(value)) for key, value in facts.items()]
    return f'<div class="facts">{table(name, (Column("What"), Column("Value")), rows)}</div>'


def device_facts(device: Mapping[str, object]) -> dict[str, object]:
    """The facts of `edgelm.devices.describe` for `facts_table`, memory as sizes."""
    return {
        key: format_size(value) if key.startswith("memory") and isinstance(value, int) else value
        for key, value in device.items()
    }


def files_table(name: str, files: Mapping[str, Mapping[str, object]]) -> str:
    """Name, size and SHA-256 of files."""
    rows = [
        (Html(f"<code>{escape(file)}</code>"), _file_size(info.get("size")), str(info.get("sha256")))
        for file, info in files.items()
    ]
    return table(name, (Column("File"), Column("Size", "num"), Column("SHA-256", "hash mono")), rows)


def _file_size(count: object) -> Cell:
    if not isinstance(count, int):
        return "unknown"
    return Html(f'<span title="{count:,} bytes">{format_size(count)}</span>')


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _fact(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
