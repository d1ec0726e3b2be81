"""Heat maps that share one scale, as inline SVG like `charts`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgelm.pages.frame import BROAD, GAP, LAYOUTS, LINE, Drawing, Figure, Frame, Shape, px, shape, text_width
from edgelm.pages.numbers import number

_LABELS, _TOP, _CELL, _LOWEST = 30, 20, 24, 0.08
_SMALLEST_CELL = 9  # pixels
_SHADES = 40  # number of shades


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale of shades from `low` to `high`, for all maps of a page."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Scale:
        """Return the scale from the least positive value to the largest, at least a factor of ten."""
        found = [value for value in values if value is not None and math.isfinite(value) and value > 0]
        high = max(found, default=1.0)
        return cls(min([*found, high / 10]), high)

    def shade(self, value: float) -> float:
        """Return the shade: 0 for zero, `_LOWEST` for `low`, 1 for `high` and for values that are not finite."""
        if not math.isfinite(value):
            return 1.0
        if value <= 0:
            return 0.0
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return _LOWEST + (1 - _LOWEST) * min(max(share, 0.0), 1.0)

    def legend(self, zero: str) -> list[tuple[str, str]]:
        """Return (opacity, label) for shades from zero, whose label is `zero`, to the largest value."""
        values = [self.low * (self.high / self.low) ** (part / 4) for part in range(5)]
        return [("0", zero), *((f"{self.shade(value):.2f}", number(value, 2)) for value in values)]


def heat_map(
    title: str,
    rows: Sequence[Sequence[float | None]],
    tips: Sequence[Sequence[str]],
    scale: Scale,
    *,
    row_name: str,
    column_name: str,
) -> Figure | None:
    """Return a figure with a square for each value, darker for larger ones; None without values.

    Args:
        title: the caption.
        rows: the values, in rows of equal length; None is drawn as a crossed square.
        tips: tooltips of the squares.
        scale: the scale of all maps that are compared.
        row_name: name of the rows, in the plural.
        column_name: name of the columns, in the plural.
    """
    if not rows or not rows[0]:
        return None

    def draw(frame: Frame) -> Drawing:
        if (frame.width - _LABELS - 2) / len(rows[0]) >= _SMALLEST_CELL or len(rows) >= len(rows[0]):
            return _grid(frame, rows, tips, scale, row_name, column_name)
        # If squares would be too small, swap rows and columns.
        turned = [list(column) for column in zip(*rows, strict=True)]
        turned_tips = [list(column) for column in zip(*tips, strict=True)]
        return _grid(frame, turned, turned_tips, scale, column_name, row_name)

    return Figure(title, [draw(frame) for frame in LAYOUTS])


def _grid(
    frame: Frame,
    rows: Sequence[Sequence[float | None]],
    tips: Sequence[Sequence[str]],
    scale: Scale,
    row_name: str,
    column_name: str,
) -> Drawing:
    columns = len(rows[0])
    width = min(_CELL, (frame.width - _LABELS - 2) / columns)
    height = min(max(width, 12), 18)
    inset = 0.5 if width < 8 else 1
    shapes = [shape("rect", "empty", x=_LABELS, y=_TOP, width=columns * width, height=len(rows) * height)]
    step = _step((text_width(str(columns - 1)) + GAP) / width)
    shapes += [
        shape("text", "middle", x=_LABELS + (column + 0.5) * width, y=14, text=str(column))
        for column in range(0, columns, step)
    ]
    step = _step(LINE / height)
    for index, (row, row_tips) in enumerate(zip(rows, tips, strict=True)):
        y = _TOP + index * height
        if index % step == 0:
            shapes.append(shape("text", "end", x=_LABELS - 6, y=y + height / 2 + 4.5, text=str(index)))
        for column, (value, tip) in enumerate(zip(row, row_tips, strict=True)):
            place = (_LABELS + column * width + inset, y + inset, width - 2 * inset, height - 2 * inset)
            # Devices with narrow windows have no pointer for tooltips.
            shapes += _cell(*place, value, scale, tip if frame is BROAD else "")
    return Drawing(frame, math.ceil(_TOP + len(rows) * height + 2), shapes, f"→ {column_name} · ↓ {row_name}")


def _cell(
    x: float, y: float, width: float, height: float, value: float | None, scale: Scale, title: str
) -> list[Shape]:
    if value is None:
        cross = f"M{px(x)} {px(y)}l{px(width)} {px(height)}m0 {px(-height)}l{px(-width)} {px(height)}"
        square = shape("rect", "empty", x=x, y=y, width=width, height=height, title=title)
        return [square, shape("path", "cross", d=cross)]
    shade = f"{round(scale.shade(value) * _SHADES) / _SHADES:.3g}"
    return [shape("rect", "cell", fill_opacity=shade, x=x, y=y, width=width, height=height, title=title)]


def _step(least: float) -> int:
    """Return a round number of squares from one label to the next."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128)
    return next((step for step in steps if step >= least), math.ceil(least))
