"""Line charts as inline SVG: no plotting library, no script, colours from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgelm.pages.frame import (
    FONT,
    GAP,
    LAYOUTS,
    Axis,
    Drawing,
    Figure,
    Frame,
    Shape,
    nice_ticks,
    px,
    shape,
    text_width,
    ticks_below,
    value_axis,
    value_grid,
)
from edgelm.pages.numbers import number

STYLES = 6
"""Number of curve styles: each has its own colour, dashes and marks."""

_MARKS = (  # around (0, 0)
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    "M0 -4.2l4.2 7.2h-8.4z",
    "M0 4.2l4.2 -7.2h-8.4z",
    "M-3.4 -3.4l6.8 6.8M-3.4 3.4l6.8 -6.8",
)
_ROOM = 10  # least distance of two marks, in pixels
_DENSE = 3  # curves whose points are closer than this, in pixels, get a thin line


@dataclass(frozen=True)
class Series:
    """A curve. `style`, from 1 to STYLES, selects colour, dashes and marks; `marks` is whether points are marked."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = True


@dataclass(frozen=True)
class Span:
    """A labelled section of the x axis."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True)
class Flag:
    """A labelled vertical line at a value of the x axis, where something is wrong."""

    label: str
    x: float


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    share: bool = False,
    spans: Sequence[Span] = (),
    flag: Flag | None = None,
    x_names: Mapping[float, str] | None = None,
    scale: Sequence[float] = (),
    floor: float = 1e-12,
) -> Figure | None:
    """Return a figure of curves, None if no value is finite. Points that are not finite leave a gap.

    Args:
        title: the caption.
        series: the curves.
        x_label: title of the horizontal axis, which has whole numbers.
        y_label: title of the vertical axis.
        log: logarithmic vertical axis.
        share: the values are shares: an axis from 0 to 100 %.
        spans: labelled sections of the horizontal axis, in place of numbers.
        flag: a marked place.
        x_names: names of values of the horizontal axis, in place of numbers; if every point has one, no others.
        scale: further values that the vertical axis covers, so that several charts have one scale.
        floor: smaller values are drawn at the end of a logarithmic axis.
    """
    values = [y for item in series for y in item.y if math.isfinite(y)]
    positions = [x for item in series for x in item.x]
    if not values or not positions:
        return None

    def draw(frame: Frame) -> Drawing:
        y_axis = value_axis(frame, [*values, *scale], log=log, floor=floor, given=(0.0, 1.0) if share else None)
        named = x_names is not None and set(positions) <= x_names.keys()
        first, last = frame.x_range
        if x_names is not None and named:  # room for the name of the last point
            last = min(last, round(frame.width - text_width(x_names[max(positions)]) / 2))
        x_axis = Axis(min(positions), max(positions), first, last)
        shapes, key = _spans(frame, spans, x_axis) if spans else (_x_ticks(frame, x_axis, x_names or {}, named), [])
        shapes += value_grid(frame, y_axis, share=share, below=log and min(values) < y_axis.low)
        for item in series:
            shapes += _curve(item, x_axis, y_axis, x_names or {})
        return Drawing(frame, frame.height, [*shapes, *_flag(frame, flag, x_axis)], key=key)

    legend = [(_sample(item), item.label) for item in series]
    return Figure(title, [draw(frame) for frame in LAYOUTS], x_label, y_label, legend)


def _x_ticks(frame: Frame, axis: Axis, names: Mapping[float, str], only_names: bool) -> list[Shape]:
    low, high = math.ceil(axis.low), math.floor(axis.high)
    # As many numbers as fit.
    room = (axis.last - axis.first) / (text_width(f"{high:,}") + 2 * GAP)
    ticks = nice_ticks(low, high, max(1, int(room))) if high > low else [low]
    ticks = [] if only_names else ticks
    places = sorted({*names, *(tick for tick in ticks if tick == int(tick))})
    return ticks_below(frame, [(axis.at(x), names.get(x, f"{x:,.0f}")) for x in places if axis.low <= x <= axis.high])


def _spans(frame: Frame, spans: Sequence[Span], axis: Axis) -> tuple[list[Shape], list[tuple[str, str]]]:
    """Return bands with names, or, if a name is wider than its band, with numbers and a key."""
    bottom, top = frame.y_range
    ends = [(axis.at(span.start), axis.at(span.stop)) for span in spans]
    roomy = all(text_width(span.label) + GAP <= b - a for span, (a, b) in zip(spans, ends, strict=True))
    labels = [span.label if roomy else str(number) for number, span in enumerate(spans, 1)]
    bands = [shape("rect", "span", x=a, y=top, width=b - a, height=bottom - top) for a, b in ends[::2] if b > a]
    ticks = ticks_below(frame, [((a + b) / 2, label) for (a, b), label in zip(ends, labels, strict=True)])
    key = [] if roomy else list(zip(labels, (span.label for span in spans), strict=True))
    return bands + ticks, key


def _flag(frame: Frame, flag: Flag | None, axis: Axis) -> list[Shape]:
    if flag is None:
        return []
    x, (bottom, top) = axis.at(flag.x), frame.y_range
    side, at = ("end", x - 4) if x + 4 + text_width(flag.label) > frame.width else ("start", x + 4)
    line = shape("path", "limit", d=f"M{px(x)} {bottom}V{top - 12}")
    return [line, shape("text", f"failed {side}", x=at, y=top - 22 + FONT, text=flag.label)]


def _curve(series: Series, x_axis: Axis, y_axis: Axis, names: Mapping[float, str]) -> list[Shape]:
    steps: list[str] = []
    places: list[tuple[float, float, float, float]] = []
    open_line = False
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y):
            open_line = False
            continue
        at_x, at_y = x_axis.at(x), y_axis.at(y)
        steps.append(f"{'L' if open_line else 'M'}{px(at_x)} {px(at_y)}")
        open_line = True
        places.append((x, y, at_x, at_y))
    spacing = (x_axis.last - x_axis.first) / max(1, len(series.x) - 1)
    every = max(1, math.ceil(_ROOM / spacing)) if series.marks else 0
    marks = [
        _mark(series, at_x, at_y, f"{series.label}, {names.get(x, str(x))}: {number(y)}")
        for x, y, at_x, at_y in (places[::every] if every else ())
    ]
    fine = " dense" if spacing < _DENSE else ""
    return [shape("path", f"s k{series.style}{fine}", d="".join(steps)), *marks]


def _mark(series: Series, x: float, y: float, title: str = "") -> Shape:
    place = f"translate({px(x)} {px(y)})"
    return shape("path", f"m k{series.style}", transform=place, d=_MARKS[series.style - 1], title=title)


def _sample(series: Series) -> list[Shape]:
    line = shape("path", f"s k{series.style}", d="M0 7H34")
    return [line, _mark(series, 17, 7)] if series.marks else [line]
