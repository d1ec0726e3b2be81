"""Read FP8 matrices with the scales that checkpoints have: per matrix, per row, per group, or per block of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelm.errors import CheckpointError
from edgelm.quant.formats.base import FLOATS, Matrix, float32_of, in_groups, require, stored_groups
from edgelm.quant.formats.config import ADVICE
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

E4M3 = "F8_E4M3"
"""The safetensors name of the only supported FP8 type."""


def check_scales(checkpoint: Checkpoint, matrix: Matrix, part: str, block_rows: int | None = None) -> None:
    """Check the shape of scales: per matrix, per row, per group of a row, or per block of `block_rows` rows.

    Raises:
        CheckpointError: They are missing, or have another shape or type.
    """
    rows, groups = matrix.shape[0], stored_groups(matrix)
    shapes: tuple[tuple[int, ...], ...]
    if block_rows is not None:
        shapes = ((-(-rows // block_rows), groups),)
    elif matrix.written.group is not None:
        shapes = ((rows, groups),)
    else:
        shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
    require(checkpoint, matrix, part, shapes, FLOATS)


def scale_rows(checkpoint: Checkpoint, key: str, rows: slice, block_rows: int = 1) -> slice | None:
    """Return the rows of the stored scales that apply to `rows`; None if there is one scale for the whole matrix."""
    shape = checkpoint.tensors[key].shape
    if shape in ((), (1,), (1, 1)):
        return None
    return slice(rows.start // block_rows, -(-rows.stop // block_rows))


def read_fp8(checkpoint: Checkpoint, matrix: Matrix, part: str, rows: slice, block_rows: int = 1) -> QuantTensor:
    """Read rows of a matrix of E4M3 codes: w = value(code) * scale, with scales repeated over rows and groups.

    Args:
        checkpoint: The checkpoint.
        matrix: The matrix; its part `weight` holds the codes [N, K].
        part: Name of the part that holds the scales.
        rows: The rows, with start and stop.
        block_rows: Rows that share a scale.

    Raises:
        CheckpointError: A code is NaN, or a scale is not finite.
    """
    codes = checkpoint.read_raw(matrix.parts["weight"], rows)
    nan = codes & np.uint8(0x7F) == 0x7F
    if nan.any():
        row, column = (int(i) for i in np.argwhere(nan)[0])
        raise CheckpointError(
            f"{matrix.name}[{rows.start + row}, {column}] is NaN, but weights must be finite: the checkpoint is "
            f"damaged, so fetch it again, or {ADVICE}"
        )
    key = matrix.parts[part]
    served = scale_rows(checkpoint, key, rows, block_rows)
    values = float32_of(checkpoint, key, served)
    count = codes.shape[0]
    if served is None:
        scales = np.full((count, 1), values.reshape(-1)[0], np.float32)
    else:
        first = rows.start - served.start * block_rows
        values = values.reshape(values.shape[0], -1)
        scales = np.repeat(values, block_rows, axis=0)[first : first + count]
    return QuantTensor(codes, in_groups(scales, matrix), None, matrix.scheme, (count, matrix.shape[1]))
