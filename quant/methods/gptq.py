"""GPTQ with coordinate descent: round column by column with error feedback, then improve values and scales.

1. Columns are rounded one after the other. Each is first corrected for the errors of all earlier ones, through the
   factors of H (GPTQ, arXiv 2210.17323, in the form of QuIP's LDLQ, arXiv 2307.13304, which needs no inverse). The
   scale of a group is searched when its first column is reached, for the corrected weights. Each column's error is
   weighted by the part of it that later columns cannot correct.
2. Sweeps of coordinate descent then minimise the same objective: for each group the best scale for the present codes,
   in closed form, and for each column the best code with all other columns fixed.

Arrays are transposed, [columns, rows].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelm.quant.methods.feedback import LARGEST_BLOCK, Block, fit_scale, recode_block, round_block
from edgelm.quant.methods.grids import Grid
from edgelm.quant.methods.moments import Factor

_BLOCK_OF_WIDE_GROUPS = 64  # columns between two updates of all others; each smaller group is one block


@dataclass
class Rounded:
    """Values [K, N], scales [G, N] and lowest values [G, N], in the original order of columns."""

    values: Tensor
    scales: Tensor
    lowest: Tensor


def gptq(weights: Tensor, grid: Grid, factor: Factor, group: int, sweeps: int) -> Rounded:
    """Round a matrix for its inputs.

    Args:
        weights: The transposed matrix, float32 [K, N].
        grid: The scheme's values.
        factor: Factor of the second moments of its inputs, for the same group.
        group: Columns that share a scale; divides K.
        sweeps: Number of sweeps of coordinate descent.
    """
    state = _State(weights[factor.order], grid, factor, group)
    state.round_forward()
    for sweep in range(sweeps):
        state.sweep(last=sweep == sweeps - 1)
    back = factor.order.argsort()
    groups = factor.groups.argsort()
    return Rounded(state.values[back], state.scales[groups], state.lowest[groups])


class _State:
    """State of the rounding, columns in the factor's order; `error` is weights - values * scale."""

    def __init__(self, weights: Tensor, grid: Grid, factor: Factor, group: int) -> None:
        columns, rows = weights.shape
        self.weights, self.grid, self.factor, self.group = weights, grid, factor, group
        self.block = group if group <= LARGEST_BLOCK else _BLOCK_OF_WIDE_GROUPS
        self.values = torch.empty_like(weights)
        self.error = torch.empty_like(weights)
        self.scales = torch.empty(columns // group, rows)
        self.lowest = torch.empty(columns // group, rows)
        self.pull: Tensor | None = None

    def round_forward(self) -> None:
        """Round every column once, after adding the feedback of earlier columns' errors."""
        feedback, importance = self.factor.feedback, self.factor.importance
        for cut, number, first in self._blocks():
            target = torch.addmm(self.weights[cut], feedback[: cut.start, cut].T, self.error[: cut.start])
            if first:
                whole = slice(cut.start, cut.start + self.group)
                # In a group of several blocks, the weights beyond the first block have no feedback yet.
                beyond = self.weights[cut.stop : whole.stop]
                seen = torch.cat([target, beyond]) if len(beyond) else target
                trials, self.lowest[number] = self.grid.trials(seen)
                self.scales[number] = fit_scale(seen, importance[whole], trials, self.lowest[number], self.grid)
            round_block(self._block(cut, number), target, feedback[cut, cut], self.grid)

    def sweep(self, last: bool) -> None:
        """Run one sweep of coordinate descent over the scales of groups and the values of columns."""
        hessian = self.factor.hessian
        # pull is half the negative gradient of the objective. Every change below updates the part still needed.
        if self.pull is None:
            self.pull = hessian @ self.error
        pull = self.pull
        for cut, number, first in self._blocks():
            if first and self.group > self.block:
                whole = slice(cut.start, cut.start + self.group)
                before = self.error[whole].clone()
                self._refit(whole, number, pull[whole])
                pull.addmm_(hessian[:, whole], self.error[whole] - before)
            before = self.error[cut].clone()
            here = pull[cut].clone()
            if self.group <= self.block:
                self._refit(cut, number, here)
                here.addmm_(hessian[cut, cut], self.error[cut] - before)
            recode_block(self._block(cut, number), here, hessian[cut, cut], self.grid)
            needed = slice(cut.stop, None) if last else slice(None)
            pull[needed].addmm_(hessian[needed, cut], self.error[cut] - before)

    def _refit(self, group: slice, number: int, pull: Tensor) -> None:
        """Set a group's scale to that of least error for its values: s + (v . pull) / (v . H v)."""
        values = self.values[group]
        norm = (values * (self.factor.hessian[group, group] @ values)).sum(0)
        step = torch.where(norm > 0, (values * pull).sum(0) / norm, 0.0)
        wanted = self.grid.stored(self.scales[number] + step)
        scale = torch.where(wanted.isfinite() & (wanted != 0), wanted, self.scales[number])
        self.error[group] += values * (self.scales[number] - scale)
        self.scales[number] = scale

    def _blocks(self) -> Iterator[tuple[slice, int, bool]]:
        """Yield the columns of each block, the number of its group, and whether it is the group's first block."""
        for start in range(0, len(self.weights), self.block):
            number, within = divmod(start, self.group)
            yield slice(start, start + min(self.block, self.group - within)), number, within == 0

    def _block(self, cut: slice, number: int) -> Block:
        return Block(self.weights[cut], self.values[cut], self.error[cut], self.scales[number], self.lowest[number])
