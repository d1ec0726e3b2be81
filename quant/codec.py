"""Quantise and dequantise with any scheme. Only this module distinguishes integer and FP8 schemes."""

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
    """Quantise a matrix, each value to the nearest code.

    Args:
        weight: [N, K], float32, or bfloat16 as uint16. Rows may be strided; other strides cause a copy.
        scheme: The scheme; the result has `scheme.effective(K)`.
        name: Name of the tensor in errors.
        threads: Threads of the compiled integer kernel; None for every core that this process may use.

    Raises:
        CheckpointError: A weight is not finite, or too large for the scheme's scale.
    """
    if isinstance(scheme, Fp8Scheme):
        return fp8.quantize(weight, scheme, name=name)
    assert isinstance(scheme, Scheme), scheme
    return native.quantize(weight, scheme, name=name, threads=threads)


def dequantize(tensor: QuantTensor, *, threads: int | None = None) -> NDArray[np.float32]:
    """Return the float32 values [N, K] of a quantised matrix, which a device computes with."""
    if isinstance(tensor.scheme, Fp8Scheme):
        return fp8.dequantize(tensor)
    return native.dequantize(tensor, threads=threads)


def rounded(
    weight: NDArray[np.float32], scheme: AnyScheme, *, name: str = "weight", threads: int | None = None
) -> NDArray[np.float32]:
    """Quantise and dequantise a matrix: return float32 [N, K]. Arguments as for `quantize`."""
    return dequantize(quantize(weight, scheme, name=name, threads=threads), threads=threads)
