"""`QuantTensor`: a quantised matrix in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.scheme import AnyScheme, Scheme


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix [N, K]. The arrays have the layout of a quantised checkpoint.

    Integers: w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group].
    FP8: w[n, k] = value(code[n, k]) * scale[n, k // group].

    Attributes:
        codes: uint8 [N, ceil(K * bits / 8)]: the codes of a row from the lowest bit up, see `primitives.unpack`. At 4
            bits a byte holds two neighbouring columns, the even one in the low nibble. At 3, 5 and 6 bits, 8 codes take
            3 bytes, 8 take 5, and 4 take 3, as a little-endian number with the first code in the lowest bits.
        scales: [N, G] with G = ceil(K / group), or 1 for one scale per row. float16 for integers (may be negative if
            symmetric), float32 for FP8.
        zeros: Zero points, uint8 [N, G], one per byte. None for symmetric integers, whose zero point is 2**(bits - 1),
            and for FP8.
        scheme: Scheme of the codes. If its group does not divide K, the last group of each row is shorter.
        shape: (N, K).

    Raises:
        ValueError: Shape or type of an array does not agree with `scheme` and `shape`.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zeros: NDArray[np.uint8] | None
    scheme: AnyScheme
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        per_group = (rows, self.scheme.groups(columns))
        uint8 = np.dtype(np.uint8)
        expected: dict[str, tuple[NDArray[Any] | None, tuple[int, int], np.dtype[Any]]] = {
            "codes": (self.codes, (rows, self.scheme.code_bytes(columns)), uint8),
            "scales": (self.scales, per_group, self.scheme.scale_dtype),
        }
        if self.scheme.has_zeros:
            expected["zeros"] = (self.zeros, per_group, uint8)
        elif self.zeros is not None:
            raise ValueError(f"{self.scheme.name} has no zero points")
        for what, (array, shape, dtype) in expected.items():
            if array is None or array.shape != shape or array.dtype != dtype:
                found = "none" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(f"{what} of {self.scheme.name} {self.shape}: expected {dtype} {shape}, found {found}")

    @property
    def integers(self) -> Scheme:
        """The scheme, which must be an integer scheme.

        Raises:
            TypeError: The codes are FP8.
        """
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"the codes of {self.scheme.name} are not integers")
        return self.scheme

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    def rows(self, rows: slice) -> QuantTensor:
        """Return some rows of the matrix, as views without copies."""
        codes = self.codes[rows]
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=codes, scales=self.scales[rows], zeros=zeros, shape=(codes.shape[0], self.shape[1]))

    def padded(self) -> QuantTensor:
        """Return the matrix padded to `scheme.padded(K)` columns; the values of the added columns are undefined."""
        columns = self.scheme.padded(self.shape[1])
        if columns == self.shape[1]:
            return self
        codes = np.pad(self.codes, ((0, 0), (0, self.scheme.code_bytes(columns) - self.codes.shape[1])))
        return replace(self, codes=codes, shape=(self.shape[0], columns))

    def cut(self, columns: int) -> QuantTensor:
        """Return the first `columns` columns; the number of groups must stay the same."""
        codes = np.ascontiguousarray(self.codes[:, : self.scheme.code_bytes(columns)])
        return replace(self, codes=codes, shape=(self.shape[0], columns))
