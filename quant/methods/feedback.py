"""Round a block of columns with error feedback, with the compiled kernel or, if there is none, with torch.

Both sum in the same order. On some machines torch fuses operations, which can change a tie.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from edgelm.quant import native
from edgelm.quant.methods.grids import Grid, inverse

LARGEST_BLOCK = 128
"""Largest number of columns in a block: EDGELM_FEEDBACK_COLUMNS in quantize.h."""


@dataclass(frozen=True)
class Block:
    """Views of some columns of a matrix, transposed: float32 [columns, rows], rows contiguous.

    Attributes:
        weights: The float weights.
        values: Output: values of the codes.
        error: Output: weights - values * scale; `recode_block` also reads it.
        scale: Scale of each row, [rows].
        lowest: Lowest value of each row, [rows], see `Grid.nearest`.
    """

    weights: Tensor
    values: Tensor
    error: Tensor
    scale: Tensor
    lowest: Tensor


def round_block(block: Block, target: Tensor, feedback: Tensor, grid: Grid) -> None:
    """Round `target` [columns, rows] column by column; add feedback[j, k] times column j's error to target[k]."""
    if not _compiled(block, target, feedback, grid, recode=False):
        inverted = inverse(block.scale)
        target = target.clone()
        for j in range(len(target)):
            block.values[j] = grid.nearest(target[j], inverted, block.lowest)
            block.error[j] = block.weights[j] - block.values[j] * block.scale
            target[j + 1 :] += feedback[j, j + 1 :, None] * block.error[j]


def recode_block(block: Block, pull: Tensor, hessian: Tensor, grid: Grid) -> None:
    """Set each column in turn to the value of least error while all others stay: one step of coordinate descent.

    Args:
        block: The columns, with values and errors of the present codes.
        pull: H error, [columns, rows], summed over all columns of the matrix.
        hessian: H of the block's columns, [columns, columns].
        grid: The scheme's values.
    """
    if not _compiled(block, pull, hessian, grid, recode=True):
        inverted = inverse(block.scale)
        pull = pull.clone()
        for j in range(len(pull)):
            wanted = (block.weights[j] - block.error[j]) + pull[j] / hessian[j, j]
            block.values[j] = grid.nearest(wanted, inverted, block.lowest)
            new = block.weights[j] - block.values[j] * block.scale
            pull[j + 1 :] += hessian[j, j + 1 :, None] * (new - block.error[j])
            block.error[j] = new


def fit_scale(weights: Tensor, importance: Tensor, trials: Tensor, lowest: Tensor, grid: Grid) -> Tensor:
    """Return, for each row, the scale with the least sum of importance * (weight - value * scale)^2.

    Args:
        weights: float32 [columns, rows].
        importance: float32 [columns].
        trials: Trial scales, float32 [T, rows]. Each is refitted to its values by least squares before it is compared.
        lowest: Lowest values, float32 [rows], see `Grid.nearest`.
        grid: The scheme's values.

    Returns:
        Scales float32 [rows], rounded to their stored type.
    """
    kernel = native.library()
    if kernel is None:
        return _fit_with_torch(weights, importance, trials, lowest, grid)
    columns, rows = weights.shape
    assert weights.stride() == (rows, 1), "weights must be contiguous"
    arrays = [array.contiguous() for array in (importance, trials, lowest)]
    scale = torch.empty(rows)
    arguments = _FitArguments(
        rows=rows,
        columns=columns,
        stride=rows,
        weights=weights.data_ptr(),
        importance=arrays[0].data_ptr(),
        trials=arrays[1].data_ptr(),
        trial_count=len(trials),
        lowest=arrays[2].data_ptr(),
        scale=scale.data_ptr(),
        range=grid.range,
        numbers=grid.numbers,
        half=grid.half,
        threads=torch.get_num_threads(),
    )
    status = kernel.edgelm_fit(ctypes.byref(arguments))
    assert status == 0, f"the kernel that fits scales returned status {status}"
    return scale


def _fit_with_torch(weights: Tensor, importance: Tensor, trials: Tensor, lowest: Tensor, grid: Grid) -> Tensor:
    best = torch.full(weights.shape[1:], torch.inf)
    found = torch.zeros_like(best)
    for trial in trials:
        value = grid.nearest(weights, inverse(trial), lowest)
        dot = (importance[:, None] * weights * value).sum(0)
        norm = (importance[:, None] * value * value).sum(0)
        fitted = grid.stored(torch.where(norm > 0, dot / norm, 0.0))
        left = weights - grid.nearest(weights, inverse(fitted), lowest) * fitted
        error = (importance[:, None] * left.square()).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, fitted, found)
    return found


class _FitArguments(ctypes.Structure):
    # struct edgelm_fit_arguments
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("trials", ctypes.c_void_p),
        ("trial_count", ctypes.c_int64),
        ("lowest", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("range", ctypes.c_float),
        ("numbers", ctypes.c_int32),
        ("half", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


class _Arguments(ctypes.Structure):
    # struct edgelm_feedback_arguments
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("coupling", ctypes.c_void_p),
        ("coupling_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
        ("lowest", ctypes.c_void_p),
        ("range", ctypes.c_float),
        ("numbers", ctypes.c_int32),
        ("recode", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


def _compiled(block: Block, target: Tensor, coupling: Tensor, grid: Grid, *, recode: bool) -> bool:
    """Run the compiled kernel; return False if there is none."""
    kernel = native.library()
    if kernel is None:
        return False
    columns, rows = target.shape
    inverted = inverse(block.scale)
    arrays = (block.weights, target, block.values, block.error)
    assert all(array.stride() == (rows, 1) and array.dtype == torch.float32 for array in arrays), "contiguous float32"
    assert coupling.stride(1) == 1 and columns <= LARGEST_BLOCK
    arguments = _Arguments(
        rows=rows,
        columns=columns,
        stride=rows,
        weights=block.weights.data_ptr(),
        target=target.data_ptr(),
        values=block.values.data_ptr(),
        error=block.error.data_ptr(),
        coupling=coupling.data_ptr(),
        coupling_stride=coupling.stride(0),
        scale=block.scale.data_ptr(),
        inverse=inverted.data_ptr(),
        lowest=block.lowest.data_ptr(),
        range=grid.range,
        numbers=grid.numbers,
        recode=recode,
        threads=torch.get_num_threads(),
    )
    status = kernel.edgelm_feedback(ctypes.byref(arguments))
    assert status == 0, f"the feedback kernel returned status {status}"
    return True
