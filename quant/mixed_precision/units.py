"""Units of mixed precision: matrices that share a scheme, and their bytes in each scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgelm.bundle.cpu_layout import HEADER_BYTES, TILE, Kind, PackedMatrix, Scales, aligned, stored_group
from edgelm.models.spec import EMBEDDING, HEAD, Decoder, MoE
from edgelm.quant.scheme import AnyScheme, Scheme

PAGE = 4096
"""Tensors of a bundle's weights file start at multiples of this."""

# Matrices of a layer with the same input. They are one matmul in the native operators, which store them in one type.
_JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate+up", "up": "gate+up"}
KINDS = ("embedding", "head", "qkv", "o", "gate+up", "down", "expert gate+up", "expert down")


@dataclass(frozen=True)
class Unit:
    """Matrices that share a scheme.

    Attributes:
        kind: One of `KINDS`; a tied head is a "head".
        tensors: Names and shapes (N, K), all with the same K.
        layer: Index of the layer; None for embedding and head.
        expert: Index of the expert; None outside experts.
    """

    kind: str
    tensors: Mapping[str, tuple[int, int]]
    layer: int | None = None
    expert: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights in its matrices."""
        return sum(rows * columns for rows, columns in self.tensors.values())

    @property
    def columns(self) -> int:
        """Values in a row, K."""
        return next(iter(self.tensors.values()))[1]

    def effective(self, scheme: AnyScheme) -> AnyScheme:
        """Return `scheme` with the group for rows of this width (`AnyScheme.effective`)."""
        return scheme.effective(self.columns)

    def nbytes(self, scheme: AnyScheme | None, float_bytes: int = 2) -> int:
        """Return the bytes in a native bundle: the header, and whole tiles of 32 rows of codes, scales and zero points.

        Scheme None means float, with `float_bytes` per weight. gate and up have separate tiles; q, k and v are stacked.
        """
        swiglu = self.kind.endswith("gate+up")
        rows, columns = sum(n for n, _ in self.tensors.values()), self.columns
        if scheme is None:
            kind = Kind.FLOAT32 if float_bytes == 4 else Kind.FLOAT16
            matrix = PackedMatrix(kind, Scales.NONE, False, swiglu, rows, columns, columns)
        else:
            scheme = self.effective(scheme)
            kind = Kind(scheme.bits) if isinstance(scheme, Scheme) else Kind.FP8
            scales = Scales.FLOAT16 if scheme.scale_dtype == np.float16 else Scales.FLOAT32
            group = stored_group(kind, scheme.group, columns)
            matrix = PackedMatrix(kind, scales, scheme.has_zeros, swiglu, rows, columns, group)
        return matrix.nbytes if self.expert is None else aligned(matrix.nbytes)


def find_units(decoder: Decoder) -> list[Unit]:
    """Group the matrices of a model into units, ordered by layer, kind and expert; routers stay float."""
    found: dict[tuple[str, int | None, int | None], dict[str, tuple[int, int]]] = {}
    for name, matrix in decoder.matrices.items():
        if matrix.role == "router":
            continue
        kind = _JOINED.get(matrix.role, matrix.role)
        if matrix.role == EMBEDDING and decoder.tied:
            kind = HEAD
        elif matrix.expert is not None:
            kind = f"expert {kind}"
        found.setdefault((kind, matrix.layer, matrix.expert), {})[name] = (matrix.rows, matrix.columns)
    units = [Unit(kind, tensors, layer, expert) for (kind, layer, expert), tensors in found.items()]
    return sorted(
        units, key=lambda unit: (-1 if unit.layer is None else unit.layer, KINDS.index(unit.kind), unit.expert or 0)
    )


def fixed_bytes(decoder: Decoder) -> int:
    """Return the bytes of a native bundle's weights file besides the units: float32 tensors, RoPE tables and padding.

    Every tensor starts at a page, so a page of padding is counted for each.
    """
    vectors = [shape[0] for shape in decoder.tensor_shapes.values() if len(shape) == 1]
    moes = [block.part for block in decoder.blocks if isinstance(block.part, MoE)]
    of_routers = sum(HEADER_BYTES + -(-moe.router.rows // TILE) * TILE * moe.router.columns * 4 for moe in moes)
    tables = {attention.rope for attention in decoder.attention}
    of_tables = len(tables) * 2 * decoder.context_length * (decoder.attention[0].head_dim // 2) * 4
    of_experts = sum(HEADER_BYTES + 16 * len(moe.experts) for moe in moes)
    # Matrices and packed experts of each layer, the embedding and the head, one of which may be split in two.
    stacked = sum(3 if decoder.moe(layer) else 4 for layer in range(decoder.num_layers)) + 3
    tensors = stacked + len(moes) + len(vectors) + 2 * len(tables)
    return 4 * sum(vectors) + of_routers + of_tables + of_experts + tensors * PAGE
