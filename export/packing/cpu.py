"""Pack matrices into the layout of the native operators (`edgelm.bundle.cpu_layout`), which read it in place.

Pure numpy. Codes, scales and zero points are reordered. If a matrix is stacked with others of more bits or smaller
groups, its codes are upcast and its scales repeated; nothing is rounded. Neighbouring columns of a row move together in
units of four bytes, so packing takes a few passes over 32-bit numbers and one transposition. Rows that do not fill
their last record are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.cpu_layout import BLOCK, TILE, Kind, Scales
from edgelm.bundle.formats import CpuFormat as Format
from edgelm.bundle.formats import cpu_format as common_format
from edgelm.bundle.formats import float_format
from edgelm.export.packing.repack import repacked, scales_in, upcast, zeros_in
from edgelm.quant.primitives import unpack
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme
from edgelm.quant.tensor import QuantTensor

__all__ = ["Format", "common_format", "float_format", "pack_codes", "pack_floats", "stacked"]

Bytes = NDArray[np.uint8]
Units = NDArray[np.uint32]

_BITS = {Kind.INT3: 3, Kind.INT4: 4, Kind.INT5: 5, Kind.INT6: 6, Kind.INT8: 8, Kind.INT8_SPLIT: 8}
_PARTS = {
    # Bits of a block's codes in the order in which they are stored: (lowest bit, number of bits).
    Kind.INT3: ((0, 2), (2, 1)),
    Kind.INT4: ((0, 4),),
    Kind.INT5: ((0, 4), (4, 1)),
    Kind.INT6: ((0, 4), (4, 2)),
    Kind.INT8: ((0, 8),),
    Kind.INT8_SPLIT: ((4, 4),),
}


def pack_codes(tensor: QuantTensor, fmt: Format, out: Bytes, lower: Bytes | None = None) -> None:
    """Pack quantised rows into tiles.

    Args:
        tensor: Rows [N, K] of a scheme that `fmt` holds exactly.
        fmt: Format of the whole matrix.
        out: Zeros [tiles, records, record bytes] to write to, with room for at least N rows. The last axis must be
            contiguous.
        lower: For split nibbles, [tiles, padded K / 32 * 512] to write the low nibbles to.
    """
    tiles, records = out.shape[:2]
    matrix = fmt.matrix(tensor.shape[0], tensor.shape[1])
    groups, of_record, scale_bytes = matrix.groups, matrix.span // fmt.group, matrix.scale_bytes
    scales = scales_in(tensor, fmt.group).astype(_scale_type(fmt.scales), copy=False)
    zeros = zeros_in(tensor, fmt.group, _BITS[fmt.kind]) if fmt.zeros else None
    for i in range(min(of_record, groups)):
        start = i * scale_bytes
        _place(scales[:, i::of_record], out[:, :, start : start + scale_bytes].view(scales.dtype), 1)
        if zeros is not None:
            start = of_record * scale_bytes + i * 2 * TILE
            _place(zeros[:, i::of_record], out[:, :, start : start + TILE], 1)
    codes = out[:, :, matrix.head_bytes :]
    if fmt.kind is Kind.FP8:
        _place(_padded(tensor.codes, records * matrix.span, 0), codes, matrix.span)
        return
    units, low = _units(tensor, fmt.kind, records * matrix.span)
    _place(units, codes.view(np.uint32), units.shape[1] // records)
    if low is not None:
        assert lower is not None
        _place(low, lower.reshape(tiles, 1, -1).view(np.uint32), low.shape[1])


def stacked(tensors: Sequence[QuantTensor], fmt: Format) -> QuantTensor:
    """Stack the rows of several matrices; the result's scheme holds all of theirs exactly, in the format `fmt`."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if any(tensor.scheme != first.scheme for tensor in tensors):
        group = min((t.scheme.group for t in tensors if t.scheme.group is not None), default=None)
        scheme: AnyScheme = Fp8Scheme(group)
        if fmt.kind is not Kind.FP8:
            scheme = Scheme(_BITS[fmt.kind], group, not fmt.zeros)
        tensors = [
            QuantTensor(*repacked(tensor, scheme.bits, fmt.group, zeros=fmt.zeros), scheme, tensor.shape)
            for tensor in tensors
        ]
    zeros = [tensor.zeros for tensor in tensors if tensor.zeros is not None]
    return QuantTensor(
        np.concatenate([tensor.codes for tensor in tensors]),
        np.concatenate([tensor.scales for tensor in tensors]),
        np.concatenate(zeros) if zeros else None,
        tensors[0].scheme,
        (sum(tensor.shape[0] for tensor in tensors), first.shape[1]),
    )


