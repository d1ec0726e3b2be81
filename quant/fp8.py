"""Quantise a matrix to FP8 with one float32 scale per block, and back. Pure numpy.

The number formats are those of the OCP 8-bit floating point specification, revision 1.0:

    E4M3    4 exponent bits with bias 7, 3 mantissa bits, subnormals down to 2**-9, largest number 448; 0x7F is NaN
    E5M2    5 exponent bits with bias 15, 2 mantissa bits, subnormals down to 2**-16, largest number 57344; 0x7C is
            infinity, 0x7D to 0x7F are NaN

Quantising never produces the codes of infinity and NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgelm.quant.primitives import as_float32, fill, not_finite
from edgelm.quant.scheme import Fp8Scheme
from edgelm.quant.tensor import QuantTensor
from edgelm.slices import slices

Floats = NDArray[np.float32]

_CHUNK = 1 << 18
"""Values quantised at once; a few arrays of this size fit into the second-level cache."""


@dataclass(frozen=True)
class Form:
    """An FP8 number format.

    Attributes:
        mantissa: Bits of the mantissa.
        bias: Bias of the exponent.
        top: Code of the largest finite number. Larger codes are infinity or NaN.
        infinity: Code of infinity; None if the format has none.
        table: The numbers of all 256 codes, float32.
    """

    mantissa: int
    bias: int
    top: int
    infinity: int | None = None
    table: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        code = np.arange(256)
        magnitude_code = code & 0x7F
        exponent, fraction = magnitude_code >> self.mantissa, code & (1 << self.mantissa) - 1
        step = np.exp2(np.maximum(exponent, 1) - float(self.bias + self.mantissa))
        magnitude = (fraction + np.where(exponent == 0, 0, 1 << self.mantissa)) * step
        magnitude[magnitude_code > self.top] = np.nan
        if self.infinity is not None:
            magnitude[magnitude_code == self.infinity] = np.inf
        table = np.copysign(magnitude, np.where(code < 128, 1.0, -1.0)).astype(np.float32)
        object.__setattr__(self, "table", table)

    @property
    def largest(self) -> np.float32:
        """The largest finite number."""
        return np.float32(self.table[self.top])

    @property
    def smallest_normal(self) -> np.float32:
        """The smallest normal number."""
        return np.float32(2.0 ** (1 - self.bias))

    @property
    def tiny(self) -> np.float32:
        """A block with a smaller largest magnitude becomes zeros, since its scale would be a subnormal float32."""
        return np.float32(self.largest * 2.0**-126)


E4M3 = Form(mantissa=3, bias=7, top=0x7E)
E5M2 = Form(mantissa=2, bias=15, top=0x7B, infinity=0x7C)
FORMS: Mapping[str, Form] = {"e4m3": E4M3, "e5m2": E5M2}
"""The formats by the `form` of a scheme."""

LARGEST = E4M3.largest
"""The largest number of E4M3 (code 0x7E)."""


def decode(codes: NDArray[np.uint8], form: Form = E4M3) -> Floats:
    """Return the exact numbers of codes, float32; same shape."""
    return form.table[codes]


def encode(values: Floats, form: Form = E4M3) -> NDArray[np.uint8]:
    """Round finite values to codes, uint8 of the same shape.

    Rounding is to the nearest number, ties to the even code. Larger magnitudes become the largest number, and zero
    keeps its sign.
    """
    shift = np.uint32(23 - form.mantissa)
    sign = values.view(np.uint32) >> np.uint32(24) & np.uint32(0x80)
    magnitude = np.minimum(np.abs(values), form.largest)
    # Add just under half a unit of the last mantissa bit, plus that bit: ties go to even, and a carry runs into the
    # exponent, which is right.
    bits = magnitude.view(np.uint32)
    half = np.uint32((1 << int(shift) - 1) - 1)
    rebias = np.uint32(127 - form.bias << form.mantissa)
    normal = (bits + half + (bits >> shift & np.uint32(1)) >> shift) - rebias
    # The smallest normal number is 2**mantissa subnormal steps, which is also its code.
    step = np.float32(form.smallest_normal * 2.0**-form.mantissa)
    subnormal = np.rint(np.minimum(magnitude, form.smallest_normal) / step).astype(np.uint32)
    codes: NDArray[np.uint8] = (np.where(magnitude < form.smallest_normal, subnormal, normal) | sign).astype(np.uint8)
    return codes


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16], scheme: Fp8Scheme, *, name: str = "weight"
) -> QuantTensor:
    """Quantise a matrix to FP8: scale = absmax / largest number, code = nearest to w / scale.

    Args:
        weight: [N, K], float32, or bfloat16 as uint16.
        scheme: The scheme; the result has `scheme.effective(K)`.
        name: Name of the tensor in errors.

    Raises:
        CheckpointError: A weight is not finite.
    """
    rows, columns = weight.shape
    scheme, form = scheme.effective(columns), FORMS[scheme.form]
    if columns != (width := scheme.padded(columns)):
        return quantize(fill(weight, width), scheme, name=name).cut(columns)
    groups = scheme.groups(columns)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, groups), np.float32)
    for part in slices(rows, _CHUNK // max(columns, 1)):
        values = as_float32(weight[part])
        finite = np.isfinite(values)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise not_finite(name, part.start + row, column, float(values[row, column]))
        blocks = np.ascontiguousarray(values).reshape(part.stop - part.start, groups, -1)
        largest = np.abs(blocks).max(axis=2, initial=0.0)
        scale: Floats = np.where(largest < form.tiny, np.float32(0), largest / form.largest).astype(np.float32)
        scales[part] = scale
        # A block of zeros is divided by one, which gives codes of zero.
        divisor: Floats = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        codes[part] = encode(blocks / divisor, form).reshape(-1, columns)
    return QuantTensor(codes, scales, None, scheme, (rows, columns))


def dequantize(tensor: QuantTensor) -> Floats:
    """Return float32 [N, K] = value(code) * scale, rounded once.

    Raises:
        TypeError: The codes are integers.
    """
    if not isinstance(tensor.scheme, Fp8Scheme):
        raise TypeError(f"the codes of {tensor.scheme.name} are integers")
    rows, columns = tensor.shape
    if columns != tensor.scheme.padded(columns):
        return np.ascontiguousarray(dequantize(tensor.padded())[:, :columns])
    values = decode(tensor.codes, FORMS[tensor.scheme.form])
    values = values.reshape(rows, tensor.scales.shape[1], tensor.scheme.group_size(columns))
    values *= tensor.scales[:, :, None]
    return values.reshape(rows, columns)
