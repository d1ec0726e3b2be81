"""Quantise one matrix for its calibration inputs, with the method of least error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.errors import CheckpointError
from edgelm.quant import codec
from edgelm.quant.methods.feedback import fit_scale
from edgelm.quant.methods.gptq import Rounded, gptq
from edgelm.quant.methods.grids import Grid, grid, inverse
from edgelm.quant.methods.moments import Moments
from edgelm.quant.primitives import fill, pack
from edgelm.quant.recipe import AUTO, METHODS
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

DAMPING = 0.01
"""Damping of H: this share of the mean of its diagonal (GPTQ's choice), plus K / tokens, is added to the diagonal.

The second part reduces overfitting to few tokens: the KL is 3 % lower with four tokens per column, and 10 % with two
(docs/log.md).
"""
SWEEPS = 2
"""Sweeps of coordinate descent. The first reduces the error by about 13 %, the second by 4 %, further ones by 1 %."""
_JUDGED = 128
"""Rows on which methods are compared."""
_Method = Callable[[Tensor, Grid, Moments, int], Rounded]
_CHUNK = 4096  # rows processed at once, because a head of 256,000 rows would need gigabytes


@dataclass(frozen=True)
class Calibrated:
    """A calibrated matrix.

    Attributes:
        tensor: The quantised matrix.
        method: The method of `recipe.METHODS` whose values were kept.
        error: tr(dW H dW^T) / tr(W H W^T), the relative squared error of the outputs on the calibration inputs, for up
            to `_JUDGED` evenly spaced rows. Without inputs, the relative squared error of the weights.
        errors: The same for every method that was tried.
    """

    tensor: QuantTensor
    method: str
    error: float
    errors: dict[str, float]


@torch.no_grad()
def calibrate(
    weight: NDArray[np.float32],
    scheme: AnyScheme,
    moments: Moments | None,
    *,
    method: str = AUTO,
    name: str = "weight",
) -> Calibrated:
    """Quantise a matrix for inputs with given moments.

    Args:
        weight: float32 [N, K].
        scheme: The scheme; the result has `scheme.effective(K)`.
        moments: Moments of the inputs [tokens, K]. None, or moments of no tokens, means rounding to nearest.
        method: One of `recipe.METHODS`; "auto" tries all and keeps the best.
        name: Name of the matrix in errors.

    Raises:
        CheckpointError: A weight or a calibration input is not finite, or a weight is too large for the scheme's scale.
        ValueError: There is no such method, or the moments have another K.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is not one of {', '.join(METHODS)}")
    plain = codec.quantize(weight, scheme, name=name, threads=torch.get_num_threads())
    if moments is None or moments.tokens == 0:
        moments = None
    elif moments.hessian.shape[0] != weight.shape[1]:
        raise ValueError(f"{name} has rows of {weight.shape[1]}, its inputs have {moments.hessian.shape[0]} values")
    if moments is None or method == "rtn":
        error = _relative_error(weight, plain, moments)
        return Calibrated(plain, "rtn", error, {"rtn": error})
    if not bool(moments.hessian.isfinite().all()):
        raise CheckpointError(
            f"the calibration inputs of {name} are not finite: the checkpoint is damaged, so fetch it again"
        )
    # Rows are independent, so a sample of them is enough to compare methods.
    sample = slice(None, None, -(-len(weight) // _JUDGED))
    judged = np.ascontiguousarray(weight[sample])
    found = {"rtn": plain} if method == AUTO else {}
    if method != "search":
        found["gptq"] = _by_rows(weight, plain.scheme, moments, _gptq)
    errors = {which: _relative_error(judged, _rows(tensor, sample), moments) for which, tensor in found.items()}
    if method != "gptq":
        errors["search"] = _relative_error(judged, _by_rows(judged, plain.scheme, moments, _search), moments)
    best = min(errors, key=lambda which: errors[which])
    tensor = found[best] if best in found else _by_rows(weight, plain.scheme, moments, _search)
    return Calibrated(tensor, best, errors[best], errors)


def _gptq(weights: Tensor, numbers: Grid, moments: Moments, group: int) -> Rounded:
    damping = DAMPING + len(weights) / moments.tokens
    return gptq(weights, numbers, moments.factor(group, damping), group, SWEEPS)


def _search(weights: Tensor, numbers: Grid, moments: Moments, group: int) -> Rounded:
    """Round to nearest, with scales of least error weighted by the mean square of each column's inputs.

    This is what llama.cpp does with an importance matrix.
    """
    importance = moments.hessian.diagonal().clone()
    if not bool(importance.any()):
        importance.fill_(1.0)
    values, scales, lowest = [], [], []
    for part, each in zip(torch.split(weights, group), torch.split(importance, group), strict=True):
        trials, least = numbers.trials(part)
        scale = fit_scale(part, each, trials, least, numbers)
        values.append(numbers.nearest(part, inverse(scale), least))
        scales.append(scale)
        lowest.append(least)
    return Rounded(torch.cat(values), torch.stack(scales), torch.stack(lowest))


def _by_rows(weight: NDArray[np.float32], scheme: AnyScheme, moments: Moments, method: _Method) -> QuantTensor:
    rows, columns = weight.shape
    if columns != (width := scheme.padded(columns)):
        return _by_rows(fill(weight, width), scheme, moments.padded(width), method).cut(columns)
    group = scheme.group_size(columns)
    numbers = grid(scheme, columns)
    codes, scales, zeros = [], [], []
    for part in _chunks(weight):
        found = method(part.T.contiguous(), numbers, moments, group)
        lowest = found.lowest.repeat_interleave(group, dim=0)
        codes.append(numbers.codes(found.values, lowest).T.contiguous().numpy())
        scales.append(found.scales.T.contiguous().numpy().astype(scheme.scale_dtype))
        zeros.append((-found.lowest).T.to(torch.uint8).contiguous().numpy())
    return QuantTensor(
        pack(np.concatenate(codes), scheme.bits),
        np.concatenate(scales),
        np.concatenate(zeros) if scheme.has_zeros else None,
        scheme,
        (rows, columns),
    )


def _chunks(weight: NDArray[np.float32]) -> Iterator[Tensor]:
    for start in range(0, len(weight), _CHUNK):
        yield torch.from_numpy(np.ascontiguousarray(weight[start : start + _CHUNK]))


def _rows(tensor: QuantTensor, rows: slice) -> QuantTensor:
    cut = tensor.rows(rows)
    zeros = None if cut.zeros is None else np.ascontiguousarray(cut.zeros)
    return replace(cut, codes=np.ascontiguousarray(cut.codes), scales=np.ascontiguousarray(cut.scales), zeros=zeros)


def _relative_error(weight: NDArray[np.float32], tensor: QuantTensor, moments: Moments | None) -> float:
    missing = whole = 0.0
    start = 0
    for part in _chunks(weight):
        rows = slice(start, start + len(part))
        wrong = part - torch.from_numpy(codec.dequantize(tensor.rows(rows), threads=torch.get_num_threads()))
        if moments is None:
            missing += float(wrong.square().sum(dtype=torch.float64))
            whole += float(part.square().sum(dtype=torch.float64))
        else:
            missing += moments.output_energy(wrong)
            whole += moments.output_energy(part)
        start = rows.stop
    return missing / whole if whole > 0 else 0.0
