"""Named points with a frontier, and heat maps, as inline SVG like `charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgelm.pages.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    axis_labels,
    svg_figure,
    value_axis,
    value_grid,
)

_LINE = 14  # pixels between two names
_LETTER = 6.6  # pixels of a letter, about
_CELL, _ROW_LABEL, _COLUMN_LABELS = 20, 56, 20


@dataclass(frozen=True)
class Point:
    """One named point; `tip` is shown when pointed at."""

    name: str
    x: float
    y: float
    tip: str


def scatter_chart(
    title: str, points: Sequence[Point], frontier: Sequence[int], *, x_label: str, y_label: str, floor: float = 1e-12
) -> str:
    """An SVG figure of points, y logarithmic, with a line through the points `frontier`; "" where there is none.

    Points whose y is not above `floor` are drawn at the bottom.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return ""
    y_axis = value_axis([point.y for point in shown], True, floor, None)
    x_axis = _x_axis([point.x for point in shown])
    parts = [value_grid(y_axis), _x_ticks(x_axis)]
    line = [points[index] for index in frontier]
    path = "".join(f"{'L' if i else 'M'}{x_axis.at(p.x):.1f} {y_axis.at(p.y):.1f}" for i, p in enumerate(line))
    parts.append(f'<path class="frontier" d="{path}"/>')
    names = _names([(x_axis.at(point.x), y_axis.at(point.y), point.name) for point in shown])
    on_line = {id(point) for point in line}
    for point, (x, y, anchor) in zip(shown, names, strict=True):
        colour = 4 if id(point) in on_line else 1
        parts.append(
            f'<circle class="c{colour}" cx="{x_axis.at(point.x):.1f}" cy="{y_axis.at(point.y):.1f}" r="5">'
            f"<title>{escape(point.tip)}</title></circle>"
            f'<text class="name" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(point.name)}</text>'
        )
    parts.append(axis_labels(x_label, y_label))
    return svg_figure(title, "".join(parts))


def heat_map(title: str, rows: Sequence[Sequence[float | None]], tips: Sequence[Sequence[str]], row_name: str) -> str:
    """An SVG figure of one square a value, darker for larger, from nothing to the largest; None is an empty square.

    The shade is the value's root, so that small ones can be told apart.
    """
    largest = max((value for row in rows for value in row if value is not None and math.isfinite(value)), default=0.0)
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        return ""
    width, height = _ROW_LABEL + columns * _CELL, _COLUMN_LABELS + len(rows) * _CELL
    parts = []
    for column in range(0, columns, max(1, columns // 16)):
        x = _ROW_LABEL + (column + 0.5) * _CELL
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="14">{column}</text>')
    for index, (row, row_tips) in enumerate(zip(rows, tips, strict=True)):
        y = _COLUMN_LABELS + index * _CELL
        label = escape(f"{row_name} {index}")
        parts.append(f'<text class="tick" text-anchor="end" x="{_ROW_LABEL - 6}" y="{y + 14}">{label}</text>')
        for column, (value, tip) in enumerate(zip(row, row_tips, strict=True)):
            parts.append(_cell(_ROW_LABEL + column * _CELL, y, value, largest, tip))
    caption = f"<figcaption>{escape(title)}</figcaption>"
    # Small maps are not blown up to the page's width.
    return (
        f'<figure>{caption}<svg class="heat" style="max-width:{2 * width}px" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(parts)}</svg></figure>'
    )


def _cell(x: float, y: float, value: float | None, largest: float, tip: str) -> str:
    place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{_CELL - 2}" height="{_CELL - 2}"'
    name = f"<title>{escape(tip)}</title>"
    if value is None:
        return f'<rect class="empty" {place}>{name}</rect>'
    shade = 1.0 if not math.isfinite(value) else math.sqrt(max(value, 0.0) / largest) if largest > 0 else 0.0
    return f'<rect class="empty" {place}></rect><rect class="cell" fill-opacity="{shade:.3f}" {place}>{name}</rect>'


def _x_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(max(0.0, low - room), high + room, LEFT, WIDTH - RIGHT)


def _x_ticks(axis: Axis) -> str:
    """Marks at round numbers, five to ten of them."""
    rough = (axis.high - axis.low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step + 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    y = HEIGHT - BOTTOM + 16
    return "".join(
        f'<text class="tick" text-anchor="middle" x="{axis.at(tick):.1f}" y="{y}">{tick:.4g}</text>' for tick in ticks
    )


def _names(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Where each name stands, (x, y, anchor): beside its point, moved down or up where another stands already."""
    taken: list[tuple[float, float, float]] = []
    found: dict[int, tuple[float, float, str]] = {}
    for index in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y, name = points[index]
        width = _LETTER * len(name)
        left = x + 9 + width > WIDTH - RIGHT
        start = x - 9 - width if left else x + 9
        near = [(a, b, other) for a, b, other in taken if start <= b and start + width >= a]
        places = [y + 4 + step * _LINE for step in sorted(range(-12, 13), key=lambda step: (abs(step), -step))]
        inside = [place for place in places if TOP <= place <= HEIGHT - BOTTOM]
        free = [place for place in inside if all(abs(place - other) >= _LINE - 1 for _, _, other in near)]
        at = free[0] if free else y + 4
        taken.append((start, start + width, at))
        found[index] = (x - 9, at, "end") if left else (x + 9, at, "start")
    return [found[index] for index in range(len(points))]
