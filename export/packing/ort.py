"""Pack quantised tensors into the layouts of ONNX Runtime's own operators, without rounding again.

A row of a `QuantTensor` has K codes, G scales and perhaps G zero points. An operator takes one block size and one bit
width per weight. The functions here only repeat, upcast or reorder, so that the operator computes
`(code - zero) * scale` with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ExportError
from edgelm.export.packing import repack
from edgelm.quant.primitives import pack
from edgelm.quant.scheme import MIN_GROUP, Scheme
from edgelm.quant.tensor import QuantTensor

# MLAS has n-bit kernels for this block size. One scale per row is stored as equal scales of such blocks.
ROW_BLOCK = 128


@dataclass(frozen=True)
class BlockFormat:
    """Format of an n-bit operator's weight.

    Attributes:
        bits: Bits of a code.
        block: Weights that share a scale.
        zeros: Whether zero points are stored.
    """

    bits: int
    block: int
    zeros: bool

    def code_bytes(self, columns: int) -> int:
        """Return the bytes of one row's codes."""
        return columns * self.bits // 8

    def blocks(self, columns: int) -> int:
        """Return the number of blocks, and so of scales, in one row."""
        return columns // self.block

    def zero_bytes(self, columns: int) -> int:
        """Return the bytes of one row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


def width_field(name: str) -> str:
    """Return the field of config.json that determines the number of columns of a matrix, for messages."""
    if name.endswith("down_proj.weight"):
        return "intermediate_size"
    return "num_attention_heads * head_dim" if name.endswith("o_proj.weight") else "hidden_size"


def block_of(scheme: Scheme, columns: int, name: str = "the matrix") -> int:
    """Return the weights per block for rows of `columns` weights of an effective scheme.

    Raises:
        ExportError: No supported block divides the row.
    """
    largest = columns & -columns  # power of two that divides the row
    if largest < MIN_GROUP:
        raise ExportError(
            f"{name} is {scheme.name} with rows of {columns} ({width_field(name)} in config.json), but ONNX Runtime's "
            f"own operators support quantised rows only in multiples of {MIN_GROUP}. Export with --target cpu --ops "
            "native, which supports any width, or keep such matrices float in the recipe"
        )
    return min(largest, ROW_BLOCK) if scheme.group is None else scheme.group


def common_format(schemes: Sequence[tuple[str, Scheme, int]], largest: int | None = None) -> BlockFormat:
    """Return the format that holds all matrices `(name, scheme, columns)` exactly.

    It has the most bits and the smallest block of all, and zero points if any has them. A group larger than `largest`
    is stored as several blocks of that many weights with equal scales.

    Raises:
        ExportError: No supported block divides the rows of one matrix.
    """
    block = min(block_of(scheme, columns, name) for name, scheme, columns in schemes)
    return BlockFormat(
        bits=max(scheme.bits for _, scheme, _ in schemes),
        block=block if largest is None else min(block, largest),
        zeros=not all(scheme.symmetric for _, scheme, _ in schemes),
    )


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
