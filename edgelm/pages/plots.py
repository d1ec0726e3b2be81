"""Scatter charts with a Pareto frontier, as inline SVG like `charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgelm.pages.frame import (
    LAYOUTS,
    LINE,
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

_RADIUS = 5


@dataclass(frozen=True)
class Point:
    """A named point with a tooltip."""

    name: str
    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class _Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def scatter_chart(
    title: str,
    points: Sequence[Point],
    frontier: Sequence[int],
    *,
    x_label: str,
    y_label: str,
    best: str,
    other: str,
    floor: float = 1e-12,
) -> Figure | None:
    """Return a figure of points, y logarithmic, with a line through the points `frontier`; None without points.

    `best` and `other` are the legend's labels of points on and off the line. Points whose y is at most `floor` are
    drawn at the bottom. Names stand beside their points; if not all fit, numbers do, with a key below.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return None
    line_points = [points[index] for index in frontier]

    def draw(frame: Frame) -> Drawing:
        y_axis = value_axis(frame, [point.y for point in shown], log=True, floor=floor)
        x_axis = _x_axis(frame, [point.x for point in shown])
        places = [(x_axis.at(point.x), y_axis.at(point.y)) for point in shown]
        room = max(2, int((x_axis.last - x_axis.first) / 70))
        ticks = [(x_axis.at(tick), number(tick)) for tick in nice_ticks(x_axis.low, x_axis.high, room)]
        line = "".join(
            f"{'L' if i else 'M'}{px(x_axis.at(point.x))} {px(y_axis.at(point.y))}"
            for i, point in enumerate(line_points)
        )
        labels = [point.name if point.y > floor else f"{point.name} (0)" for point in shown]
        boxes, key = _name_boxes(frame, places, labels), []
        if boxes is None:
            numbers = [str(index) for index in range(1, len(shown) + 1)]
            boxes, key = _name_boxes(frame, places, numbers, all_of_them=False), list(zip(numbers, labels, strict=True))
            labels = numbers
        assert boxes is not None
        shapes = value_grid(frame, y_axis, below=any(point.y < y_axis.low for point in shown))
        shapes += [*ticks_below(frame, ticks), shape("path", "s k4", d=line)]
        for point, place, box, label in zip(shown, places, boxes, labels, strict=True):
            shapes.append(_dot(*place, any(point is one for one in line_points), point.tip))
            if box is not None:
                shapes += _name(place, box, label)
        return Drawing(frame, frame.height, shapes, key=key)

    legend = [([shape("path", "s k4", d="M0 7H34"), _dot(17, 7, True)], best), ([_dot(17, 7, False)], other)]
    return Figure(title, [draw(frame) for frame in LAYOUTS], x_label, y_label, legend)


def _dot(x: float, y: float, full: bool, tip: str = "") -> Shape:
    return shape("circle", "m k4 full" if full else "m k1", cx=x, cy=y, r=_RADIUS, title=tip)


def _name(place: tuple[float, float], box: _Box, label: str) -> list[Shape]:
    x, y = place
    name = shape("text", "name", x=box.left, y=box.bottom - 4, text=label)
    # A line to the nearest place of the label, unless that is beside the point.
    to_x, to_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    if math.hypot(to_x - x, to_y - y) <= 2 * _RADIUS + 4:
        return [name]
    return [shape("path", "lead", d=f"M{px(x)} {px(y)}L{px(to_x)} {px(to_y)}"), name]


def _x_axis(frame: Frame, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(max(0.0, low - room), high + room, *frame.x_range)


def _name_boxes(
    frame: Frame, points: Sequence[tuple[float, float]], names: Sequence[str], *, all_of_them: bool = True
) -> list[_Box | None] | None:
    """Return boxes for names: near their points, inside the frame, over no other name and no point.

    A name without such a place gets None; with `all_of_them` the whole result is then None.
    """
    bottom, top = frame.y_range
    taken = [_Box(x - _RADIUS - 1, y - _RADIUS - 1, x + _RADIUS + 1, y + _RADIUS + 1) for x, y in points]
    found: list[_Box | None] = []
    for (x, y), name in zip(points, names, strict=True):
        width = text_width(name)
        box = next(
            (
                box
                for box in _around(x, y, width)
                if box.left >= frame.left
                and box.right <= frame.width
                and box.top >= top - LINE
                and box.bottom <= bottom + 2
                and not any(box.overlaps(other) for other in taken)
            ),
            None,
        )
        if box is None and all_of_them:
            return None
        found.append(box)
        taken += [box] if box else []
    return found


def _around(x: float, y: float, width: float) -> list[_Box]:
    """Return candidate boxes for a point's label, the nearest first."""
    boxes = []
    for far in (_RADIUS + 4, 18, 32, 46, 62, 80, 100, 120):
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            middle_x, middle_y = x + dx * (far + width / 2), y + dy * (far + LINE / 2 if not dx else far)
            boxes.append(_Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2))
    return boxes
