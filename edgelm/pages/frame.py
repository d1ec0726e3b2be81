"""What all charts share: two layouts, axes, room for labels.

Every chart is drawn twice, for wide windows and for narrow ones, and the style sheet shows one of them: text that is
scaled down with a wide drawing cannot be read on a phone. Titles of axes are HTML, so that they wrap.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from edgelm.pages.numbers import percent, power_label

FONT = 13  # pixels, as in the style sheet
LINE = 16  # pixels from one line of text to the next
GAP = 8  # pixels that labels beside each other stay apart, at least


@dataclass(frozen=True)
class Frame:
    """A layout: the size of a drawing and of the margins around its plot, in pixels; `name` is its CSS class."""

    name: str
    width: int
    height: int
    left: int
    right: int = 16
    top: int = 22
    bottom: int = 28

    @property
    def x_range(self) -> tuple[int, int]:
        """The plot from left to right."""
        return self.left, self.width - self.right

    @property
    def y_range(self) -> tuple[int, int]:
        """The plot from bottom to top."""
        return self.height - self.bottom, self.top


BROAD, SLIM = Frame("broad", 960, 310, 76), Frame("slim", 358, 270, 66, 12)


@dataclass(frozen=True)
class Drawing:
    """SVG elements, `height` pixels high, with HTML above and below them."""

    svg: str
    height: int
    above: str = ""
    below: str = ""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels; `log` for a logarithmic scale. Values beyond the ends are drawn at the ends."""

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


def figure(
    title: str,
    draw: Callable[[Frame], Drawing],
    *,
    x_label: str = "",
    y_label: str = "",
    legend: str = "",
) -> str:
    """A figure in both layouts: caption, legend, titles of the axes above and below the drawing.

    Args:
        title: the caption.
        draw: draws one layout.
        x_label: what the horizontal axis is.
        y_label: what the vertical axis is.
        legend: HTML.
    """
    parts = [f"<figure><figcaption>{escape(title)}</figcaption>{legend}"]
    if y_label:
        parts.append(f'<div class="axis">↑ {escape(y_label)}</div>')
    below = f'<div class="axis x">{escape(x_label)} →</div>' if x_label else ""
    for frame in (BROAD, SLIM):
        drawing = draw(frame)
        parts.append(
            f'<div class="{frame.name}">{drawing.above}<svg viewBox="0 0 {frame.width} {drawing.height}" role="img" '
            f'aria-label="{escape(title)}">{drawing.svg}</svg>{below}{drawing.below}</div>'
        )
    return "".join([*parts, "</figure>"])


def text_width(text: str) -> float:
    """Pixels that a text takes at most, about: common fonts for screens are not wider than DejaVu Sans."""
    return FONT * sum(map(_letter_width, text))


def _letter_width(letter: str) -> float:
    if letter in "iljI.,:;'|!()[]- ftr":
        return 0.42
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    if letter in "mwMW@%—…":
        return 1.0
    return 0.78 if letter.isupper() else 0.65


def value_axis(
    frame: Frame, values: Iterable[float], *, log: bool, floor: float = 1e-12, given: tuple[float, float] | None = None
) -> Axis:
    """The vertical axis for these values: whole decades where it is logarithmic, else from zero (or below).

    Values that are not above `floor` have no place of their own on a logarithmic axis.
    """
    values = [value for value in values if math.isfinite(value)]
    if given:
        low, high = given
    elif log:
        positive = [value for value in values if value > floor] or [1.0]
        low = 10.0 ** math.floor(math.log10(min(positive)))
        high = 10.0 ** math.ceil(math.log10(max(*positive, low * 10)) - 1e-12)
    else:
        low, high = min(0.0, *values), max(0.0, *values)
        high = high if high > low else low + 1.0
    return Axis(low, high, *frame.y_range, log)


def value_grid(frame: Frame, axis: Axis, *, share: bool = False, below: bool = False) -> str:
    """Lines and numbers of the vertical axis.

    Args:
        frame: the layout.
        axis: the vertical axis.
        share: write values in percent.
        below: smaller values are drawn at the lowest line, and its number says so.
    """
    parts = []
    left, right = frame.x_range
    for tick in _log_ticks(axis) if axis.log else nice_ticks(axis.low, axis.high, 5):
        y = axis.at(tick)
        text = percent(tick) if share else power_label(tick)
        text = f"≤ {text}" if below and tick <= axis.low else text
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{left - 7}" y="{y + 4.5:.1f}">{text}</text>')
    return "".join(parts)


def _log_ticks(axis: Axis) -> list[float]:
    first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
    step = max(1, (last - first + 5) // 6)
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if last - first <= 2:
        ticks += [factor * 10.0**power for power in range(first, last) for factor in (2, 5)]
    return sorted(ticks)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def ticks_below(frame: Frame, labels: Sequence[tuple[float, str]]) -> str:
    """Labels (pixel, text) under the plot, from left to right; those that would touch the last one are left out."""
    end = -math.inf
    parts = []
    for x, text in labels:
        half = text_width(text) / 2
        if x - half >= end + GAP and x + half <= frame.width:
            parts.append(f'<text class="middle" x="{x:.1f}" y="{frame.y_range[0] + 22}">{escape(text)}</text>')
            end = x + half
    return "".join(parts)


def key(names: Iterable[tuple[str, str]]) -> str:
    """What labels of a drawing stand for, (label, name), as HTML."""
    items = "".join(f"<li><b>{escape(label)}</b> {escape(name)}</li>" for label, name in names)
    return f'<ul class="key">{items}</ul>'