def pack_floats(values: NDArray[Any], out: Bytes) -> None:
    """Pack rows [N, K] of float32, float16 or bfloat16 (as uint16) into `out`, zeros [tiles, 1, record bytes]."""
    _place(values, out.view(values.dtype), values.shape[1])


def _scale_type(scales: Scales) -> type[np.floating[Any]]:
    return np.float16 if scales is Scales.FLOAT16 else np.float32


def _place(values: NDArray[Any], out: NDArray[Any], per_record: int) -> None:
    """Transpose [N, records * per_record] into `out` [tiles, records, per_record * 32], rows of a tile innermost.

    Records beyond the last value stay as they are.
    """
    tiles, records = out.shape[0], values.shape[1] // per_record
    target = out.reshape(tiles, out.shape[1], per_record, TILE)[:, :records]
    assert np.may_share_memory(target, out), "the last axis of out must be contiguous"
    whole, rest = divmod(len(values), TILE)
    shape = (whole, TILE, records, per_record)
    target[:whole] = values[: whole * TILE].reshape(shape).transpose(0, 2, 3, 1)
    if rest:
        target[whole, :, :, :rest] = values[whole * TILE :].reshape(rest, records, per_record).transpose(1, 2, 0)


def _padded(codes: Bytes, columns: int, filling: int) -> Bytes:
    missing = columns - codes.shape[1]
    return np.pad(codes, ((0, 0), (0, missing)), constant_values=filling) if missing else codes


def _units(tensor: QuantTensor, kind: Kind, columns: int) -> tuple[Units, Units | None]:
    """Return codes as 32-bit units [N, columns / 32 * units of a block], in column order, and the low nibbles if split.

    Rows are padded to `columns` with the code of zero.
    """
    bits = tensor.scheme.bits
    if kind is Kind.INT4 and bits == 4 and tensor.shape[1] == columns:
        return _shuffled(_as_units(tensor.codes)), None
    codes = upcast(unpack(tensor.codes, bits, tensor.shape[1]), bits, _BITS[kind])
    blocks = _as_units(_padded(codes, columns, 1 << (_BITS[kind] - 1))).reshape(len(codes), -1, BLOCK // 4)
    parts = [_taken(blocks, lowest, count) for lowest, count in _PARTS[kind]]
    units = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    low = _taken(blocks, 0, 4).reshape(len(codes), -1) if kind is Kind.INT8_SPLIT else None
    return units.reshape(len(codes), -1), low


def _taken(units: Units, lowest: int, count: int) -> Units:
    """Take `count` bits of every code from bit `lowest` on; 8 / count neighbouring units of [..., U] become one."""
    if count == 8:
        return units
    mask = np.uint32(((1 << count) - 1) * 0x01010101)
    bits = (units >> np.uint32(lowest)) & mask
    together = 8 // count
    found = bits[..., 0::together].copy()
    for i in range(1, together):
        found |= bits[..., i::together] << np.uint32(count * i)
    return found


def _as_units(codes: Bytes) -> Units:
    return np.ascontiguousarray(codes).view(np.uint32)


def _shuffled(units: Units) -> Units:
    """Reorder the nibbles 0 .. 7 of each unit to 0 4 1 5 2 6 3 7, so that columns four apart share a byte."""
    inner = (units ^ (units >> np.uint32(8))) & np.uint32(0x0000FF00)
    units = units ^ inner ^ (inner << np.uint32(8))
    inner = (units ^ (units >> np.uint32(4))) & np.uint32(0x00F000F0)
    units ^= inner
    units ^= inner << np.uint32(4)
    return units
