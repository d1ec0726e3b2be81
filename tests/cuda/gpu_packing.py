"""Packs weights in the layout of the GPU kernels, number by number, from the layout's description. Slow and independent
of the exporter's packer, which is compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.checkpoint.writer import float32_to_bf16
from edgelm.quant.fp8 import decode

Array = NDArray[Any]
INTEGERS = {GpuKind.INT4: 4, GpuKind.INT8: 8}


@dataclass(frozen=True)
class Numbers:
    """A matrix before it is packed.

    Attributes:
        codes: [N, K] uint8 codes (FP8: bit patterns), or float32 weights for kinds without scales.
        scales, zeros: [N, groups], if the kind has them.
        dense: [N, K] float64, the weights.
    """

    codes: Array
    scales: Array | None
    zeros: Array | None
    dense: NDArray[np.float64]


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to even."""
    return float32_to_bf16(np.asarray(x, np.float32))


def from_bf16(bits: Array) -> NDArray[np.float32]:
    """Return the values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_numbers(rng: np.random.Generator, matrix: GpuMatrix) -> Numbers:
    """Return a random matrix in a format, with rows in the model's order (gate, then up)."""
    shape = (matrix.rows, matrix.columns)
    kind = matrix.kind
    if not kind.scale_bytes:
        weights = rng.standard_normal(shape).astype(np.float32) / 8
        if kind is GpuKind.BFLOAT16:
            weights = from_bf16(to_bf16(weights))
        elif kind is GpuKind.FLOAT16:
            weights = weights.astype(np.float16).astype(np.float32)
        return Numbers(weights, None, None, weights.astype(np.float64))
    groups = (matrix.rows, matrix.groups)
    if kind is GpuKind.FP8:
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs
        scales = (rng.uniform(0.5, 1.5, groups) / 1000).astype(np.float32)
        dense: NDArray[np.float64] = np.asarray(decode(codes), np.float64) * np.repeat(
            scales.astype(np.float64), matrix.group, 1
        )
        return Numbers(codes, scales, None, dense)
    top = 2 ** INTEGERS[kind]
    codes = rng.integers(0, top, shape).astype(np.uint8)
    scales = (rng.uniform(0.5, 1.5, groups) / top * rng.choice([-1, 1], groups)).astype(np.float16)
    zeros = rng.integers(0, top, groups).astype(np.uint8) if matrix.zeros else None
    zero = np.full(groups, top // 2) if zeros is None else zeros.astype(np.int64)
    steps = codes.astype(np.float64) - np.repeat(zero, matrix.group, 1)
    return Numbers(codes, scales, zeros, steps * np.repeat(scales.astype(np.float64), matrix.group, 1))


def pack(matrix: GpuMatrix, matrices: list[Numbers]) -> NDArray[np.uint8]:
    """Return the blob of `matrix.count` matrices."""
    assert len(matrices) == matrix.count
    blob = np.zeros(matrix.nbytes, np.uint8)
    for number, one in enumerate(matrices):
        at = number * matrix.codes_stride
        blob[at : at + matrix.codes_stride] = _tiles(matrix, _interleaved(matrix, one.codes))
        for values, start, stride in (
            (one.scales, matrix.scales_offset, matrix.scales_stride),
            (one.zeros, matrix.zeros_offset, matrix.zeros_stride),
        ):
            if values is not None:
                at = start + number * stride
                rows = _interleaved(matrix, values)  # [blocks * 16, groups]
                ordered = rows.reshape(matrix.blocks, 16, -1).transpose(0, 2, 1)
                blob[at : at + stride] = np.frombuffer(np.ascontiguousarray(ordered).tobytes(), np.uint8)
    return blob


def _interleaved(matrix: GpuMatrix, rows: Array) -> Array:
    """Return rows in the layout's order, padded to whole blocks of 16."""
    out = np.zeros((matrix.blocks * 16, *rows.shape[1:]), rows.dtype)
    half = matrix.rows // 2
    for row in range(matrix.rows):
        if not matrix.swiglu:
            out[row] = rows[row]
        elif row < half:
            out[row // 8 * 16 + row % 8] = rows[row]
        else:
            out[(row - half) // 8 * 16 + 8 + (row - half) % 8] = rows[row]
    return out


def _tiles(matrix: GpuMatrix, codes: Array) -> NDArray[np.uint8]:
    kind = matrix.kind
    columns = kind.columns
    out = []
    for block in range(matrix.blocks):
        for tile in range(matrix.columns // columns):
            part = codes[block * 16 : block * 16 + 16, tile * columns : (tile + 1) * columns]
            for lane in range(32):
                g, q = divmod(lane, 4)
                out.append(_lane(kind, part[g], part[g + 8], q))
    return np.frombuffer(b"".join(out), np.uint8)


def _lane(kind: GpuKind, low: Array, high: Array, q: int) -> bytes:
    """Return the 16 bytes of one lane; `low` and `high` are the tile's rows g and g + 8."""
    pair = (2 * q, 2 * q + 1)
    later = (2 * q + 8, 2 * q + 9)
    if kind is GpuKind.FLOAT32:
        return np.array([low[q], high[q], low[q + 4], high[q + 4]], "<f4").tobytes()
    if kind in (GpuKind.FLOAT16, GpuKind.BFLOAT16):
        numbers = np.concatenate([low[[*pair]], high[[*pair]], low[[*later]], high[[*later]]])
        bits = numbers.astype("<f2").view("<u2") if kind is GpuKind.FLOAT16 else to_bf16(numbers)
        return bits.astype("<u2").tobytes()
    if kind in (GpuKind.INT8, GpuKind.FP8):
        steps = [row[16 * s : 16 * s + 16][[*pair, *later]] for s in (0, 1) for row in (low, high)]
        return np.concatenate(steps).astype(np.uint8).tobytes()
    words = []
    for s in range(4):
        step = slice(16 * s, 16 * s + 16)
        registers = [low[step][[*pair]], high[step][[*pair]], low[step][[*later]], high[step][[*later]]]
        word = 0
        for j, (first, second) in enumerate(registers):
            word |= int(first) << (4 * j) | int(second) << (4 * (j + 4))
        words.append(word)
    return np.array(words, "<u4").tobytes()
