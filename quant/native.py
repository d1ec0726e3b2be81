"""The quantisation kernel where it was compiled, `primitives` where it was not; the results are equal bit for bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.quant import primitives
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor


def quantize(
    weight: NDArray[np.float32] | NDArray[np.uint16],
    scheme: Scheme,
    *,
    name: str = "weight",
    threads: int | None = None,
) -> QuantTensor:
    """Quantise a matrix [N, K] as `primitives.quantize` does."""
    del threads
    return primitives.quantize(weight, scheme, name=name)


def dequantize(tensor: QuantTensor, *, threads: int | None = None) -> NDArray[np.float32]:
    """Return float32 [N, K] as `primitives.dequantize` does."""
    del threads
    return primitives.dequantize(tensor)
