"""Parts of all charts: two layouts, axes, labels.

Every chart is drawn twice, for wide windows and for narrow windows, and the style sheet shows one of them: the text of
a wide drawing, scaled down, could not be read on a phone. Titles of axes are HTML, so that they wrap.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgelm.pages.numbers import percent, power_label

FONT = 13  # font size in pixels, as in the style sheet
LINE = 16  # line height in pixels
GAP = 8  # least distance of two labels, in pixels


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
        """Left and right end of the plot, in pixels."""
        return self.left, self.width - self.right

    @property
    def y_range(self) -> tuple[int, int]:
        """Bottom and top of the plot, in pixels."""
        return self.height - self.bottom, self.top


BROAD, SLIM = Frame("broad", 960, 310, 76), Frame("slim", 358, 270, 66, 12)
LAYOUTS = (BROAD, SLIM)


@dataclass(frozen=True)
class Shape:
    """An SVG element. `title` is its tooltip, `text` its content."""

    tag: str
    attributes: Mapping[str, str]
    title: str = ""
    text: str = ""


def shape(tag: str, css: str, *, title: str = "", text: str = "", **attributes: float | str) -> Shape:
    """Return a shape with a CSS class. Numbers are pixels; `_` in an attribute's name becomes `-`."""
    given = {key.replace("_", "-"): value if isinstance(value, str) else px(value) for key, value in attributes.items()}
    return Shape(tag, {"class": css, **given}, title, text)


def px(value: float) -> str:
    """Format pixels, rounded to a tenth."""
    return f"{round(value, 1):g}"


@dataclass(frozen=True)
class Drawing:
    """One layout of a figure, `height` pixels high.

    `above` is a line of text above it, `key` lists its labels as (label, name).
    """

    frame: Frame
    height: int
    shapes: Sequence[Shape]
    above: str = ""
    key: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figure:
    """A figure in both layouts: caption, legend, titles of the axes above and below the drawing.

    `legend` lists (shapes of a sample, 34 pixels wide and 14 high; label).
    """

    title: str
    drawings: Sequence[Drawing]
    x_label: str = ""
    y_label: str = ""
    legend: Sequence[tuple[Sequence[Shape], str]] = ()


@dataclass(frozen=True)
class Axis:
    """Map from values to pixels, logarithmic with `log`. Values beyond the ends are drawn at the ends."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.first + share * (self.last - self.first)


def text_width(text: str) -> float:
    """Return the approximate width of a text in pixels, at most: common screen fonts are not wider than DejaVu Sans."""
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
    """Return the vertical axis for these values: whole decades if logarithmic, else from zero (or below).

    Values up to `floor` are drawn at the end of a logarithmic axis.
    """
    values = [value for value in values if math.isfinite(value)]
    if given:
        low, high = given
    elif log:
        low, high = decades(value for value in values if value > floor)
    else:
        low, high = min(0.0, *values), max(0.0, *values)
        high = high if high > low else low + 1.0
    return Axis(low, high, *frame.y_range, log)


def decades(values: Iterable[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis for positive values: powers of ten, at least a factor of ten apart."""
    values = [*values] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(values)))
    return low, 10.0 ** math.ceil(math.log10(max(*values, low * 10)) - 1e-12)


def value_grid(frame: Frame, axis: Axis, *, share: bool = False, below: bool = False) -> list[Shape]:
    """Return the lines and numbers of the vertical axis.

    Args:
        frame: the layout.
        axis: the vertical axis.
        share: write values in percent.
        below: whether smaller values are drawn at the lowest line, which is then marked.
    """
    shapes = []
    left, right = frame.x_range
    for tick in _log_ticks(axis) if axis.log else nice_ticks(axis.low, axis.high, 5):
        y = axis.at(tick)
        text = percent(tick) if share else power_label(tick)
        text = f"≤ {text}" if below and tick <= axis.low else text
        shapes.append(shape("path", "grid", d=f"M{left} {px(y)}H{right}"))
        shapes.append(shape("text", "end", x=left - 7, y=y + 4.5, text=text))
    return shapes


def _log_ticks(axis: Axis) -> list[float]:
    first, last = round(math.log10(axis.low)), round(math.log10(axis.high))
    step = max(1, (last - first + 5) // 6)
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if last - first <= 2:
        ticks += [factor * 10.0**power for power in range(first, last) for factor in (2, 5)]
    return sorted(ticks)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def ticks_below(frame: Frame, labels: Iterable[tuple[float, str]]) -> list[Shape]:
    """Return labels (pixel, text) under the plot, from left to right, without those that would touch the last one."""
    end = -math.inf
    shapes = []
    for x, text in labels:
        half = text_width(text) / 2
        if x - half >= max(end + GAP, 0) and x + half <= frame.width:
            shapes.append(shape("text", "middle", x=x, y=frame.y_range[0] + 22, text=text))
            end = x + half
    return shapes
