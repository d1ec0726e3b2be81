"""Read the GPU layout back, lane by lane, as bundle/gpu_layout.py describes it; shares no code with the packer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import ROWS, TILE_BYTES, GpuKind, GpuMatrix

FLOATS = {GpuKind.FLOAT16: np.float16, GpuKind.BFLOAT16: np.uint16, GpuKind.FLOAT32: np.float32}


def _places(kind: GpuKind) -> list[tuple[int, int, int, int]]:
    """Yield (byte, nibble or -1, row, column) of every weight in a tile."""
    found = []
    for lane in range(32):
        g, q = divmod(lane, 4)
        for word in range(4):
            at = 16 * lane + 4 * word
            if kind is GpuKind.FLOAT32:
                found.append((at, -1, g + 8 * (word % 2), q + 4 * (word // 2)))
            elif kind in (GpuKind.FLOAT16, GpuKind.BFLOAT16):
                found += [(at + 2 * i, -1, g + 8 * (word % 2), 2 * q + i + 8 * (word // 2)) for i in range(2)]
            elif kind is GpuKind.INT4:
                for j in range(4):
                    row, column = g + 8 * (j % 2), 16 * word + 2 * q + 8 * (j // 2)
                    found += [(at + (j + 4 * i) // 2, j % 2, row, column + i) for i in range(2)]
            else:
                step, half = divmod(word, 2)
                found += [
                    (at + i, -1, g + 8 * half, 16 * step + 2 * q + offset) for i, offset in enumerate((0, 1, 8, 9))
                ]
    return found


def unpack_codes(blob: bytes, matrix: GpuMatrix, index: int = 0) -> NDArray[Any]:
    """Return the codes (or floats) [16 blocks, K] of one matrix of a blob, rows in stored order."""
    dtype = np.dtype(FLOATS.get(matrix.kind, np.uint8))
    codes = np.zeros((matrix.blocks * ROWS, matrix.columns), dtype)
    width = matrix.kind.columns
    for block in range(matrix.blocks):
        for tile in range(matrix.columns // width):
            start = index * matrix.codes_stride + (block * (matrix.columns // width) + tile) * TILE_BYTES
            for byte, nibble, row, column in _places(matrix.kind):
                raw = blob[start + byte : start + byte + dtype.itemsize]
                value = np.frombuffer(raw, dtype)[0]
                if nibble >= 0:
                    value = int(value) >> (4 * nibble) & 15
                codes[block * ROWS + row, tile * width + column] = value
    return codes


def unpack_matrix(blob: bytes, matrix: GpuMatrix, index: int = 0) -> NDArray[np.float32]:
    """Return the weights float32 [rows, K] of one matrix of a blob; with SwiGLU the rows of gate, then those of up."""
    assert len(blob) == matrix.nbytes
    codes = unpack_codes(blob, matrix, index)
    if matrix.kind is GpuKind.BFLOAT16:
        weights = (codes.astype(np.uint32) << 16).view(np.float32)
    elif matrix.kind in FLOATS:
        weights = codes.astype(np.float32)
    else:
        weights = _dequantised(blob, matrix, index, codes)
    if not matrix.swiglu:
        return weights[: matrix.rows]
    halves = weights.reshape(matrix.blocks, 2, 8, matrix.columns)
    return np.concatenate([halves[:, i].reshape(-1, matrix.columns)[: matrix.outputs] for i in range(2)])


def _dequantised(blob: bytes, matrix: GpuMatrix, index: int, codes: NDArray[Any]) -> NDArray[np.float32]:
    fp8 = matrix.kind is GpuKind.FP8
    count = matrix.blocks * matrix.groups * ROWS

    def spread(part: NDArray[Any]) -> NDArray[Any]:
        rows = part.reshape(matrix.blocks, matrix.groups, ROWS).swapaxes(1, 2).reshape(-1, matrix.groups)
        return np.repeat(rows, matrix.group, axis=1)

    start = matrix.scales_offset + index * matrix.scales_stride
    scales = spread(np.frombuffer(blob, np.float32 if fp8 else np.float16, count, start)).astype(np.float32)
    if fp8:
        return e4m3(codes) * scales
    zeros: Any = 8 if matrix.kind is GpuKind.INT4 else 128
    if matrix.zeros:
        start = matrix.zeros_offset + index * matrix.zeros_stride
        zeros = spread(np.frombuffer(blob, np.uint8, count, start)).astype(np.float32)
    return (codes.astype(np.float32) - zeros) * scales


def e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the values of E4M3 codes."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, fraction = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    value = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    return (sign * value).astype(np.float32)
