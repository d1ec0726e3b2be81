"""Quantised values as the calibrated methods need them: the nearest one, its scale, its code.

A weight is `value * scale`; `value` is an integer `code - zero`, or a number of FP8. Arrays are transposed, [columns,
rows]: the methods go column by column, and a column of all rows is then one contiguous line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from edgelm.quant.activations import FP8_TYPES
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
    """Values and scales of one scheme. Shapes: g columns of a group, N rows.

    Attributes:
        numbers: what the compiled kernel calls the kind of values (edgelm_numbers in quantize.h).
        range: from the least integer to the largest; of no meaning for FP8.
        half: whether scales are stored as float16; else they are float32.
    """

    numbers: int
    range: float
    half: bool

    @abstractmethod
    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scales to try for `weights`, float32 [g, N].

        Returns:
            Trial scales [T, N], and lowest values [N] (minus the zero point, for integers).
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


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where it is 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))


class IntegerGrid(Grid):
    """Codes 0 .. 2^bits - 1 with a zero point, fixed in the middle where the scheme is symmetric."""

    def __init__(self, scheme: Scheme, columns: int) -> None:
        self.scheme = scheme
        self.numbers, self.range, self.half = 0, scheme.levels - 1.0, True
        self._targets = torch.from_numpy(search_targets(scheme, columns))

    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The trials of the plain search (`primitives.search_targets`)."""
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
        return extent / self._targets[:, None], lowest

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
        self._type, self.numbers = FP8_TYPES[scheme.form], 1 if scheme.form == "e4m3" else 2
        self.range, self.half = 0.0, False
        self._largest = float(torch.finfo(self._type).max)

    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """absmax / largest, and a few within the binade above it, whose gaps lie elsewhere."""
        largest = weights.abs().amax(0) / self._largest
        shrink = torch.exp2(-torch.arange(_FP8_SHRINK) / _FP8_SHRINK)
        # Larger, not smaller: nothing is clipped, the largest weight becomes a number below the format's largest.
        return largest / shrink[:, None], torch.zeros_like(largest)

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
