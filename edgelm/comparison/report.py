"""Render a comparison as one HTML page, with the template `compare.html.j2` of `edgelm.pages`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from edgelm.comparison.compare import MEASURES, Comparison, Measure
from edgelm.comparison.entries import Entry, Parity
from edgelm.pages.bars import Bar, bar_chart
from edgelm.pages.charts import STYLES, Series, line_chart
from edgelm.pages.frame import Figure
from edgelm.pages.numbers import number, power_label, size_label
from edgelm.pages.page import render as render_page
from edgelm.pages.page import write_page

_BARS = ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "resident_peak",
         "decode_joules_per_token")  # fmt: skip


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the comparison to `path`; raises as `write_page`."""
    write_page(render(comparison), path)


def render(comparison: Comparison) -> str:
    """Return the comparison as an HTML document."""
    return render_page(
        "compare.html.j2",
        comparison=comparison,
        rows=[_row(comparison, measure) for measure in comparison.measures],
        groups=_groups(comparison),
        charts=_charts(comparison),
        base=None if comparison.base is None else comparison.names[comparison.base],
        notes=[*comparison.notes, *(f"{e.name}: {note}" for e in comparison.entries for note in e.notes)],
    )


def _row(comparison: Comparison, measure: Measure) -> tuple[str, list[str]]:
    return measure.heading, [comparison.cell(measure, entry) for entry in comparison.entries]


def _groups(comparison: Comparison) -> dict[str, list[tuple[str, str, tuple[str | None, ...]]]]:
    """Return the rows (title, "same" or "differs", values) of each group of settings."""
    found: dict[str, list[tuple[str, str, tuple[str | None, ...]]]] = {}
    for row in comparison.settings:
        found.setdefault(row.setting.group, []).append((row.setting.title, row.word, row.values))
    dates = tuple(None if e.created is None else e.created.replace("T", " ").replace("+00:00", " UTC")
                  for e in comparison.entries)  # fmt: skip
    if any(dates):
        found.setdefault("Run", []).append(("Date", "", dates))
    found.setdefault("Bundle", []).insert(0, ("Folder", "", tuple(e.bundle for e in comparison.entries)))
    return found


def _charts(comparison: Comparison) -> list[Figure | None]:
    entries = comparison.entries
    by_key = {measure.key: measure for measure in MEASURES}
    kl = [
        Bar(e.name, e.parity.kl, _against_limit(e.parity), e.parity.kl_limit) for e in entries if e.parity is not None
    ]
    charts = [
        bar_chart("Mean KL divergence to the quantised reference", kl, log=True,
                  x_label="KL, nats; lower is better", limit_label="limit: a device beyond it fails"),
        *_layer_charts(entries),
    ]  # fmt: skip
    for key in _BARS:
        measure = by_key[key]
        bars = [Bar(e.name, measure.get(e), comparison.cell(measure, e)) for e in entries]
        better = f"{measure.better} is better"
        charts.append(
            bar_chart(
                measure.title,
                bars,
                x_label=f"{_unit(measure)}; {better}",
                tick=size_label if key == "resident_peak" else power_label,
            )
        )
    return charts


def _against_limit(parity: Parity) -> str:
    if parity.kl is None or parity.kl_limit is None:
        return "not a number" if parity.kl is None else number(parity.kl, 3)
    word = "above the limit" if parity.kl > parity.kl_limit else "limit"
    return f"{number(parity.kl, 3)}, {word} {number(parity.kl_limit, 3)}"


def _unit(measure: Measure) -> str:
    return {"load_seconds": "seconds", "resident_peak": "resident memory"}.get(
        measure.key, measure.title.partition(", ")[2]
    )


def _layer_charts(entries: Sequence[Entry]) -> list[Figure | None]:
    """Return charts of the error after each layer, of at most as many devices as there are styles of curves."""
    found = [(e.name, e.parity.layers) for e in entries if e.parity is not None and e.parity.layers]
    values = [y for _, layers in found for _, y in layers if y is not None]
    charts = []
    for start in range(0, len(found), STYLES):
        part = found[start : start + STYLES]
        series = [
            Series(name, style, [x for x, _ in layers], [math.nan if y is None else y for _, y in layers])
            for style, (name, layers) in enumerate(part, 1)
        ]
        which = "" if len(found) <= STYLES else f": {part[0][0]} to {part[-1][0]}"
        charts.append(
            line_chart(
                f"Error of the residual stream after each layer, against the quantised reference{which}",
                series,
                x_label="layer",
                y_label="relative error, median over positions; lower is better",
                log=True,
                scale=values,
            )
        )
    return charts
