"""What a budget is spent on: matrices that have one type in a bundle, and the bytes of each in any scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelm.bundle.cpu_layout import HEADER_BYTES, TILE, Kind, PackedMatrix, Scales, aligned, stored_group
from edgelm.quant.scheme import AnyScheme, Scheme

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

PAGE = 4096
"""Where tensors of a bundle's weights file start: at multiples of this."""

# Matrices of a layer that share an input and are one product in the native operators, which store them in one type.
_JOINED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate+up", "up_proj": "gate+up"}
KINDS = ("embedding", "head", "qkv", "o", "gate+up", "down", "expert gate+up", "expert down")


@dataclass(frozen=True)
class Unit:
    """Matrices that get one scheme.

    Attributes:
        kind: one of `KINDS`; a head that is tied to the embedding is a "head".
        tensors: names and shapes (N, K); all have the same K.
        layer: its index, None for the tables of the vocabulary.
        expert: its index, None outside experts.
    """

    kind: str
    tensors: Mapping[str, tuple[int, int]]
    layer: int | None = None
    expert: int | None = None

    @property
    def weights(self) -> int:
        """Weights of all its matrices."""
        return sum(rows * columns for rows, columns in self.tensors.values())

    @property
    def columns(self) -> int:
        """Values in a row, K."""
        return next(iter(self.tensors.values()))[1]

    def effective(self, scheme: AnyScheme) -> AnyScheme:
        """Return `scheme` with the group that fits the rows."""
        return scheme.effective(self.columns)

    def nbytes(self, scheme: AnyScheme | None, float_bytes: int = 2) -> int:
        """Bytes in a native bundle: header, and whole tiles of 32 rows of codes, scales and zero points.

        `scheme` None is float, `float_bytes` a weight. Joined gate and up are tiles of their own each; q, k and v are
        stacked first.
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


def find_units(shapes: Mapping[str, Sequence[int]]) -> list[Unit]:
    """Group the matrices of a checkpoint; routers and vectors stay float. By layer, kind, expert."""
    found: dict[tuple[str, int | None, int | None], dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or name.endswith(".mlp.gate.weight"):
            continue
        parts = name.split(".")
        layer = expert = None
        if name in (EMBEDDING, HEAD):
            kind = "head" if name == HEAD or HEAD not in shapes else "embedding"
        else:
            matrix = parts[-2]
            layer = int(parts[2])
            kind = _JOINED.get(matrix, matrix.removesuffix("_proj"))
            if "experts" in parts:
                expert = int(parts[parts.index("experts") + 1])
                kind = f"expert {kind}"
        found.setdefault((kind, layer, expert), {})[name] = (shape[0], shape[1])
    units = [Unit(kind, tensors, layer, expert) for (kind, layer, expert), tensors in found.items()]
    return sorted(
        units, key=lambda unit: (-1 if unit.layer is None else unit.layer, KINDS.index(unit.kind), unit.expert or 0)
    )


def fixed_bytes(config: Any, shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of a native bundle's weights file besides the units: what stays float32, tables of positions and padding.

    Every tensor starts at a page, so up to a page of each is padding: all of it is counted.
    """
    layers: int = config.num_hidden_layers
    experts: int = getattr(config, "num_experts", 0)
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    routers = [shape for name, shape in shapes.items() if name.endswith(".mlp.gate.weight")]
    of_routers = sum(HEADER_BYTES + -(-rows // TILE) * TILE * columns * 4 for rows, columns in routers)
    rotary: int = 2 * config.max_position_embeddings * (config.head_dim // 2) * 4
    of_experts = (HEADER_BYTES + 16 * experts) * layers if experts else 0
    products = layers * (3 if experts else 4) + 3  # the tables of the vocabulary, one of which has two planes
    tensors = products + len(routers) + sum(len(shape) == 1 for shape in shapes.values()) + 2
    return 4 * vectors + of_routers + rotary + of_experts + tensors * PAGE
