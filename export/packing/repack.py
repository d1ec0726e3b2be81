"""Quantised rows with more bits and smaller groups: what they need to join others in one layout.

Nothing is rounded: codes and zero points move with the middle of their type, scales and zero points are repeated, so
that `(code - zero) * scale` stays the very same number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.primitives import pack, unpack
from edgelm.quant.tensor import QuantTensor

Bytes = NDArray[np.uint8]


def upcast(codes: Bytes, bits: int, wider: int) -> Bytes:
    """Codes or zero points, one to a byte, in `wider` bits: the middle of one type becomes that of the other."""
    assert bits <= wider, "codes are never rounded to fewer bits"
    if bits == wider:
        return codes
    moved: Bytes = codes + np.uint8((1 << (wider - 1)) - (1 << (bits - 1)))
    return moved


def codes_in(tensor: QuantTensor, bits: int) -> Bytes:
    """Codes of `bits`, packed: [N, ceil(K * bits / 8)]."""
    own = tensor.scheme.bits
    if own == bits:
        return tensor.codes
    return pack(upcast(unpack(tensor.codes, own, tensor.shape[1]), own, bits), bits)


def scales_in(tensor: QuantTensor, group: int) -> NDArray[np.floating[Any]]:
    """Scales for groups of `group` columns, [N, ceil(K / group)]."""
    return _repeated(tensor, tensor.scales, group)


def zeros_in(tensor: QuantTensor, group: int, bits: int) -> Bytes:
    """Zero points of codes of `bits`, one to a byte, [N, ceil(K / group)]; a symmetric scheme's are its middle."""
    own, zeros = tensor.scheme.bits, tensor.zeros
    if zeros is None:
        zeros = np.full(tensor.scales.shape, 1 << (own - 1), np.uint8)
    return upcast(_repeated(tensor, zeros, group), own, bits)


def repacked(
    tensor: QuantTensor, bits: int, group: int, *, zeros: bool
) -> tuple[Bytes, NDArray[np.floating[Any]], Bytes | None]:
    """Codes, scales and, with `zeros`, zero points of the same values."""
    return (
        codes_in(tensor, bits),
        scales_in(tensor, group),
        zeros_in(tensor, group, bits) if zeros else None,
    )


def _repeated(tensor: QuantTensor, values: NDArray[Any], group: int) -> NDArray[Any]:
    """What `tensor` has for each of its groups, for groups of `group` columns, which are as many or more."""
    own, groups = tensor.scheme.group, -(-tensor.shape[1] // group)
    if values.shape[1] == groups:
        return values
    assert own is None or own % group == 0, "a group never spans two"
    # The last group may be cut off by the row's end.
    return np.repeat(values, groups if own is None else own // group, axis=1)[:, :groups]
