"""The numbers that codes can stand for, as the calibrated methods need them: nearest value, scale, code.

A weight is `value * scale`; `value` is an integer `code - zero`, or a number of FP8. Arrays are transposed, [columns,
rows]: the methods go column by column, and a column of all rows is then one contiguous line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from edgelm.quant.primitives import search_targets
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme

_FP8_SHRINK = 8  # trial scales within one binade: beyond it the numbers of FP8 repeat


def grid(scheme: AnyScheme, columns: int) -> Grid:
    """The grid of a scheme for groups in rows of `columns` values."""
    if isinstance(scheme, Fp8Scheme):
        return Fp8Grid(scheme)
    assert isinstance(scheme, Scheme), scheme
    return IntegerGrid(scheme, columns)


class Grid(ABC):
    """Values and scales of one scheme. Shapes: g columns of a group, N rows."""

    @abstractmethod
    def scale(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Search the scale that leaves the least sum of importance * (w - value * scale)^2.

        Args:
            weights: float32 [g, N].
            importance: float32 [g], of each column's squared error.

        Returns:
            Scales [N] as they will be stored, and lowest values [N] (minus the zero point, for integers).
        """

    @abstractmethod
    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """The values [..., N] nearest to weights * inverse, where `inverse` [N] is 1 / scale, or 0 for a scale of 0."""

    @abstractmethod
    def stored(self, scale: Tensor) -> Tensor:
        """`scale` rounded to how it is stored, float32."""

    @abstractmethod
    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """Codes uint8 [K, N] of values [K, N], with `lowest` [K, N] of each."""

    def _best(self, weights: Tensor, importance: Tensor, trials: Tensor, lowest: Tensor) -> Tensor:
        """The best of trial scales [T, N], each first fitted to the values that it gives (least squares)."""
        weighted = importance[:, None] * weights
        best = torch.full(weights.shape[1:], torch.inf)
        found = torch.zeros_like(best)
        for trial in trials:
            value = self.nearest(weights, inverse(trial), lowest)
            weighed = importance[:, None] * value
            norm = (weighed * value).sum(0)
            fitted = self.stored(torch.where(norm > 0, (weighted * value).sum(0) / norm, 0.0))
            value = self.nearest(weights, inverse(fitted), lowest)
            error = (importance[:, None] * (weights - value * fitted).square()).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            found = torch.where(better, fitted, found)
        return found


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where it is 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))


class IntegerGrid(Grid):
    """Codes 0 .. 2^bits - 1 with a zero point, fixed in the middle where the scheme is symmetric."""

    def __init__(self, scheme: Scheme, columns: int) -> None:
        self.scheme = scheme
        self._targets = torch.from_numpy(search_targets(scheme, columns))

    def scale(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """As `Grid.scale`, from the trials of the plain search (`primitives.search_targets`)."""
        levels = self.scheme.levels - 1
        if self.scheme.symmetric:
            # The side with one code more goes to the largest magnitude: scales may be negative.
            largest = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0]
            extent = -largest
            lowest = torch.full_like(extent, -float(self.scheme.symmetric_zero))
        else:
            bottom = weights.amin(0).clamp_max(0)
            extent = weights.amax(0).clamp_min(0) - bottom
            lowest = -(-bottom * levels * inverse(extent)).clamp(0, levels).round()
        trials = extent / self._targets[:, None]
        return self._best(weights, importance, trials, lowest), lowest

    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """Integers lowest .. lowest + 2^bits - 1."""
        value = (weights * inverse).round_()
        return torch.minimum(torch.maximum(value, lowest), lowest + (self.scheme.levels - 1))

    def stored(self, scale: Tensor) -> Tensor:
        """Rounded to float16."""
        return scale.to(torch.float16).float()

    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """value + zero."""
        return (values - lowest).to(torch.uint8)


class Fp8Grid(Grid):
    """E4M3 or E5M2 with a float32 scale."""

    def __init__(self, scheme: Fp8Scheme) -> None:
        self._type = torch.float8_e4m3fn if scheme.form == "e4m3" else torch.float8_e5m2
        self._largest = float(torch.finfo(self._type).max)

    def scale(self, weights: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """As `Grid.scale`, from absmax / largest and a few below that, which fill the numbers' gaps otherwise."""
        largest = weights.abs().amax(0) / self._largest
        shrink = torch.exp2(-torch.arange(_FP8_SHRINK) / _FP8_SHRINK)
        # Larger, not smaller: nothing is clipped, the largest weight becomes a number below the format's largest.
        trials = largest / shrink[:, None]
        return self._best(weights, importance, trials, torch.zeros_like(largest)), torch.zeros_like(largest)

    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """Numbers of the format; past the largest, the largest."""
        del lowest
        return (weights * inverse).clamp_(-self._largest, self._largest).to(self._type).float()

    def stored(self, scale: Tensor) -> Tensor:
        """As it is."""
        return scale

    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """The format's bits."""
        del lowest
        return values.to(self._type).view(torch.uint8)
