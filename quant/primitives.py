"""Quantise a matrix to integers and back, in numpy. The native kernel is tested against these functions.

Values are rounded to nearest, with a scale per group that minimises the squared error:

1. Each of 12 trial scales gives codes c = code - zero and the sums sxc = sum(x * c) and scc = sum(c * c). For these
   codes the least-squares scale is sxc / scc, and its error is sum(x * x) - sxc**2 / scc. So the trial with the largest
   sxc**2 / scc is best. A symmetric trial maps the value of largest magnitude to -t, with t = 7 .. 10.5 at 4 bits,
   where the negative side ends at 8. The negative side has one more code, and as in llama.cpp the largest value gets
   it. t > 8 clips that value, which reduces the error if it is an outlier.
2. The least-squares scale of the best trial is rounded to float16, and the final codes are chosen for the rounded
   scale, which is the one that a device uses.
3. Plain rounding with the scale absmax / 7 (asymmetric: range / 15) is tried too, and taken if its error is smaller.

Sums run in a fixed order in float32 without fused multiply-adds. So this module and the native kernel agree bit for bit
on every machine, and an exported file does not depend on the machine that made it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor
from edgelm.slices import slices

Floats = NDArray[np.float32]
AnyWeights = TypeVar("AnyWeights", bound=NDArray[np.float32] | NDArray[np.uint16])

LANES = 16
"""Groups that the native kernel processes together; also the least number of columns summed here (see `_sum`)."""

_CHUNK = 1 << 18
"""Values quantised at once; a few arrays of this size fit into the second-level cache."""

TINY = np.float32(2.0**-40)
"""A group with a smaller largest magnitude becomes zeros, since its scale is far below float16's smallest number."""


_WIDE = 256
_TARGETS = {
    # (bits, symmetric): ends of the grid for groups of at most _WIDE values, and for larger ones
    (3, True): ((2.9, 6.0), (3.2, 10.5)),
    (3, False): ((6.3, 10.0), (7.5, 18.0)),
    (4, True): ((6.9, 10.5), (8.0, 18.0)),
    (4, False): ((14.2, 19.0), (15.0, 30.0)),
    (5, True): ((14.0, 18.5), (15.5, 28.0)),
    (5, False): ((28.5, 35.0), (30.5, 48.0)),
    (6, True): ((29.0, 35.0), (30.5, 44.0)),
    (6, False): ((59.0, 67.0), (61.5, 85.0)),
    (8, True): ((123.0, 130.0), (123.0, 130.0)),
    (8, False): ((246.0, 259.0), (246.0, 259.0)),
}


def search_targets(scheme: Scheme, columns: int) -> Floats:
    """Return the trial scales: code distances to which the largest magnitude (asymmetric: the range) is mapped.

    The larger a group, the larger its outliers, and the more clipping reduces the error. The grids were chosen by the
    error on normal and Student-t weights. At 4, 5 and 6 bits each is within 0.05 dB of a search with 200 trials.
    """
    low, high = _TARGETS[scheme.bits, scheme.symmetric][scheme.group_size(columns) > _WIDE]
    return np.linspace(low, high, 12, dtype=np.float32)


