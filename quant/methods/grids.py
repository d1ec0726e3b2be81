"""The values of a scheme for the calibration methods: nearest values, trial scales and codes.

A weight is value * scale, where the value is an integer code - zero, or an FP8 number. Arrays are transposed, [columns,
rows], because the methods go column by column and a column is then contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from edgelm.quant.activations import FP8_TYPES
from edgelm.quant.primitives import search_targets
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme

_FP8_SHRINK = 8  # trial scales within a factor of two, after which the pattern of FP8 numbers repeats


def grid(scheme: AnyScheme, columns: int) -> Grid:
    """Return the grid of a scheme, for rows of `columns` values."""
    if isinstance(scheme, Fp8Scheme):
        return Fp8Grid(scheme)
    assert isinstance(scheme, Scheme), scheme
    return IntegerGrid(scheme, columns)


class Grid(ABC):
    """Values and scales of one scheme. Shape letters: g columns of a group, N rows, K columns, T trials.

    Attributes:
        numbers: Kind of values for the compiled kernel (edgelm_numbers in quantize.h).
        range: Largest minus smallest integer; unused for FP8.
        half: Whether scales are stored as float16; otherwise as float32.
    """

    numbers: int
    range: float
    half: bool

    @abstractmethod
    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return trial scales for a group of weights, float32 [g, N].

        Returns:
            Trial scales [T, N], and lowest values [N] (for integers, minus the zero point).
        """

    @abstractmethod
    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """Return the values nearest to weights * inverse, [..., N]; `inverse` [N] is 1 / scale, or 0 if that is 0."""

    @abstractmethod
    def stored(self, scale: Tensor) -> Tensor:
        """Round a scale to its stored type; return float32."""

    @abstractmethod
    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """Return the codes of values, uint8 [K, N]; `lowest` is [K, N]."""


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, or 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))


class IntegerGrid(Grid):
    """Integer codes 0 .. 2^bits - 1 with a zero point, which is the midpoint in a symmetric scheme."""

    def __init__(self, scheme: Scheme, columns: int) -> None:
        self.scheme = scheme
        self.numbers, self.range, self.half = 0, scheme.levels - 1.0, True
        self._targets = torch.from_numpy(search_targets(scheme, columns))

    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the trial scales of rounding without calibration (`primitives.search_targets`)."""
        levels = self.scheme.levels - 1
        if self.scheme.symmetric:
            # Scales may be negative, so that the largest magnitude is on the side with one more code.
            largest = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0]
            extent = -largest
            lowest = torch.full_like(extent, -float(self.scheme.symmetric_zero))
        else:
            bottom = weights.amin(0).clamp_max(0)
            extent = weights.amax(0).clamp_min(0) - bottom
            lowest = -(-bottom * levels * inverse(extent)).clamp(0, levels).round()
        return extent / self._targets[:, None], lowest

    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """Return the nearest integers in lowest .. lowest + 2^bits - 1."""
        value = (weights * inverse).round_()
        return torch.minimum(torch.maximum(value, lowest), lowest + (self.scheme.levels - 1))

    def stored(self, scale: Tensor) -> Tensor:
        """Round to float16."""
        return scale.to(torch.float16).float()

    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """Return value + zero point."""
        return (values - lowest).to(torch.uint8)


class Fp8Grid(Grid):
    """FP8 numbers (E4M3 or E5M2) with a float32 scale."""

    def __init__(self, scheme: Fp8Scheme) -> None:
        self._type, self.numbers = FP8_TYPES[scheme.form], 1 if scheme.form == "e4m3" else 2
        self.range, self.half = 0.0, False
        self._largest = float(torch.finfo(self._type).max)

    def trials(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return absmax / largest number, and larger scales up to twice that, which place the FP8 numbers differently.

        No trial clips, as none is smaller.
        """
        largest = weights.abs().amax(0) / self._largest
        shrink = torch.exp2(-torch.arange(_FP8_SHRINK) / _FP8_SHRINK)
        return largest / shrink[:, None], torch.zeros_like(largest)

    def nearest(self, weights: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
        """Return the nearest numbers of the format, clipped to the largest."""
        del lowest
        return (weights * inverse).clamp_(-self._largest, self._largest).to(self._type).float()

    def stored(self, scale: Tensor) -> Tensor:
        """Return the scale unchanged."""
        return scale

    def codes(self, values: Tensor, lowest: Tensor) -> Tensor:
        """Return the bits of the FP8 numbers."""
        del lowest
        return values.to(self._type).view(torch.uint8)
