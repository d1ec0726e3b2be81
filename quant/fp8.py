"""FP8 E4M3: a matrix to codes with one float32 scale for each block, and back. Pure numpy.

The numbers are those of the OCP 8-bit floating point specification, revision 1.0 (E4M3): 4 bits of exponent with bias
7, 3 of mantissa, subnormals down to 2**-9, the largest 448, no infinities; 0x7F and 0xFF are NaN, which no weight
becomes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.primitives import as_float32, not_finite
from edgelm.quant.scheme import Fp8Scheme
from edgelm.quant.tensor import QuantTensor

Floats = NDArray[np.float32]

LARGEST = np.float32(448)
"""The largest number of E4M3, code 0x7E."""

_CHUNK = 1 << 18
"""Values quantised at once: a few arrays of this size stay in the second-level cache."""

_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEP = np.float32(2.0**-9)
# From float32's bits, cut to 3 bits of mantissa, to E4M3's: the difference of the exponents' biases, 127 - 7.
_REBIAS = np.uint32(120 << 3)

TINY = np.float32(448 * 2.0**-126)
"""A block whose largest magnitude is below this is all zeros: its scale would be subnormal, too coarse to divide by."""


def decode_table() -> Floats:
    """Return the 256 numbers of E4M3 by their code, float32."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    magnitude[exponent * 8 + mantissa == 127] = np.nan
    return np.copysign(magnitude, np.where(code < 128, 1.0, -1.0)).astype(np.float32)


_TABLE = decode_table()


def decode(codes: NDArray[np.uint8]) -> Floats:
    """Return the numbers that codes stand for, exactly; same shape."""
    return _TABLE[codes]


def encode(values: Floats) -> NDArray[np.uint8]:
    """Round finite values to the nearest E4M3 number, ties to the even code, past 448 to 448; same shape, uint8.

    The sign of zero is kept.
    """
    bits = values.view(np.uint32)
    sign = bits >> np.uint32(24) & np.uint32(0x80)
    magnitude = np.minimum(np.abs(values), LARGEST)
    # Half a unit of the third mantissa bit less the tie, plus that bit: the carry runs into the exponent as it should.
    bits = magnitude.view(np.uint32)
    normal = (bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1)) >> np.uint32(20)) - _REBIAS
    # 8 steps are 2**-6, whose code is 8.
    subnormal = np.rint(np.minimum(magnitude, _SMALLEST_NORMAL) / _SUBNORMAL_STEP).astype(np.uint32)
    codes: NDArray[np.uint8] = (np.where(magnitude < _SMALLEST_NORMAL, subnormal, normal) | sign).astype(np.uint8)
    return codes


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16], scheme: Fp8Scheme, *, name: str = "weight"
) -> QuantTensor:
    """Quantise a matrix [N, K] (float32, or bfloat16 as uint16): scale = absmax / 448, code = nearest to w / scale.

    Args:
        weight: [N, K].
        scheme: the scheme wanted; the result's is `scheme.effective(K)`.
        name: what errors call the tensor.

    Raises:
        RecipeError: no block fits K.
        CheckpointError: a weight is not finite.
    """
    rows, columns = weight.shape
    scheme = scheme.effective(columns, name)
    groups = scheme.groups(columns)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, groups), np.float32)
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = as_float32(weight[part])
        finite = np.isfinite(values)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise not_finite(name, start + row, column, float(values[row, column]))
        blocks = np.ascontiguousarray(values).reshape(part.stop - start, groups, -1)
        largest = np.abs(blocks).max(axis=2, initial=0.0)
        scale: Floats = np.where(largest < TINY, np.float32(0), largest / LARGEST).astype(np.float32, copy=False)
        scales[part] = scale
        # A block of zeros has codes of zero: divided by one, it rounds to them.
        divisor: Floats = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        codes[part] = encode(blocks / divisor).reshape(-1, columns)
    return QuantTensor(codes, scales, None, scheme, (rows, columns))


def dequantize(tensor: QuantTensor) -> Floats:
    """Return float32 [N, K] = value(code) * scale, each product rounded once."""
    rows, columns = tensor.shape
    values = decode(tensor.codes).reshape(rows, tensor.scales.shape[1], tensor.scheme.group_size(columns))
    values *= tensor.scales[:, :, None]
    return values.reshape(rows, columns)
