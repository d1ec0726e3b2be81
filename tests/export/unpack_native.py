"""Unpack the native layout slowly and simply, from the table in layout.h; shares no code with the packer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.cpu_layout import BLOCK, TILE, Kind, PackedMatrix, Scales

Bytes = NDArray[np.uint8]

BITS = {Kind.INT3: 3, Kind.INT4: 4, Kind.INT5: 5, Kind.INT6: 6, Kind.INT8: 8, Kind.INT8_SPLIT: 8}
FLOAT_TYPES = {Kind.FP8: np.uint8, Kind.FLOAT16: np.float16, Kind.BFLOAT16: np.uint16, Kind.FLOAT32: np.float32}
SCALE_TYPES = {Scales.FLOAT16: np.float16, Scales.FLOAT32: np.float32}


def unpack_matrix(matrix: PackedMatrix, data: bytes | Bytes) -> tuple[NDArray[Any], ...]:
    """Unpack a matrix.

    Args:
        matrix: The parsed header.
        data: All bytes, from the header on.

    Returns:
        Codes uint8 [N, K], scales [N, groups] and zero points uint8 [N, groups] (the midpoint if none are stored). For
        a float matrix only its values [N, K]; for fp8 only codes and scales.
    """
    raw = np.frombuffer(data, np.uint8)
    tiles, records, of_record = matrix.tiles, matrix.records, matrix.span // matrix.group
    stored = raw[64 : matrix.first_bytes].reshape(tiles, records, matrix.record_bytes)
    codes = np.ascontiguousarray(stored[:, :, matrix.head_bytes :])
    scale_bytes = matrix.head_bytes // of_record - (2 * TILE if matrix.zeros else 0)
    scales = np.ascontiguousarray(stored[:, :, : of_record * scale_bytes]).reshape(tiles, records * of_record, -1)
    if not matrix.kind.is_integer:
        values = codes.view(FLOAT_TYPES[matrix.kind]).reshape(tiles, records, matrix.span, TILE)
        found: list[NDArray[Any]] = [_rows(values.transpose(0, 3, 1, 2).reshape(tiles * TILE, -1), matrix)]
        found[0] = found[0][:, : matrix.columns]
        if matrix.scales is not Scales.NONE:
            found.append(_per_row(scales.view(SCALE_TYPES[matrix.scales]), matrix))
        return tuple(found)
    blocks = codes.reshape(tiles, records * matrix.span // BLOCK, -1)
    lower = None
    if matrix.kind is Kind.INT8_SPLIT:
        lower = raw[matrix.low_offset : matrix.nbytes].reshape(blocks.shape)
    columns = np.stack([_column(blocks, lower, k, matrix.kind) for k in range(BLOCK)], axis=-1)
    unpacked = _rows(columns.transpose(0, 2, 1, 3).reshape(tiles * TILE, -1), matrix)
    assert (unpacked[:, matrix.columns :] == 1 << (BITS[matrix.kind] - 1)).all(), "padding stands for zero"
    if matrix.zeros:
        points = stored[:, :, of_record * scale_bytes : matrix.head_bytes].reshape(tiles, records * of_record, 2 * TILE)
        zeros = _per_row(points[:, :, :TILE], matrix)
    else:
        zeros = np.full((matrix.rows, matrix.groups), 1 << (BITS[matrix.kind] - 1), np.uint8)
    return unpacked[:, : matrix.columns], _per_row(scales.view(SCALE_TYPES[matrix.scales]), matrix), zeros


def _column(blocks: Bytes, lower: Bytes | None, k: int, kind: Kind) -> Bytes:
    """Return column k of every block [tiles, blocks, bytes]: codes [tiles, blocks, 32], as in layout.h."""

    def taken(data: Bytes, at: int) -> Bytes:
        return data[:, :, [at + 4 * n + k % 4 for n in range(TILE)]]

    if kind is Kind.INT8:
        return taken(blocks, 128 * (k // 4))
    if kind is Kind.INT3:
        pair = taken(blocks, 128 * (k // 16)) >> np.uint8(2 * (k % 16 // 4)) & np.uint8(3)
        return pair | (taken(blocks, 256) >> np.uint8(k // 4) & np.uint8(1)) << np.uint8(2)
    shift = np.uint8(4 * (k % 8 // 4))
    upper = taken(blocks, 128 * (k // 8)) >> shift & np.uint8(15)
    if kind is Kind.INT5:
        return upper | (taken(blocks, 512) >> np.uint8(k // 4) & np.uint8(1)) << np.uint8(4)
    if kind is Kind.INT6:
        pair = taken(blocks, 512 + 128 * (k // 16)) >> np.uint8(2 * (k % 16 // 4)) & np.uint8(3)
        return upper | pair << np.uint8(4)
    return upper if lower is None else upper << np.uint8(4) | (taken(lower, 128 * (k // 8)) >> shift & np.uint8(15))


def _per_row(values: NDArray[Any], matrix: PackedMatrix) -> NDArray[Any]:
    """Reorder [tiles, groups, 32] to [N, groups], without groups beyond the last column."""
    return _rows(values.transpose(0, 2, 1).reshape(matrix.tiles * TILE, -1), matrix)[:, : matrix.groups]


def _rows(values: NDArray[Any], matrix: PackedMatrix) -> NDArray[Any]:
    """Return the rows in the checkpoint's order, without padding rows."""
    if not matrix.swiglu:
        return values[: matrix.rows]
    parts = values.reshape(matrix.tiles // 2, 2, TILE, -1)
    return np.concatenate([parts[:, i].reshape(-1, values.shape[1])[: matrix.outputs] for i in range(2)])
