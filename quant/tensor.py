"""A quantised matrix as every consumer of it sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import RecipeError
from edgelm.quant.scheme import Scheme


@dataclass(frozen=True)
class QuantTensor:
    """A matrix of `shape` (N, K), w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group].

    Attributes:
        codes: uint8 [N, K * bits / 8]. 4-bit: two neighbouring k values to a byte, the even one in the low nibble.
        scales: float16 [N, G] with G = ceil(K / group), or 1 for one scale a row. May be negative where symmetric.
        zeros: uint8 [N, G], one to a byte at either width; None where symmetric (zero point 2**(bits - 1)).
        scheme: the scheme these codes have, whose group divides K.
        shape: (N, K).

    Raises:
        ValueError: the arrays do not fit `scheme` and `shape`.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    scheme: Scheme
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        per_group = (rows, self.scheme.groups(columns))
        expected: dict[str, tuple[NDArray[np.generic] | None, tuple[int, int], type[np.generic]]] = {
            "codes": (self.codes, (rows, columns * self.scheme.bits // 8), np.uint8),
            "scales": (self.scales, per_group, np.float16),
        }
        if not self.scheme.symmetric:
            expected["zeros"] = (self.zeros, per_group, np.uint8)
        elif self.zeros is not None:
            raise ValueError(f"{self.scheme.name} is symmetric and has no zero points")
        for what, (array, shape, dtype) in expected.items():
            if array is None or array.shape != shape or array.dtype != dtype:
                found = "none" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(
                    f"{what} of {self.scheme.name} {self.shape}: expected {dtype.__name__} {shape}, found {found}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, rows: slice) -> QuantTensor:
        """Return the same matrix cut to some rows (views, no copies)."""
        codes = self.codes[rows]
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=codes, scales=self.scales[rows], zeros=zeros, shape=(codes.shape[0], self.shape[1]))

    def regrouped(self, group: int) -> QuantTensor:
        """Return the very same values with smaller groups: scales and zero points repeated.

        For an operator that has no row-wide or wide groups.

        Raises:
            RecipeError: `group` does not divide the present one.
        """
        present = self.scheme.group_size(self.shape[1])
        if present % group:
            raise RecipeError(f"groups of {present} cannot be split into groups of {group}")
        times = present // group
        zeros = None if self.zeros is None else np.repeat(self.zeros, times, axis=1)
        return replace(
            self, scales=np.repeat(self.scales, times, axis=1), zeros=zeros, scheme=replace(self.scheme, group=group)
        )
