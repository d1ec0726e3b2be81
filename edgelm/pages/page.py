"""A report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from edgelm.places import Kind

STYLE = """
:root { --page: #ffffff; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --band: #f4f6f8; --good: #17734a;
  --bad: #b3261e; --skip: #6b7680; --series-1: #1f6feb; --series-2: #d9730d; --series-3: #8a5cd1; --series-4: #2a9d8f; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e4e8ec; --soft: #9aa6b2; --line: #333c45;
  --band: #1c2228; --good: #4cc38a; --bad: #ff8078; --skip: #8b97a3; --series-1: #6cb0ff; --series-2: #ffab5e;
  --series-3: #b89bf2; --series-4: #5fd0c1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; } p { margin: 6px 0; }
.soft { color: var(--soft); } code, .mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
.verdict { display: inline-block; padding: 3px 14px; border-radius: 6px; color: var(--page); font-weight: 700; }
.verdict.pass { background: var(--good); } .verdict.fail { background: var(--bad); }
.cause { border-left: 4px solid var(--bad); padding: 6px 12px; background: var(--band); margin: 14px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 10px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
.card b { display: block; font-size: 20px; } .card span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; min-width: 640px; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.num { text-align: right; white-space: nowrap; }
th.num { text-align: right; } .pass { color: var(--good); } .fail { color: var(--bad); font-weight: 700; }
.verdict.pass, .verdict.fail { color: var(--page); } .skip { color: var(--skip); }
figure { margin: 18px 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg .label { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; } .span { fill: var(--band); }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 4; }
path { fill: none; stroke-width: 2; } .s1 { stroke: var(--series-1); } .s2 { stroke: var(--series-2); }
.s3 { stroke: var(--series-3); } .s4 { stroke: var(--series-4); } .c1 { fill: var(--series-1); }
.c2 { fill: var(--series-2); } .c3 { fill: var(--series-3); } .c4 { fill: var(--series-4); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; margin: 0 6px 4px 0; }
.legend .dashed { border-top-style: dashed; } .b1 { color: var(--series-1); } .b2 { color: var(--series-2); }
.b3 { color: var(--series-3); } .b4 { color: var(--series-4); }
.legend .blimit { color: var(--bad); border-top-style: dotted; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
.text { white-space: pre-wrap; word-break: break-word; } .more { color: var(--soft); }
.frontier { stroke: var(--good); stroke-width: 1.5; stroke-dasharray: 6 4; } svg .name { fill: var(--ink); }
.cell { fill: var(--series-2); } .empty { fill: var(--band); } svg.heat { max-width: 860px; }
"""


_START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'


def _foreign(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(2000)
    ours = start.startswith(_START.encode()) and b"<style>" + STYLE[:30].encode() in start
    return None if ours else "is no report that EdgeLM wrote"


REPORT = Kind("a report", _foreign, is_folder=False)
"""What `document` makes."""


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page of sections that are HTML already."""
    return (
        _START + '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def number(value: float | None, unit: str = "") -> str:
    """Four digits, or "-" where there is no finite number."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return f"{text}{unit}"


def percent(value: float | None) -> str:
    """A share in percent, or "-"."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.4g} %"


def facts_table(facts: Mapping[str, object]) -> str:
    """Two columns: names, in which underscores become spaces, and values."""
    rows = "".join(
        f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(_fact(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f'<div class="wide"><table><tr><th>What</th><th>Value</th></tr>{rows}</table></div>'


def files_table(files: Mapping[str, Mapping[str, object]]) -> str:
    """Name, size and SHA-256 of files."""
    rows = "".join(
        f'<tr><td class="mono">{escape(name)}</td><td class="num">{info.get("size")}</td>'
        f'<td class="mono">{escape(str(info.get("sha256")))}</td></tr>'
        for name, info in files.items()
    )
    return (
        f'<div class="wide"><table><tr><th>File</th><th class="num">Bytes</th><th>SHA-256</th></tr>{rows}</table></div>'
    )


def _fact(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
