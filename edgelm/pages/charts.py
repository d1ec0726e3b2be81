"""Line charts as inline SVG: no plotting library, no script, colours from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 26, 46


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is the number of the page's variable --series-N; `dots` marks every point."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Span:
    """A labelled stretch of the x axis."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `log` for a logarithmic scale, where values below `low` are drawn at `low`."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.first + share * (self.last - self.first)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    spans: Sequence[Span] = (),
    limit: tuple[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    floor: float = 1e-12,
) -> str:
    """An SVG figure with axes, legend and description. Points that are not finite leave a gap."""
    values = [y for item in series for y in item.y if math.isfinite(y)] + ([limit[1]] if limit else [])
    positions = [x for item in series for x in item.x]
    if not values or not positions:
        return ""
    y_axis = value_axis(values, log, floor, y_range)
    x_low, x_high = min(positions), max(positions)
    x_axis = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    parts = [_spans(spans, x_axis), value_grid(y_axis), _x_ticks(x_axis, spans)]
    if limit:
        y = y_axis.at(limit[1])
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_curve(item, x_axis, y_axis) for item in series]
    parts.append(axis_labels(x_label, y_label))
    return svg_figure(title, "".join(parts), _legend(series, limit))


def svg_figure(title: str, content: str, legend: str = "") -> str:
    """A figure of the charts' size around SVG elements."""
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{svg}</figure>"


def axis_labels(x_label: str, y_label: str) -> str:
    """What the axes are."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(16 {middle}) rotate(-90)">{escape(y_label)}</text>'
    )


def value_axis(values: Sequence[float], log: bool, floor: float, given: tuple[float, float] | None) -> Axis:
    """The vertical axis for these values: whole decades where it is logarithmic, else from zero (or below)."""
    if given:
        low, high = given
    elif log:
        positive = [value for value in values if value > floor]
        low = 10 ** math.floor(math.log10(min(positive, default=floor)))
        high = 10 ** math.ceil(math.log10(max([*positive, low * 10])) - 1e-12)
    else:
        low, high = min(0.0, min(values)), max(values) or 1.0
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def value_grid(axis: Axis) -> str:
    """Lines and numbers of the vertical axis."""
    if axis.log:
        first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
        step = max(1, (last - first + 5) // 6)
        ticks = [10.0**power for power in range(first, last + 1, step)]
    else:
        ticks = [axis.low + (axis.high - axis.low) * part / 5 for part in range(6)]
    parts = []
    for tick in ticks:
        y = axis.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:.3g}</text>')
    return "".join(parts)


def _x_ticks(axis: Axis, spans: Sequence[Span]) -> str:
    if spans:
        return ""
    low, high = math.ceil(axis.low), math.floor(axis.high)
    step = max(1, math.ceil((high - low) / 16))
    return "".join(
        f'<text class="tick" text-anchor="middle" x="{axis.at(x):.1f}" y="{HEIGHT - BOTTOM + 16}">{x}</text>'
        for x in range(low, high + 1, step)
    )


def _spans(spans: Sequence[Span], axis: Axis) -> str:
    parts = []
    for number, span in enumerate(spans):
        start, stop = axis.at(span.start), axis.at(span.stop)
        if number % 2 == 0:
            height = HEIGHT - BOTTOM - TOP
            parts.append(
                f'<rect class="span" x="{start:.1f}" y="{TOP}" width="{max(stop - start, 0):.1f}" height="{height}"/>'
            )
        # Labels of narrow stretches would overlap: every other one stands a line lower.
        y = HEIGHT - BOTTOM + (14 if number % 2 == 0 else 26)
        middle = (start + stop) / 2
        parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{y}">{escape(span.label)}</text>')
    return "".join(parts)


def _curve(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    pieces: list[str] = []
    dots: list[str] = []
    open_line = False
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y):
            open_line = False
            continue
        px, py = x_axis.at(x), y_axis.at(y)
        pieces.append(f"{'L' if open_line else 'M'}{px:.1f} {py:.1f}")
        open_line = True
        if series.dots:
            tip = escape(f"{series.label}: {x:g} -> {y:.4g}")
            dots.append(
                f'<circle class="c{series.colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{tip}</title></circle>'
            )
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    return f'<path class="s{series.colour}" d="{"".join(pieces)}"{dash}/>{"".join(dots)}'


def _legend(series: Sequence[Series], limit: tuple[str, float] | None) -> str:
    items = [
        f'<span><i class="b{item.colour}{" dashed" if item.dashed else ""}"></i>{escape(item.label)}</span>'
        for item in series
    ]
    if limit:
        items.append(f'<span><i class="blimit"></i>{escape(limit[0])} {limit[1]:.3g}</span>')
    return f'<div class="legend">{"".join(items)}</div>'
