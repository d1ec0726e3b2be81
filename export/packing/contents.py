"""Describe the tensors of the weights file for the manifest (`edgelm.bundle.contents`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgelm.bundle.contents import Contents, Layout
from edgelm.bundle.cpu_layout import TILE, Kind, PackedMatrix, Scales
from edgelm.bundle.gpu_layout import ROWS, GpuMatrix

Held = Mapping[str, int]
"""Tensors of the checkpoint that a stored tensor holds, in order, each with its number of rows."""


def array(
    dims: Sequence[int], dtype: np.dtype[Any], held: Held | None = None, interleave: int | None = None
) -> Contents:
    """Describe a plain array, stored row by row. dtype uint16 means bfloat16, which numpy does not have."""
    name = "bfloat16" if dtype == np.uint16 else dtype.name
    return Contents(Layout.ARRAY, name, tuple(dims), interleave=interleave, **_held(held))


def packed(matrix: PackedMatrix, held: Held, layout: Layout = Layout.PACKED) -> Contents:
    """Describe a matrix packed for the native operators, or its low nibbles."""
    return Contents(
        layout,
        _dtype(matrix.kind),
        (matrix.rows, matrix.columns),
        _group(matrix),
        matrix.zeros,
        TILE if matrix.swiglu else None,
        **_held(held),
    )


def packed_experts(matrices: Sequence[PackedMatrix], held: Held) -> Contents:
    """Describe a layer's experts packed for the native operators; `matrices` are gate+up and down of each expert."""
    dtypes = {_dtype(matrix.kind) for matrix in matrices}
    groups = {_group(matrix) for matrix in matrices}
    down = matrices[1]
    return Contents(
        Layout.PACKED_EXPERTS,
        dtypes.pop() if len(dtypes) == 1 else "mixed",
        (len(matrices) // 2, down.columns, down.rows),
        groups.pop() if len(groups) == 1 else None,
        any(matrix.zeros for matrix in matrices),
        TILE,
        **_held(held),
    )


def gpu(matrix: GpuMatrix, held: Held) -> Contents:
    """Describe a blob packed for the GPU kernels: one matrix, or one kind of matrix of all experts of a layer."""
    outer = () if matrix.count == 1 else (matrix.count,)
    return Contents(
        Layout.GPU,
        matrix.kind.label,
        (*outer, matrix.rows, matrix.columns),
        matrix.group if matrix.kind.scale_bytes else None,
        matrix.zeros,
        ROWS // 2 if matrix.swiglu else None,
        **_held(held),
    )


def portable(
    layout: Layout, dtype: str, shape: Sequence[int], group: int, zeros: bool, interleave: int | None, held: Held
) -> Contents:
    """Describe the codes, scales or zero points of quantised matrices for ONNX Runtime's own operators."""
    return Contents(layout, dtype, tuple(shape), group, zeros, interleave, **_held(held))


def _dtype(kind: Kind) -> str:
    return Kind.INT8.label if kind is Kind.INT8_SPLIT else kind.label


def _group(matrix: PackedMatrix) -> int | None:
    """Return how many values of a row share a scale, without the padding at a row's end."""
    return min(matrix.group, matrix.columns) if matrix.scales is not Scales.NONE else None


def _held(held: Held | None) -> dict[str, Any]:
    return {} if held is None else {"matrices": tuple(held), "rows": tuple(held.values())}
