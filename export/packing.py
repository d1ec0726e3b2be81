"""Packs matrices into the layout that the compiled operators read in place (`edgelm.packed`).

Pure numpy. Codes, scales and zero points are reordered and, where a matrix joins others of more bits or smaller groups,
widened and repeated: nothing is rounded. Neighbouring columns of a row are moved as units of four bytes, so packing is
a few passes over 32-bit numbers and one transposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ExportError
from edgelm.export.layout import widened
from edgelm.packed import BLOCK, TILE, Kind, PackedMatrix, Scales
from edgelm.quant.primitives import pack, unpack
from edgelm.quant.scheme import Fp8Scheme, Scheme
from edgelm.quant.tensor import QuantTensor

Bytes = NDArray[np.uint8]
Units = NDArray[np.uint32]

FLOAT_KINDS = {"float16": Kind.FLOAT16, "bfloat16": Kind.BFLOAT16, "float32": Kind.FLOAT32}
_INTEGER_KINDS = {3: Kind.INT3, 4: Kind.INT4, 5: Kind.INT5, 6: Kind.INT6, 8: Kind.INT8}
_BITS = {kind: bits for bits, kind in _INTEGER_KINDS.items()} | {Kind.INT8_PLANES: 8}
_PARTS = {
    # of a block's codes, in the order in which they are stored: the lowest bit taken and how many
    Kind.INT3: ((0, 2), (2, 1)),
    Kind.INT4: ((0, 4),),
    Kind.INT5: ((0, 4), (4, 1)),
    Kind.INT6: ((0, 4), (4, 2)),
    Kind.INT8: ((0, 8),),
    Kind.INT8_PLANES: ((4, 4),),
}


@dataclass(frozen=True)
class Format:
    """How a matrix of any number of rows is to be packed: weights, scales, zero points, and columns to a scale."""

    kind: Kind
    scales: Scales
    zeros: bool
    group: int

    def matrix(self, rows: int, columns: int, *, swiglu: bool = False) -> PackedMatrix:
        """A matrix of this format."""
        return PackedMatrix(self.kind, self.scales, self.zeros, swiglu, rows, columns, self.group)


def float_format(dtype: str, columns: int) -> Format:
    """The format of a matrix that stays float: `dtype` is "float16", "bfloat16" or "float32"."""
    return Format(FLOAT_KINDS[dtype], Scales.NONE, False, columns)


def common_format(schemes: Sequence[Any], columns: int, name: str) -> Format | None:
    """The one format that holds rows of all these (effective) schemes exactly; None where there is none.

    `schemes` are `edgelm.quant.scheme`'s. `name` is what errors call the matrix.

    Raises:
        ExportError: the layout cannot hold one of them: groups that are no multiple of 32, or FP8 E5M2.
    """
    for scheme in schemes:
        if isinstance(scheme, Fp8Scheme) and scheme.form != "e4m3":
            e4m3 = Fp8Scheme(scheme.group).name
            raise ExportError(
                f"{name} is {scheme.name} in this recipe: of FP8 the native operators have E4M3 alone; choose {e4m3} "
                "in the recipe, or keep it float"
            )
    groups = [scheme.group_size(columns) for scheme in schemes]
    integer = [isinstance(scheme, Scheme) for scheme in schemes]
    if not any(integer):
        return Format(Kind.FP8, Scales.FLOAT32, False, min(groups))
    if not all(integer):
        return None
    for scheme, group in zip(schemes, groups, strict=True):
        if group % BLOCK:
            raise ExportError(
                f"{name} is {scheme.name} with rows of {columns}: the native operators want groups of 32, or a "
                "multiple; choose a wider group in the recipe, keep it float, or export with --ops portable"
            )
    bits = max(scheme.bits for scheme in schemes)
    zeros = not all(scheme.symmetric for scheme in schemes)
    return Format(_INTEGER_KINDS[bits], Scales.FLOAT16, zeros, min(groups))


def pack_codes(tensor: QuantTensor, fmt: Format, out: Bytes, lower: Bytes | None = None) -> None:
    """Pack quantised rows into tiles.

    Args:
        tensor: rows whose scheme `fmt` holds exactly.
        fmt: the format of the whole matrix.
        out: zeros [tiles, groups, record bytes] to fill, of at least as many rows; strides are free but the last.
        lower: for INT8_PLANES, [tiles, K / 32 * 512] to fill with the lower halves.
    """
    tiles, groups = out.shape[:2]
    columns = tensor.shape[1]
    scales = _repeated(tensor.scales, groups).astype(_scale_type(fmt.scales), copy=False)
    _place(scales, out[:, :, : _scale_bytes(fmt)].view(scales.dtype), 1)
    if fmt.kind is Kind.FP8:
        _place(tensor.codes, out[:, :, _scale_bytes(fmt) :], columns // groups)
        return
    bits = _BITS[fmt.kind]
    if fmt.zeros:
        middle = 1 << (tensor.scheme.bits - 1)
        zeros = np.full(tensor.scales.shape, middle, np.uint8) if tensor.zeros is None else tensor.zeros
        zeros = widened(_repeated(zeros, groups), tensor.scheme.bits, bits)
        start = _scale_bytes(fmt)
        _place(zeros, out[:, :, start : start + TILE], 1)
    units, low = _units(tensor, fmt.kind)
    _place(units, out[:, :, _head_bytes(fmt) :].view(np.uint32), units.shape[1] // groups)
    if low is not None:
        assert lower is not None
        _place(low, lower.reshape(tiles, 1, -1).view(np.uint32), low.shape[1])


def stacked(tensors: Sequence[QuantTensor], fmt: Format) -> QuantTensor:
    """The rows of several matrices as one, whose scheme holds what `fmt` holds."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    columns = first.shape[1]
    if any(tensor.scheme != first.scheme for tensor in tensors):
        bits, groups = _BITS.get(fmt.kind, 8), columns // fmt.group
        if fmt.kind is Kind.FP8:
            finest = min((tensor.scheme for tensor in tensors), key=lambda scheme: scheme.group_size(columns))
            tensors = [replace(t, scales=_repeated(t.scales, groups), scheme=finest) for t in tensors]
        else:
            scheme = Scheme(bits, None if fmt.group == columns else fmt.group, not fmt.zeros)
            tensors = [_as_scheme(tensor, scheme, groups) for tensor in tensors]
    zeros = [tensor.zeros for tensor in tensors if tensor.zeros is not None]
    return QuantTensor(
        np.concatenate([tensor.codes for tensor in tensors]),
        np.concatenate([tensor.scales for tensor in tensors]),
        np.concatenate(zeros) if zeros else None,
        tensors[0].scheme,
        (sum(tensor.shape[0] for tensor in tensors), columns),
    )


