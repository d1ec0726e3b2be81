"""From quantised tensors to the layouts of ONNX Runtime's operators, without another rounding.

A `QuantTensor` row is `K` codes, `G` scales and perhaps `G` zero points. The operators want one block size and one
width per weight; every function here only repeats, upcasts or reorders what is there, so that the operator computes
exactly `(code - zero) * scale` with the same numbers.
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

# MLAS has n-bit kernels for these block sizes; a scale per row is stored as equal scales of blocks of this many.
ROW_BLOCK = 128


@dataclass(frozen=True)
class BlockFormat:
    """What an n-bit operator is told: width, weights per block, and whether zero points are stored."""

    bits: int
    block: int
    zeros: bool

    def code_bytes(self, columns: int) -> int:
        """Bytes of one row's codes."""
        return columns * self.bits // 8

    def blocks(self, columns: int) -> int:
        """Blocks (and scales) of one row."""
        return columns // self.block

    def zero_bytes(self, columns: int) -> int:
        """Bytes of one row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


def width_field(name: str) -> str:
    """The field of config.json that says how many columns a matrix has."""
    if name.endswith("down_proj.weight"):
        return "intermediate_size"
    return "num_attention_heads * head_dim" if name.endswith("o_proj.weight") else "hidden_size"


def block_of(scheme: Scheme, columns: int, name: str = "the matrix") -> int:
    """Weights per block in which a row of `columns` weights of this (effective) scheme is stored.

    Raises:
        ExportError: no block fits the row.
    """
    largest = columns & -columns  # power of two that divides the row
    if largest < MIN_GROUP:
        raise ExportError(
            f"{name} is {scheme.name} with rows of {columns} ({width_field(name)} in config.json): ONNX Runtime's own "
            f"operators take quantised rows of a multiple of {MIN_GROUP} alone. Export with --target cpu --ops native, "
            "which takes rows of any width, or keep such matrices float in the recipe"
        )
    return min(largest, ROW_BLOCK) if scheme.group is None else scheme.group


def common_format(schemes: Sequence[tuple[str, Scheme, int]], largest: int | None = None) -> BlockFormat:
    """The one format that holds all of `(name, scheme, columns)` exactly.

    It has the widest codes, the smallest block, and zeros if any has. A group above `largest` is stored as several
    blocks of that many weights with equal scales.

    Raises:
        ExportError: no block fits the rows of one.
    """
    block = min(block_of(scheme, columns, name) for name, scheme, columns in schemes)
    return BlockFormat(
        bits=max(scheme.bits for _, scheme, _ in schemes),
        block=block if largest is None else min(block, largest),
        zeros=not all(scheme.symmetric for _, scheme, _ in schemes),
    )


def codes_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.uint8]:
    """Codes [N, K * bits / 8] at the format's width."""
    return repack.codes_in(tensor, fmt.bits)


def scales_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.float32]:
    """Scales float32 [N, K / block]: each repeated over the blocks that its group covers."""
    return repack.scales_in(tensor, fmt.block).astype(np.float32)


def zeros_in(tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.uint8]:
    """Zero points packed along the blocks, [N, ceil(K / block * bits / 8)], low nibble first."""
    return pack(repack.zeros_in(tensor, fmt.block, fmt.bits), fmt.bits)


def interleave(gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """Rows gate 0, up 0, gate 1, up 1, ... as the fused SwiGLU of (Q)MoE reads them: [N, X], [N, X] -> [2N, X]."""
    return np.stack([gate, up], axis=1).reshape(2 * gate.shape[0], -1)
