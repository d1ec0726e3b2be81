"""Quantise and dequantise with any scheme: the one place that asks which kind of numbers a scheme has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.quant import fp8, native
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme
from edgelm.quant.tensor import QuantTensor


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16],
    scheme: AnyScheme,
    *,
    name: str = "weight",
    threads: int | None = None,
) -> QuantTensor:
    """Quantise a matrix [N, K], float32 or bfloat16 as uint16.

    Args:
        weight: [N, K]; rows may be apart, values within a row are copied together if they are.
        scheme: the scheme wanted; the result's is `scheme.effective(K)`.
        name: what errors call the tensor.
        threads: for the compiled kernel of integers; None is every core this process may use.

    Raises:
        CheckpointError: a weight is not finite, or too large for the scheme's scale.
    """
    if isinstance(scheme, Fp8Scheme):
        return fp8.quantize(weight, scheme, name=name)
    assert isinstance(scheme, Scheme), scheme
    return native.quantize(weight, scheme, name=name, threads=threads)


def dequantize(tensor: QuantTensor, *, threads: int | None = None) -> NDArray[np.float32]:
    """Return the float32 values [N, K] that a device computes with."""
    if isinstance(tensor.scheme, Fp8Scheme):
        return fp8.dequantize(tensor)
    return native.dequantize(tensor, threads=threads)


def rounded(
    weight: NDArray[np.float32], scheme: AnyScheme, *, name: str = "weight", threads: int | None = None
) -> NDArray[np.float32]:
    """Return the float32 values [N, K] that a matrix has once it is quantised; arguments as of `quantize`."""
    return dequantize(quantize(weight, scheme, name=name, threads=threads), threads=threads)
