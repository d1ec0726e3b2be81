"""Packs matrices into the layout that the GPU kernels read (`edgelm.bundle.gpu_layout`).

Pure numpy. Codes, scales and zero points are reordered and, where a matrix joins others of more bits or finer groups,
upcast and repeated: nothing is rounded. Rows are taken a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import ROWS, GpuKind, GpuMatrix
from edgelm.errors import ExportError
from edgelm.export.packing.ort import width_field
from edgelm.export.packing.repack import repacked
from edgelm.quant.scheme import Fp8Scheme
from edgelm.quant.tensor import QuantTensor

Bytes = NDArray[np.uint8]

FLOAT_KINDS = {"float16": GpuKind.FLOAT16, "bfloat16": GpuKind.BFLOAT16, "float32": GpuKind.FLOAT32}
_BITS = {GpuKind.INT4: 4, GpuKind.INT8: 8, GpuKind.FP8: 8}
_HALF = ROWS // 2


@dataclass(frozen=True)
class GpuFormat:
    """How a matrix of any number of rows is packed: weights, columns to a scale, zero points."""

    kind: GpuKind
    group: int
    zeros: bool = False

    def matrix(self, rows: int, columns: int, *, swiglu: bool = False, count: int = 1) -> GpuMatrix:
        """A blob of this format; `rows` of a SwiGLU matrix are gate's and up's together."""
        return GpuMatrix(self.kind, rows, columns, self.group, self.zeros, swiglu, count)


def gpu_format(schemes: Sequence[Any], dtype: str, columns: int, name: str) -> GpuFormat | None:
    """The one format that holds rows of all these (effective) schemes exactly; None where there is none.

    Args:
        schemes: `edgelm.quant.scheme`'s; None is a matrix that stays float.
        dtype: how matrices that stay float are stored: "float16", "bfloat16" or "float32".
        columns: of every row.
        name: what errors call the matrix.

    Raises:
        ExportError: the layout cannot hold one of them.
    """
    quantized = [scheme for scheme in schemes if scheme is not None]
    if quantized and len(quantized) < len(schemes):
        return None
    fp8 = [isinstance(scheme, Fp8Scheme) for scheme in quantized]
    if any(fp8) and not all(fp8):
        return None
    if not quantized:
        fmt = GpuFormat(FLOAT_KINDS[dtype], columns)
    else:
        group = min(scheme.group_size(columns) for scheme in quantized)
        for scheme in quantized:
            if isinstance(scheme, Fp8Scheme) and scheme.form != "e4m3":
                raise ExportError(
                    f"{name} is {scheme.name} in this recipe: of FP8 the GPU kernels have E4M3 alone; choose "
                    f"{Fp8Scheme(scheme.group).name} in the recipe, or keep it float"
                )
        if all(fp8):
            fmt = GpuFormat(GpuKind.FP8, group)
        else:
            kind = GpuKind.INT4 if max(scheme.bits for scheme in quantized) <= 4 else GpuKind.INT8
            fmt = GpuFormat(kind, group, not all(scheme.symmetric for scheme in quantized))
    if columns % fmt.kind.columns:
        stored = quantized[0].name if quantized else dtype
        kinds = {"int8 or fp8": GpuKind.INT8, "float16 or bfloat16": GpuKind.FLOAT16, "float32": GpuKind.FLOAT32}
        fitting = [text for text, kind in kinds.items() if columns % kind.columns == 0]
        raise ExportError(
            f"{name} is {stored} with rows of {columns} ({width_field(name)} in config.json): the GPU kernels take "
            f"{fmt.kind.label} in rows of a multiple of {fmt.kind.columns}. "
            + (
                f"Rows of {columns} they take as {', '.join(fitting)}: choose one of these for it"
                if fitting
                else f"Rows of {columns} they do not take at all: export for the CPU, --target cpu"
            )
        )
    return fmt


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix in a format's numbers, not yet in its order.

    `codes`: uint8 [N, K bits / 8], or [N, K] floats (bfloat16 as uint16); `scales` and `zeros` [N, groups] or None.
    """

    codes: NDArray[Any]
    scales: NDArray[Any] | None = None
    zeros: Bytes | None = None

    def map(self, change: Callable[..., NDArray[Any]], *others: Rows) -> Rows:
        """Apply a function of arrays to the codes, the scales and the zero points."""
        found = [
            None if getattr(self, name) is None else change(*(getattr(rows, name) for rows in (self, *others)))
            for name in ("codes", "scales", "zeros")
        ]
        assert found[0] is not None
        return Rows(found[0], found[1], found[2])


def quantized_rows(tensor: QuantTensor, fmt: GpuFormat) -> Rows:
    """Quantised rows in a format that holds their scheme: codes upcast, scales and zero points repeated."""
    return Rows(*repacked(tensor, _BITS[fmt.kind], fmt.group, zeros=fmt.zeros))


def stacked(parts: Sequence[Rows]) -> Rows:
    """The rows of several matrices, one below the other."""
    return parts[0] if len(parts) == 1 else parts[0].map(lambda *arrays: np.concatenate(arrays), *parts[1:])


def interleaved(gate: Rows, up: Rows) -> Rows:
    """As many rows of gate as of up, alternating by blocks of 8; both are padded to 8 with zeros."""

    def alternate(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        a, b = (_padded(part, _HALF) for part in (a, b))
        joined = np.stack([part.reshape(-1, _HALF, part.shape[1]) for part in (a, b)], axis=1)
        return joined.reshape(-1, a.shape[1])

    return gate.map(alternate, up)


class BlobWriter:
    """Writes a blob's matrices from their rows, in order.

    Args:
        matrix: what the blob holds.
        append: takes the next bytes of the blob.
    """

    def __init__(self, matrix: GpuMatrix, append: Callable[[Bytes], None]) -> None:
        self._matrix = matrix
        self._append = append
        self._scales: list[Bytes] = []
        self._zeros: list[Bytes] = []
        self._codes = 0

    def add(self, rows: Rows) -> None:
        """Take the next rows: a multiple of 16, but for the last of a matrix."""
        codes = tiles(rows.codes, self._matrix.kind)
        self._codes += codes.nbytes
        self._append(codes)
        # Scales and zero points of all matrices follow the codes of all, and are small beside them.
        if rows.scales is not None:
            self._scales.append(_columns(rows.scales))
        if rows.zeros is not None:
            self._zeros.append(_columns(rows.zeros))

    def finish(self) -> None:
        """Write what follows the codes."""
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
    """Codes as `Rows` has them as tiles of `kind`; rows are padded to 16 with zeros."""
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
    # Byte j of a word now has both codes of register j; its nibbles 0 .. 7 go to the order 0 2 4 6 1 3 5 7.
    words = _bytes(split.transpose(0, 3, 2, 6, 4, 5, 1)).view(np.uint32)
    for mask, shift in ((0x00F000F0, 4), (0x0000FF00, 8)):
        swapped = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
        words ^= swapped
        words ^= swapped << np.uint32(shift)
    return words.view(np.uint8)


def _columns(values: NDArray[Any]) -> Bytes:
    """[N, groups] as [blocks, groups, 16]."""
    padded = _padded(values, ROWS)
    return _bytes(padded.reshape(-1, ROWS, padded.shape[1]).transpose(0, 2, 1))


def _bytes(values: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _padded(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    missing = -len(values) % multiple
    return np.pad(values, ((0, missing), (0, 0))) if missing else values
