"""Choose one option per unit with the least sum of losses within a limit of bytes.

This is the multiple-choice knapsack problem. Its linear relaxation uses only options on the lower convex hull of a
unit's (bytes, loss), and is solved by steps along all hulls in the order of their slopes (Sinha and Zoltners, "The
multiple-choice knapsack problem", Operations Research 27, 1979). The loss of the relaxation is a lower bound for every
choice. The bytes that this greedy choice leaves are used for upgrades, and for pairs of one upgrade and one downgrade,
as long as they reduce the loss.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to store a unit: its bytes and its loss."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """A choice for every unit.

    Attributes:
        picks: Index of each unit's option.
        nbytes: Sum of the options' bytes.
        loss: Sum of their losses.
        bound: Lower bound of the loss of any choice within the limit.
    """

    picks: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


@dataclass(frozen=True)
class _Move:
    """A change of a unit to another option, with the bytes it adds and the loss it saves."""

    unit: int
    to: int
    nbytes: int
    gain: float


def solve(units: Sequence[Sequence[Option]], limit: int) -> Solution:
    """Choose one option per unit.

    Args:
        units: Options of each unit, at least one.
        limit: Bytes for all units together.

    Raises:
        ValueError: Even the smallest options take more than `limit`.
    """
    hulls = [_hull(options) for options in units]
    picks = [hull[0] for hull in hulls]
    left = limit - sum(options[pick].nbytes for options, pick in zip(units, picks, strict=True))
    if left < 0:
        raise ValueError(f"a limit of {limit} bytes is {-left} bytes below the smallest possible")
    loss = sum(options[pick].loss for options, pick in zip(units, picks, strict=True))
    bound: float | None = None
    blocked: set[int] = set()
    for step in _steps(units, hulls):
        if bound is None and step.nbytes > left:
            # The relaxation ends with the fraction of this step for which there are bytes.
            bound = loss - step.gain * left / step.nbytes
        if step.nbytes > left or step.unit in blocked:
            blocked.add(step.unit)
            continue
        picks[step.unit] = step.to
        left -= step.nbytes
        loss -= step.gain
    _improve(units, picks, left)
    chosen = [options[pick] for options, pick in zip(units, picks, strict=True)]
    loss = sum(option.loss for option in chosen)
    # Rounding of sums must not put the bound above the loss.
    return Solution(
        tuple(picks), sum(option.nbytes for option in chosen), loss, loss if bound is None else min(bound, loss)
    )


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull, from the smallest one to that of least loss."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss))
    hull: list[int] = []
    for i in order:
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) <= _slope(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(options: Sequence[Option], first: int, second: int) -> float:
    """Return the loss saved per byte by changing to a larger option."""
    return (options[first].loss - options[second].loss) / (options[second].nbytes - options[first].nbytes)


def _steps(units: Sequence[Sequence[Option]], hulls: Sequence[list[int]]) -> list[_Move]:
    """Return all steps along the hulls, largest gain per byte first; the steps of a unit stay in order."""
    steps = [
        _Move(unit, second, *_change(units[unit], first, second))
        for unit, hull in enumerate(hulls)
        for first, second in itertools.pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.gain / step.nbytes)


def _change(options: Sequence[Option], old: int, new: int) -> tuple[int, float]:
    return options[new].nbytes - options[old].nbytes, options[old].loss - options[new].loss


def _improve(units: Sequence[Sequence[Option]], picks: list[int], left: int) -> None:
    """Apply the best change of one or two units within `left` bytes until there is none."""
    while True:
        moves = [
            _Move(unit, new, *_change(options, picks[unit], new))
            for unit, options in enumerate(units)
            for new in range(len(options))
            if new != picks[unit]
        ]
        best = _best_exchange(moves, left)
        if best is None:
            return
        for move in best:
            picks[move.unit] = move.to
            left -= move.nbytes


def _best_exchange(moves: Sequence[_Move], left: int) -> list[_Move] | None:
    """Return the change, or the pair of changes of different units, with the largest gain within `left` more bytes."""
    gaining = sorted((move for move in moves if move.gain > 0), key=lambda move: move.nbytes)
    # For every prefix by bytes: the best move, and the best move of another unit.
    sizes = [move.nbytes for move in gaining]
    firsts: list[_Move] = []
    seconds: list[_Move | None] = []
    for move in gaining:
        first, second = (firsts[-1], seconds[-1]) if firsts else (move, None)
        if move.gain > first.gain:
            first, second = move, (second if move.unit == first.unit else first)
        elif move.unit != first.unit and (second is None or move.gain > second.gain):
            second = move
        firsts.append(first)
        seconds.append(second)
    best: list[_Move] | None = None
    gain = 0.0

    def consider(first: _Move | None, giving: _Move | None) -> None:
        nonlocal best, gain
        if first is None:
            return
        total = first.gain + (0.0 if giving is None else giving.gain)
        # The gain must exceed rounding errors of the sum.
        if total > gain and total > 1e-12 * first.gain:
            best, gain = [first] if giving is None else [giving, first], total

    reach = bisect.bisect_right(sizes, left) - 1
    if reach >= 0:
        consider(firsts[reach], None)
    for giving in moves:
        if giving.nbytes >= 0:
            continue
        reach = bisect.bisect_right(sizes, left - giving.nbytes) - 1
        if reach >= 0:
            consider(firsts[reach] if firsts[reach].unit != giving.unit else seconds[reach], giving)
    return best
