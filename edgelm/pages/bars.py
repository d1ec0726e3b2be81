"""Bars with their names above them, as inline SVG like `charts`. On a logarithmic scale, which has no zero, points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from edgelm.pages.frame import (
    FONT,
    GAP,
    LAYOUTS,
    LINE,
    Axis,
    Drawing,
    Figure,
    Frame,
    Shape,
    decades,
    nice_ticks,
    px,
    shape,
    text_width,
    ticks_below,
)
from edgelm.pages.numbers import number, power_label

_BAR = 14  # height in pixels
_ROW = LINE + _BAR + 10
_LEFT = 8
_TAIL = 6  # characters at the end of a name that are kept


@dataclass(frozen=True)
class Bar:
    """A bar: its name, value, the value as text, and a limit that is marked (None: no limit).

    A value that is None or not finite has only its name and text.
    """

    name: str
    value: float | None
    text: str
    limit: float | None = None


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    x_label: str,
    log: bool = False,
    limit_label: str = "",
    tick: Callable[[float], str] = power_label,
) -> Figure | None:
    """Return a figure with a bar for each value, in the order given; None if no value is finite.

    Args:
        title: the caption.
        bars: the bars.
        x_label: title of the axis.
        log: logarithmic axis, with points in place of bars.
        limit_label: what the mark of a limit means, for the legend.
        tick: formats the numbers of the axis.
    """
    if not any(_finite(bar.value) for bar in bars):
        return None
    has_limits = any(_finite(bar.limit) for bar in bars)

    def draw(frame: Frame) -> Drawing:
        axis = _axis(frame, bars, log)
        bottom = LINE // 2 + _ROW * len(bars)
        shapes = _grid(axis, bottom, log)
        placed = Frame(frame.name, frame.width, bottom + frame.bottom, _LEFT)
        ticks = [(axis.at(value), tick(value)) for value in _ticks(axis, log)]
        shapes += ticks_below(placed, ticks)
        for index, bar in enumerate(bars):
            shapes += _bar(frame, axis, bar, index, log)
        return Drawing(placed, placed.height, shapes)

    legend = [([shape("path", "limit", d="M17 0V14")], limit_label)] if has_limits and limit_label else []
    return Figure(title, [draw(frame) for frame in LAYOUTS], x_label, "", legend)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _axis(frame: Frame, bars: Sequence[Bar], log: bool) -> Axis:
    values = [value for bar in bars for value in (bar.value, bar.limit) if _finite(value)]
    first, last = _LEFT + (18 if log else 0), frame.width - frame.right - 18
    if not log:
        return Axis(0.0, max(*values, 0.0) or 1.0, first, last)
    return Axis(*decades(value for value in values if value > 0), first, last, log=True)


def _ticks(axis: Axis, log: bool) -> list[float]:
    if not log:
        return nice_ticks(axis.low, axis.high, 4)
    first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
    return [10.0**power for power in range(first, last + 1, max(1, (last - first + 4) // 5))]


def _grid(axis: Axis, bottom: float, log: bool) -> list[Shape]:
    return [shape("path", "grid", d=f"M{px(axis.at(tick))} {LINE // 2}V{px(bottom)}") for tick in _ticks(axis, log)]


def _bar(frame: Frame, axis: Axis, bar: Bar, index: int, log: bool) -> list[Shape]:
    top = LINE // 2 + _ROW * index
    middle = top + LINE + 2 + _BAR / 2
    room = frame.width - _LEFT - text_width(bar.text) - 3 * GAP
    tip = f"{bar.name}: {bar.text}"
    value_at = frame.width - frame.right + 8
    shapes = [
        shape("text", "name", x=_LEFT, y=top + FONT, text=_cut(bar.name, room), title=tip),
        shape("text", "name end", x=value_at, y=top + FONT, text=bar.text),
    ]
    if _finite(bar.value):
        end = axis.at(bar.value)
        if log:
            shapes.append(shape("circle", "m k1 full", cx=end, cy=middle, r=5, title=tip))
        else:
            width = max(1.0, end - axis.first)
            shapes.append(shape("rect", "bar", x=axis.first, y=middle - _BAR / 2, width=width, height=_BAR, title=tip))
    if _finite(bar.limit):
        at = px(axis.at(bar.limit))
        line = f"M{at} {px(middle - _BAR / 2 - 1)}V{px(middle + _BAR / 2 + 1)}"
        shapes.append(shape("path", "limit", d=line, title=f"{bar.name}: limit {number(bar.limit)}"))
    return shapes


def _cut(text: str, room: float) -> str:
    """Return the text, without its middle where it is wider than `room` pixels: names often end in a number."""
    if text_width(text) <= room:
        return text
    start, end = text[:-_TAIL], text[-_TAIL:]
    while start and text_width(f"{start}…{end}") > room:
        start = start[:-1]
    return f"{start}…{end}"
