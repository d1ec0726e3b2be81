"""Pack quantised tensors into the layouts of ONNX Runtime's own operators, without rounding again.

A row of a `QuantTensor` has K codes, G scales and perhaps G zero points. An operator takes one block size and one bit
width per weight. The functions here only repeat, upcast or reorder, so that the operator computes
`(code - zero) * scale` with the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.formats import BlockFormat, block_of
from edgelm.bundle.formats import block_format as common_format
from edgelm.export.packing import repack
from edgelm.quant.primitives import pack
from edgelm.quant.tensor import QuantTensor

__all__ = ["BlockFormat", "block_of", "codes_in", "common_format", "interleave", "scales_in", "zeros_in"]


def codes_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.uint8]:
    """Return the codes with the format's bits, uint8 [N, K * bits / 8]."""
    return repack.codes_in(tensor, fmt.bits)


def scales_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.float32]:
    """Return the scales, float32 [N, K / block], each repeated for every block of its group."""
    return repack.scales_in(tensor, fmt.block).astype(np.float32)


def zeros_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.uint8]:
    """Return the zero points packed along the blocks, uint8 [N, ceil(K / block * bits / 8)], low nibble first."""
    return pack(repack.zeros_in(tensor, fmt.block, fmt.bits), fmt.bits)


def interleave(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Interleave rows for the fused SwiGLU of MoE and QMoE: gate 0, up 0, gate 1, ...; two [N, X] become [2N, X]."""
    return np.stack([gate, up], axis=1).reshape(2 * gate.shape[0], -1)
