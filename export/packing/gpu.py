"""Pack matrices into the layout of the GPU kernels (`edgelm.bundle.gpu_layout`).

Pure numpy. Codes, scales and zero points are reordered. If a matrix is stacked with others of more bits or smaller
groups, its codes are upcast and its scales repeated; nothing is rounded. Rows are packed block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.formats import GpuFormat, gpu_format
from edgelm.bundle.gpu_layout import ROWS, GpuKind, GpuMatrix
from edgelm.export.packing.repack import repacked
from edgelm.quant.tensor import QuantTensor

__all__ = ["BlobWriter", "GpuFormat", "Rows", "gpu_format", "interleaved", "quantized_rows", "stacked"]

Bytes = NDArray[np.uint8]

_BITS = {GpuKind.INT4: 4, GpuKind.INT8: 8, GpuKind.FP8: 8}
_HALF = ROWS // 2


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix in a format's types, before they are reordered.

    Attributes:
        codes: uint8 [N, K * bits / 8], or floats [N, K] (bfloat16 as uint16).
        scales: [N, groups], or None.
        zeros: Zero points, uint8 [N, groups], or None.
    """

    codes: NDArray[Any]
    scales: NDArray[Any] | None = None
    zeros: Bytes | None = None

    def map(self, change: Callable[..., NDArray[Any]], *others: Rows) -> Rows:
        """Apply a function of arrays to the codes, the scales and the zero points of these rows and others."""
        found = [
            None if getattr(self, name) is None else change(*(getattr(rows, name) for rows in (self, *others)))
            for name in ("codes", "scales", "zeros")
        ]
        assert found[0] is not None
        return Rows(found[0], found[1], found[2])


def quantized_rows(tensor: QuantTensor, fmt: GpuFormat) -> Rows:
    """Convert quantised rows to a format that holds their scheme: upcast codes, repeat scales and zero points."""
    return Rows(*repacked(tensor, _BITS[fmt.kind], fmt.group, zeros=fmt.zeros))


def stacked(parts: Sequence[Rows]) -> Rows:
    """Stack the rows of several matrices."""
    return parts[0] if len(parts) == 1 else parts[0].map(lambda *arrays: np.concatenate(arrays), *parts[1:])


def interleaved(gate: Rows, up: Rows) -> Rows:
    """Interleave the rows of gate and up in blocks of 8; both are padded to a multiple of 8 with zeros."""

    def alternate(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        a, b = (_padded(part, _HALF) for part in (a, b))
        joined = np.stack([part.reshape(-1, _HALF, part.shape[1]) for part in (a, b)], axis=1)
        return joined.reshape(-1, a.shape[1])

    return gate.map(alternate, up)


class BlobWriter:
    """Writes the matrices of a blob from their rows, in order.

    Args:
        matrix: Description of the blob.
        append: Write the next bytes of the blob.
    """

    def __init__(self, matrix: GpuMatrix, append: Callable[[Bytes], None]) -> None:
        self._matrix = matrix
        self._append = append
        self._scales: list[Bytes] = []
        self._zeros: list[Bytes] = []
        self._codes = 0

    def add(self, rows: Rows) -> None:
        """Write the next rows. Their number is a multiple of 16, except for the last rows of a matrix."""
        codes = tiles(rows.codes, self._matrix.kind)
        self._codes += codes.nbytes
        self._append(codes)
        # Scales and zero points follow the codes of all matrices. They are small, so they are kept until then.
        if rows.scales is not None:
            self._scales.append(_columns(rows.scales))
        if rows.zeros is not None:
            self._zeros.append(_columns(rows.zeros))

    def finish(self) -> None:
        """Write the scales and zero points, which follow the codes."""
        matrix = self._matrix
        assert self._codes == matrix.count * matrix.codes_stride, (self._codes, matrix)
        written = self._codes
        for parts, end in ((self._scales, matrix.zeros_offset), (self._zeros, matrix.nbytes)):
            start = matrix.scales_offset if parts is self._scales else matrix.zeros_offset
            self._append(np.zeros(start - written, np.uint8))
            written = start
            for part in parts:
                self._append(part)
                written += part.nbytes
            self._append(np.zeros(end - written, np.uint8))
            written = end


def tiles(codes: NDArray[Any], kind: GpuKind) -> Bytes:
    """Reorder codes (as in `Rows`) into tiles of `kind`; rows are padded to a multiple of 16 with zeros."""
    codes = _padded(np.ascontiguousarray(codes), ROWS)
    if kind is GpuKind.INT4:
        return _tiles_of_nibbles(codes)
    if kind in _BITS:
        pairs: NDArray[Any] = codes.view(np.uint16)
        split = pairs.reshape(-1, 2, _HALF, pairs.shape[1] // 16, 2, 2, 4)  # block, half, g, tile, step, side, q
        return _bytes(split.transpose(0, 3, 2, 6, 4, 1, 5))
    units: NDArray[Any] = codes.view(np.uint32)  # one float32, or two neighbours of 16 bits
    split = units.reshape(-1, 2, _HALF, units.shape[1] // 8, 2, 4)  # block, half, g, tile, side, q
    return _bytes(split.transpose(0, 3, 2, 5, 4, 1))


def _tiles_of_nibbles(codes: Bytes) -> Bytes:
    split = codes.reshape(-1, 2, _HALF, codes.shape[1] // 32, 4, 2, 4)  # block, half, g, tile, step, side, q
    # Byte j of a word now has both codes of register j. Reorder its nibbles 0 .. 7 to 0 2 4 6 1 3 5 7.
    words = _bytes(split.transpose(0, 3, 2, 6, 4, 5, 1)).view(np.uint32)
    for mask, shift in ((0x00F000F0, 4), (0x0000FF00, 8)):
        swapped = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
        words ^= swapped
        words ^= swapped << np.uint32(shift)
    return words.view(np.uint8)


def _columns(values: NDArray[Any]) -> Bytes:
    """Reorder [N, groups] to [blocks, groups, 16]; return the bytes."""
    padded = _padded(values, ROWS)
    return _bytes(padded.reshape(-1, ROWS, padded.shape[1]).transpose(0, 2, 1))


def _bytes(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _padded(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    missing = -len(values) % multiple
    return np.pad(values, ((0, missing), (0, 0))) if missing else values