def _as_scheme(tensor: QuantTensor, scheme: Scheme, groups: int) -> QuantTensor:
    """The very same values with as many or more bits, groups and zero points."""
    bits = tensor.scheme.bits
    codes = tensor.codes
    if bits != scheme.bits:
        codes = pack(widened(unpack(codes, bits), bits, scheme.bits), scheme.bits)
    zeros = None
    if not scheme.symmetric:
        zeros = np.full(tensor.scales.shape, 1 << (bits - 1), np.uint8) if tensor.zeros is None else tensor.zeros
        zeros = widened(_repeated(zeros, groups), bits, scheme.bits)
    return QuantTensor(codes, _repeated(tensor.scales, groups), zeros, scheme, tensor.shape)


def pack_floats(values: NDArray[Any], out: Bytes) -> None:
    """Pack rows [N, K] of float32, float16 or bfloat16 (as uint16) into `out`, zeros [tiles, 1, record bytes]."""
    _place(values, out.view(values.dtype), values.shape[1])


def _scale_type(scales: Scales) -> type[np.floating[Any]]:
    return np.float16 if scales is Scales.FLOAT16 else np.float32


def _scale_bytes(fmt: Format) -> int:
    return TILE * np.dtype(_scale_type(fmt.scales)).itemsize


def _head_bytes(fmt: Format) -> int:
    return _scale_bytes(fmt) + (2 * TILE if fmt.zeros else 0)


def _repeated(values: NDArray[Any], groups: int) -> NDArray[Any]:
    times, rest = divmod(groups, values.shape[1])
    assert rest == 0, "a group never spans two"
    return np.repeat(values, times, axis=1) if times > 1 else values


def _place(values: NDArray[Any], out: NDArray[Any], per_group: int) -> None:
    """[N, groups * per_group] to `out` [tiles, groups, per_group * 32]: the rows of a tile become neighbours."""
    tiles, groups = out.shape[:2]
    target = out.reshape(tiles, groups, per_group, TILE)
    assert np.may_share_memory(target, out), "the last axis of a record has no gaps"
    whole, rest = divmod(len(values), TILE)
    shape = (whole, TILE, groups, per_group)
    target[:whole] = values[: whole * TILE].reshape(shape).transpose(0, 2, 3, 1)
    if rest:
        target[whole, :, :, :rest] = values[whole * TILE :].reshape(rest, groups, per_group).transpose(1, 2, 0)


def _units(tensor: QuantTensor, kind: Kind) -> tuple[Units, Units | None]:
    """Codes as units of 32 bits [N, K / 32 * units of a block], in the columns' order; for planes, upper and lower."""
    bits = tensor.scheme.bits
    if kind is Kind.INT4 and bits == 4:
        return _shuffled(_as_units(tensor.codes)), None
    codes = _as_units(widened(unpack(tensor.codes, bits), bits, _BITS[kind]))
    blocks = codes.reshape(len(codes), -1, BLOCK // 4)
    parts = [_taken(blocks, lowest, count) for lowest, count in _PARTS[kind]]
    units = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
    low = _taken(blocks, 0, 4).reshape(len(codes), -1) if kind is Kind.INT8_PLANES else None
    return units.reshape(len(codes), -1), low


def _taken(units: Units, lowest: int, count: int) -> Units:
    """Some bits of every code, `count` from bit `lowest` on: of 8 / count neighbouring units [..., U] one is made."""
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
    """Nibbles 0 .. 7 of each unit to the order 0 4 1 5 2 6 3 7: two columns four apart share a byte."""
    inner = (units ^ (units >> np.uint32(8))) & np.uint32(0x0000FF00)
    units = units ^ inner ^ (inner << np.uint32(8))
    inner = (units ^ (units >> np.uint32(4))) & np.uint32(0x00F000F0)
    units ^= inner
    units ^= inner << np.uint32(4)
    return units
