"""FP8: a matrix to quantised values with one float32 scale for each block, and back. Pure numpy.

The numbers are those of the OCP 8-bit floating point specification, revision 1.0:

    E4M3    4 bits of exponent with bias 7, 3 of mantissa, subnormals down to 2**-9, the largest 448; 0x7F is NaN
    E5M2    5 bits of exponent with bias 15, 2 of mantissa, subnormals down to 2**-16, the largest 57344; 0x7C is
            infinity, 0x7D to 0x7F are NaN

Infinities and NaNs have codes that no weight becomes.
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
"""Values quantised at once: a few arrays of this size stay in the second-level cache."""


@dataclass(frozen=True)
class Form:
    """One format of FP8.

    Attributes:
        mantissa: bits of it.
        bias: of the exponent.
        top: code of the largest finite number.
        infinity: code of infinity, None where there is none; codes from it, or past `top`, are no numbers.
        table: the 256 numbers by their code, float32.
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
        """The smallest number with all bits of mantissa."""
        return np.float32(2.0 ** (1 - self.bias))

    @property
    def tiny(self) -> np.float32:
        """A block whose largest magnitude is below this is all zeros: its scale would be subnormal, too coarse."""
        return np.float32(self.largest * 2.0**-126)


E4M3 = Form(mantissa=3, bias=7, top=0x7E)
E5M2 = Form(mantissa=2, bias=15, top=0x7B, infinity=0x7C)
FORMS: Mapping[str, Form] = {"e4m3": E4M3, "e5m2": E5M2}
"""By the `form` of a scheme."""

LARGEST = E4M3.largest
"""The largest number of E4M3, code 0x7E."""


def decode(codes: NDArray[np.uint8], form: Form = E4M3) -> Floats:
    """Return the numbers that codes stand for, exactly; same shape."""
    return form.table[codes]


def encode(values: Floats, form: Form = E4M3) -> NDArray[np.uint8]:
    """Round finite values to the nearest number, ties to the even code, past the largest to it; same shape, uint8.

    The sign of zero is kept.
    """
    shift = np.uint32(23 - form.mantissa)
    sign = values.view(np.uint32) >> np.uint32(24) & np.uint32(0x80)
    magnitude = np.minimum(np.abs(values), form.largest)
    # Half a unit of the last mantissa bit less the tie, plus that bit: the carry runs into the exponent as it should.
    bits = magnitude.view(np.uint32)
    half = np.uint32((1 << int(shift) - 1) - 1)
    rebias = np.uint32(127 - form.bias << form.mantissa)
    normal = (bits + half + (bits >> shift & np.uint32(1)) >> shift) - rebias
    # The smallest normal number is 2**mantissa steps of the subnormals, and has that code.
    step = np.float32(form.smallest_normal * 2.0**-form.mantissa)
    subnormal = np.rint(np.minimum(magnitude, form.smallest_normal) / step).astype(np.uint32)
    codes: NDArray[np.uint8] = (np.where(magnitude < form.smallest_normal, subnormal, normal) | sign).astype(np.uint8)
    return codes


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16], scheme: Fp8Scheme, *, name: str = "weight"
) -> QuantTensor:
    """Quantise a matrix [N, K] (float32, or bfloat16 as uint16): scale = absmax / largest, code = nearest to w / scale.

    Args:
        weight: [N, K].
        scheme: the scheme wanted; the result's is `scheme.effective(K)`.
        name: what errors call the tensor.

    Raises:
        CheckpointError: a weight is not finite.
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
        # A block of zeros has codes of zero: divided by one, it rounds to them.
        divisor: Floats = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        codes[part] = encode(blocks / divisor, form).reshape(-1, columns)
    return QuantTensor(codes, scales, None, scheme, (rows, columns))


def dequantize(tensor: QuantTensor) -> Floats:
    """Return float32 [N, K] = value(code) * scale, each product rounded once.

    Raises:
        TypeError: the codes are integers.
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
