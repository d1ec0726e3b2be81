"""Convert quantised rows to more bits and smaller groups, so that matrices of different schemes can be stacked.

Nothing is rounded. Codes and zero points are shifted by the difference of the types' midpoints, and scales and zero
points are repeated, so `(code - zero) * scale` stays the same number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.primitives import pack, unpack
from edgelm.quant.tensor import QuantTensor

Bytes = NDArray[np.uint8]


def upcast(codes: Bytes, bits: int, more: int) -> Bytes:
    """Convert codes or zero points, one per byte, from `bits` to `more` bits; the midpoint becomes the new midpoint."""
    assert bits <= more, "codes are never rounded to fewer bits"
    if bits == more:
        return codes
    moved: Bytes = codes + np.uint8((1 << (more - 1)) - (1 << (bits - 1)))
    return moved


def codes_in(tensor: QuantTensor, bits: int) -> Bytes:
    """Return the codes with `bits` bits, packed: [N, ceil(K * bits / 8)]."""
    own = tensor.scheme.bits
    if own == bits:
        return tensor.codes
    return pack(upcast(unpack(tensor.codes, own, tensor.shape[1]), own, bits), bits)


def scales_in(tensor: QuantTensor, group: int) -> NDArray[np.floating[Any]]:
    """Return the scales for groups of `group` columns: [N, ceil(K / group)]."""
    return _repeated(tensor, tensor.scales, group)


def zeros_in(tensor: QuantTensor, group: int, bits: int) -> Bytes:
    """Return the zero points for codes of `bits` bits, one per byte: [N, ceil(K / group)].

    In a symmetric scheme they are the midpoint.
    """
    own, zeros = tensor.scheme.bits, tensor.zeros
    if zeros is None:
        zeros = np.full(tensor.scales.shape, 1 << (own - 1), np.uint8)
    return upcast(_repeated(tensor, zeros, group), own, bits)


def repacked(
    tensor: QuantTensor, bits: int, group: int, *, zeros: bool
) -> tuple[Bytes, NDArray[np.floating[Any]], Bytes | None]:
    """Return codes, scales and, with `zeros`, zero points for `bits` and `group`; the values stay the same."""
    return (
        codes_in(tensor, bits),
        scales_in(tensor, group),
        zeros_in(tensor, group, bits) if zeros else None,
    )


def _repeated(tensor: QuantTensor, values: NDArray[Any], group: int) -> NDArray[Any]:
    """Repeat `values`, one for each group of `tensor`, for smaller groups of `group` columns."""
    own, groups = tensor.scheme.group, -(-tensor.shape[1] // group)
    if values.shape[1] == groups:
        return values
    assert own is None or own % group == 0, "a group never spans two"
    # The row may end within the last group.
    return np.repeat(values, groups if own is None else own // group, axis=1)[:, :groups]
