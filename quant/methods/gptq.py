"""GPTQ with refinement: rounds column by column, feeds errors forward, then goes back over codes and scales.

1. Columns are rounded one after the other. Each first takes up the errors of all before it, through the factors of H
   (GPTQ, arXiv 2210.17323, in the form of QuIP's LDLQ, arXiv 2307.13304, which needs no inverse). A group's scale is
   searched when its first column comes up, for the weights as the feedback has left them, with each column's error
   weighed by what later columns cannot make up for.
2. Then sweeps of coordinate descent on the same objective: for each group the scale that is best for the present codes
   (in closed form), and for each column the code that is best given all others, before and after it.

Arrays are transposed, [columns, rows].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelm.quant.methods.grids import Grid, inverse
from edgelm.quant.methods.moments import Factor

BLOCK = 128
"""Columns between two updates of all others: wider groups are walked in blocks of this, narrower ones are a block."""


@dataclass
class Rounded:
    """Values [K, N], scales [G, N] and lowest values [G, N] of each group, in the order of the columns on disk."""

    values: Tensor
    scales: Tensor
    lowest: Tensor


def gptq(weights: Tensor, grid: Grid, factor: Factor, group: int, sweeps: int) -> Rounded:
    """Round `weights`, float32 [K, N], to `grid` with a scale for each `group` of columns.

    Args:
        weights: the matrix, transposed.
        grid: its numbers.
        factor: of its inputs' second moments, for the same group.
        group: columns to a scale; divides K.
        sweeps: of coordinate descent afterwards.
    """
    state = _State(weights[factor.order], grid, factor, group)
    state.round_forward()
    for _ in range(sweeps):
        state.refine()
    back = factor.order.argsort()
    groups = factor.groups.argsort()
    return Rounded(state.values[back], state.scales[groups], state.lowest[groups])


class _State:
    """Columns in the factor's order; `values * scale` is the matrix so far, and `error` what is missing to it."""

    def __init__(self, weights: Tensor, grid: Grid, factor: Factor, group: int) -> None:
        columns, rows = weights.shape
        self.weights, self.grid, self.factor, self.group = weights, grid, factor, group
        self.block = min(group, BLOCK)
        self.values = torch.empty_like(weights)
        self.error = torch.empty_like(weights)
        self.scales = torch.empty(columns // group, rows)
        self.lowest = torch.empty(columns // group, rows)

    def round_forward(self) -> None:
        """The first pass: every column once, with what came before fed into it."""
        feedback, importance = self.factor.feedback, self.factor.importance
        for start in range(0, len(self.weights), self.block):
            cut = slice(start, start + self.block)
            target = self.weights[cut] + feedback[:start, cut].T @ self.error[:start]
            number, first = divmod(start, self.group)
            if first == 0:
                # A group of several blocks gets its scale from the weights as they were, beyond its first block.
                whole = slice(start, start + self.group)
                seen = target if self.group == self.block else torch.cat([target, self.weights[whole][self.block :]])
                self.scales[number], self.lowest[number] = self.grid.scale(seen, importance[whole])
            scale, lowest = self.scales[number], self.lowest[number]
            inverted = inverse(scale)
            # Errors of the block against the weights as they are on disk, as the later feedback wants them.
            error = self.error[cut]
            for j in range(self.block):
                column = target[j]
                if j:
                    column = torch.addmv(column, error[:j].T, feedback[start : start + j, start + j])
                value = self.grid.nearest(column, inverted, lowest)
                self.values[start + j] = value
                torch.addcmul(self.weights[start + j], value, scale, value=-1, out=error[j])

    def refine(self) -> None:
        """One sweep: each group's scale and each column's code made best for all that is fixed at that moment."""
        hessian = self.factor.hessian
        # Half the gradient of the objective; every change below keeps it up to date.
        pull = hessian @ self.error
        for start in range(0, len(self.weights), self.block):
            number, first = divmod(start, self.group)
            if first == 0:
                self._refit(number, pull)
            cut = slice(start, start + self.block)
            before = self.error[cut].clone()
            self._recode(cut, number, pull[cut].clone())
            pull.addmm_(hessian[:, cut], self.error[cut] - before)

    def _refit(self, number: int, pull: Tensor) -> None:
        """The scale of least error for a group's codes: s + (c . pull) / (c . H c)."""
        cut = slice(number * self.group, (number + 1) * self.group)
        hessian, values = self.factor.hessian[:, cut], self.values[cut]
        norm = (values * (hessian[cut] @ values)).sum(0)
        step = torch.where(norm > 0, (values * pull[cut]).sum(0) / norm, 0.0)
        wanted = self.grid.stored(self.scales[number] + step)
        scale = torch.where(wanted.isfinite() & (wanted != 0), wanted, self.scales[number])
        change = values * (self.scales[number] - scale)
        self.scales[number] = scale
        self.error[cut] += change
        pull.addmm_(hessian, change)

    def _recode(self, cut: slice, number: int, pull: Tensor) -> None:
        """Columns of one block in turn: the value nearest to where the squared error has its minimum."""
        hessian = self.factor.hessian[cut, cut]
        scale, lowest = self.scales[number], self.lowest[number]
        inverted = inverse(scale)
        values, error, weights = self.values[cut], self.error[cut], self.weights[cut]
        changes = torch.empty_like(error)
        for j in range(self.block):
            slope = pull[j]
            if j:
                slope = torch.addmv(slope, changes[:j].T, hessian[j, :j])
            wanted = torch.add(weights[j] - error[j], slope, alpha=1 / float(hessian[j, j]))
            value = self.grid.nearest(wanted, inverted, lowest)
            values[j] = value
            new = torch.addcmul(weights[j], value, scale, value=-1)
            torch.sub(new, error[j], out=changes[j])
            error[j] = new