def as_float32(weight: NDArray[np.float32] | NDArray[np.uint16]) -> Floats:
    """Convert weights to float32; uint16 means the bits of bfloat16.

    Raises:
        TypeError: The weights have another type.
    """
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    if weight.dtype == np.float32:
        return cast("Floats", weight)
    raise TypeError(f"weights are float32, or bfloat16 as uint16, not {weight.dtype}")


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes [N, K], one per byte, into [N, ceil(K * bits / 8)], the layout of `QuantTensor`.

    Unused bits of the last byte are 0.
    """
    if bits == 8:
        return codes
    rows, columns = codes.shape
    if missing := -columns % _word(bits)[0]:
        return np.ascontiguousarray(pack(np.pad(codes, ((0, 0), (0, missing))), bits)[:, : -(-columns * bits // 8)])
    if bits == 4:
        packed: NDArray[np.uint8] = np.left_shift(codes[:, 1::2], 4, dtype=np.uint8)
        packed |= codes[:, 0::2]
        return packed
    codes_of_word, bytes_of_word = _word(bits)
    words = np.zeros((rows, columns // codes_of_word), np.uint64)
    for code in range(codes_of_word):
        words |= codes[:, code::codes_of_word].astype(np.uint64) << np.uint64(bits * code)
    little_endian = words.astype("<u8").view(np.uint8).reshape(*words.shape, 8)
    return little_endian[:, :, :bytes_of_word].reshape(rows, bytes_of_word * words.shape[1])


def unpack(packed: NDArray[np.uint8], bits: int, columns: int | None = None) -> NDArray[np.uint8]:
    """Return codes one per byte, [N, K]: the inverse of `pack`.

    Args:
        packed: Codes [N, ceil(K * bits / 8)].
        bits: Bits per code.
        columns: K; None if the codes fill the last byte.
    """
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if columns is not None and (missing := -packed.shape[1] % _word(bits)[1]):
        packed = np.pad(packed, ((0, 0), (0, missing)))
    if columns is not None and columns != packed.shape[1] * 8 // bits:
        return np.ascontiguousarray(unpack(packed, bits)[:, :columns])
    columns = packed.shape[1] * 8 // bits
    codes = np.empty((rows, columns), np.uint8)
    if bits == 4:
        np.bitwise_and(packed, 15, out=codes[:, 0::2])
        np.right_shift(packed, 4, out=codes[:, 1::2])
        return codes
    codes_of_word, bytes_of_word = _word(bits)
    little_endian = np.zeros((rows, columns // codes_of_word, 8), np.uint8)
    little_endian[:, :, :bytes_of_word] = packed.reshape(rows, columns // codes_of_word, bytes_of_word)
    words = little_endian.view("<u8")[:, :, 0]
    for code in range(codes_of_word):
        codes[:, code::codes_of_word] = (words >> np.uint64(bits * code)) & np.uint64((1 << bits) - 1)
    return codes


def _word(bits: int) -> tuple[int, int]:
    # The smallest number of codes that fills whole bytes, and that number of bytes: (8, 3) at 3 bits, (4, 3) at 6.
    codes = 8 // gcd(8, bits)
    return codes, codes * bits // 8


def fill(weight: AnyWeights, columns: int) -> AnyWeights:
    """Pad rows [N, K] with zeros to `columns`.

    The zeros change no scale, as they add nothing to a sum, and every range includes zero.
    """
    return cast("AnyWeights", np.pad(weight, ((0, 0), (0, columns - weight.shape[1]))))


def not_finite(name: str, row: int, column: int, value: float) -> CheckpointError:
    """Return the error for a NaN or an infinity among the weights."""
    return CheckpointError(
        f"{name}[{row}, {column}] is {value}, but weights must be finite: the checkpoint is damaged, so fetch it again"
    )


def too_large(name: str, row: int, column: int, value: float) -> CheckpointError:
    """Return the error for a weight whose scale would exceed float16's range."""
    return CheckpointError(
        f"{name}[{row}, {column}] is {value:g}, too large for a float16 scale (65504): the checkpoint is damaged, or "
        'the tensor must stay float (a recipe rule with scheme = "float")'
    )


def quantize(weight: NDArray[np.float32] | NDArray[np.uint16], scheme: Scheme, *, name: str = "weight") -> QuantTensor:
    """Quantise a matrix to integers with numpy alone.

    Args:
        weight: [N, K], float32, or bfloat16 as uint16.
        scheme: The scheme; the result has `scheme.effective(K)`.
        name: Name of the tensor in errors.

    Raises:
        CheckpointError: A weight is not finite, or too large for a float16 scale.
    """
    rows, columns = weight.shape
    scheme = scheme.effective(columns)
    if columns != (width := scheme.padded(columns)):
        return quantize(fill(weight, width), scheme, name=name).cut(columns)
    group, groups = scheme.group_size(columns), scheme.groups(columns)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, groups), np.float16)
    zeros = None if scheme.symmetric else np.empty((rows, groups), np.uint8)
    targets = search_targets(scheme, columns)
    for part in slices(rows, _CHUNK // max(columns, 1)):
        values = as_float32(weight[part])
        _check(values, scheme, group, name, part.start)
        # [group, number of groups]: each column is one group, and reductions run down the columns.
        transposed = np.ascontiguousarray(values.reshape(-1, group).T)
        found = _quantize_groups(transposed, scheme, targets)
        codes[part] = found.codes.T.reshape(-1, columns)
        scales[part] = found.scales.reshape(-1, groups)
        if zeros is not None:
            zeros[part] = found.zeros.reshape(-1, groups)
    return QuantTensor(pack(codes, scheme.bits), scales, zeros, scheme, (rows, columns))


def dequantize(tensor: QuantTensor) -> Floats:
    """Return float32 [N, K] = (code - zero) * scale, which is exact in float32."""
    rows, columns = tensor.shape
    scheme = tensor.integers
    if columns != scheme.padded(columns):
        return np.ascontiguousarray(dequantize(tensor.padded())[:, :columns])
    codes = unpack(tensor.codes, scheme.bits).reshape(rows, tensor.scales.shape[1], scheme.group_size(columns))
    zeros = np.float32(scheme.symmetric_zero) if tensor.zeros is None else tensor.zeros[:, :, None]
    values = np.subtract(codes, zeros, dtype=np.float32)
    values *= tensor.scales.astype(np.float32)[:, :, None]
    return values.reshape(rows, columns)


def _check(values: Floats, scheme: Scheme, group: int, name: str, first_row: int) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise not_finite(name, first_row + row, column, float(values[row, column]))
    # The largest possible scale is that of plain rounding. 65504 is float16's largest number.
    limit = np.float32(65504.0) * np.float32(scheme.symmetric_zero - 1)
    magnitude = np.abs(values)
    if magnitude.max(initial=0.0) > limit:
        row, column = (int(i) for i in np.argwhere(magnitude > limit)[0])
        raise too_large(name, first_row + row, column, float(values[row, column]))


@dataclass
class _Groups:
    codes: NDArray[np.uint8]  # [group, M]
    scales: NDArray[np.float16]  # [M]
    zeros: NDArray[np.uint8]  # [M]


def _sum(values: Floats) -> Floats:
    # numpy adds the rows of a [group, M] array in order, like the native kernel. But with M = 1 it sums pairwise, as
    # the axis is contiguous then. So `_quantize_groups` pads M.
    return cast("Floats", np.add.reduce(values, axis=0))


def _reciprocal(values: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(values == 0, np.float32(0), np.float32(1) / values).astype(np.float32)


def _to_half(scale: Floats) -> Floats:
    # Adding zero turns -0.0 into 0.0. A scale above 65504 becomes infinite; its error is NaN, so it is never chosen.
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).astype(np.float32) + np.float32(0)


def _codes(x: Floats, inverse: Floats, low: Floats, high: Floats) -> Floats:
    # Clip before rounding. The bounds are integers, so the result is the same, and the kernel can round by adding and
    # subtracting 1.5 * 2**23.
    c = x * inverse
    np.maximum(c, low, out=c)
    np.minimum(c, high, out=c)
    np.rint(c, out=c)
    return c


def _quantize_groups(x: Floats, scheme: Scheme, targets: Floats) -> _Groups:
    group, count = x.shape
    if count < LANES:
        x = np.concatenate([x, np.zeros((group, LANES - count), np.float32)], axis=1)
    levels = np.float32(scheme.levels - 1)
    if scheme.symmetric:
        index = np.abs(x).argmax(axis=0)
        largest = np.take_along_axis(x, index[None], axis=0)[0]
        extent = -largest
        plain_steps = np.float32(scheme.symmetric_zero - 1)
        zero = np.full(extent.shape, scheme.symmetric_zero, np.float32)
    else:
        bottom = np.minimum(x.min(axis=0), np.float32(0))
        extent = np.maximum(x.max(axis=0), np.float32(0)) - bottom
        plain_steps = levels
    extent = np.where(np.abs(extent) < TINY, np.float32(0), extent).astype(np.float32)
    base = _reciprocal(extent)
    if not scheme.symmetric:
        zero = np.rint(np.clip(-bottom * (levels * base), np.float32(0), levels))

    best_score = np.full(extent.shape, -1, np.float32)
    best_scale: Floats = np.zeros(extent.shape, np.float32)
    low, high = -zero, levels - zero
    with np.errstate(invalid="ignore", divide="ignore"):
        for target in targets:
            c = _codes(x, target * base, low, high)
            sxc, scc = _sum(x * c), _sum(c * c)
            score = sxc * sxc / scc
            better = score > best_score
            best_score = np.where(better, score, best_score)
            best_scale = np.where(better, sxc / scc, best_scale).astype(np.float32, copy=False)

    scale = _to_half(best_scale)
    c, error = _final(x, scale, low, high)
    plain_scale = _to_half((extent / plain_steps).astype(np.float32, copy=False))
    plain_zero = (
        zero if scheme.symmetric else np.rint(np.clip(-bottom * _reciprocal(plain_scale), np.float32(0), levels))
    )
    plain_c, plain_error = _final(x, plain_scale, -plain_zero, levels - plain_zero)
    keep = error <= plain_error
    scale, zero = np.where(keep, scale, plain_scale), np.where(keep, zero, plain_zero)
    codes = np.where(keep, c, plain_c) + zero
    return _Groups(codes[:, :count].astype(np.uint8), scale[:count].astype(np.float16), zero[:count].astype(np.uint8))


def _final(x: Floats, scale: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    c = _codes(x, _reciprocal(scale), low, high)
    with np.errstate(invalid="ignore"):
        difference = x - c * scale
    return c, _sum(difference * difference)
