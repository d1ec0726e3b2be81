"""What a calibration remembers of the inputs of a matrix: their second moments, and how many there were."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 1024  # columns from which on cutting H into blocks pays


class Moments:
    """H = sum over tokens of x x^T, for the inputs x [K] of a matrix [N, K].

    With it, `tr(dW H dW^T)` is the summed squared error that the rounding errors dW [N, K] leave in the outputs.

    Attributes:
        hessian: float32 [K, K]. (The Hessian of the squared output error is twice this; the factor is of no matter.)
        tokens: how many inputs were added.
    """

    def __init__(self, hessian: Tensor, tokens: int) -> None:
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != torch.float32:
            raise ValueError(f"second moments are float32 [K, K], not {hessian.dtype} {tuple(hessian.shape)}")
        self.hessian = hessian
        self.tokens = tokens
        self._factors: dict[tuple[int, float], Factor] = {}
        self._padded: Moments | None = None

    @classmethod
    def zeros(cls, columns: int) -> Moments:
        """Of no tokens yet."""
        return cls(torch.zeros(columns, columns), 0)

    def add(self, inputs: Tensor) -> None:
        """Count `inputs`, float32 [n, K]."""
        columns = inputs.shape[1]
        # H is symmetric: blocks below the diagonal are those above it, which spares three eighths of the work.
        step = columns // 4 if columns >= _WIDE else columns
        for start in range(0, columns, step):
            stop = start + step
            block = inputs[:, start:stop].T @ inputs[:, start:]
            self.hessian[start:stop, start:] += block
            self.hessian[stop:, start:stop] += block[:, step:].T
        self.tokens += len(inputs)
        self._factors.clear()
        self._padded = None

    def factor(self, group: int, damping: float) -> Factor:
        """The factor for groups of `group` columns; kept, because matrices with the same input share it."""
        key = (group, damping)
        if key not in self._factors:
            self._factors[key] = Factor(self.hessian, group, damping)
        return self._factors[key]

    def padded(self, columns: int) -> Moments:
        """The same with further inputs, up to `columns`, that are always zero; kept, as factors are."""
        missing = columns - self.hessian.shape[0]
        if missing == 0:
            return self
        if self._padded is None or self._padded.hessian.shape[0] != columns:
            self._padded = Moments(torch.nn.functional.pad(self.hessian, (0, missing, 0, missing)), self.tokens)
        return self._padded

    def output_energy(self, weights: Tensor) -> float:
        """tr(W H W^T) of `weights` [N, K]: the summed squares of their outputs."""
        return float(((weights @ self.hessian) * weights).sum(dtype=torch.float64))


class Factor:
    """H in the order in which columns are rounded, and its factors H = (I + U) D (I + U)^T, U strictly upper.

    Groups stay whole, because their columns share a scale: those whose inputs are largest come first, and within a
    group again the largest (the "activation order" of GPTQ's authors, kept within what contiguous groups allow). What
    comes first is corrected by all that follows.

    Attributes:
        order: int64 [K], the columns in that order.
        groups: int64 [K / group], the groups in that order.
        hessian: float32 [K, K], H in that order, damped: `damping` times the mean of its diagonal is added to it.
        feedback: float32 [K, K], U: column j is rounded after adding U[i, j] times the error of each earlier column i.
        importance: float32 [K], D: the weight of a column's error once later columns have made up for what they can.
    """

    def __init__(self, hessian: Tensor, group: int, damping: float) -> None:
        diagonal = hessian.diagonal()
        per_group = diagonal.view(-1, group)
        self.groups = per_group.sum(1).argsort(descending=True, stable=True)
        inner = per_group[self.groups].argsort(dim=1, descending=True, stable=True)
        self.order = (self.groups[:, None] * group + inner).flatten()
        self.hessian = hessian[self.order][:, self.order]
        mean = float(diagonal.double().mean())
        # Of inputs that were all zero nothing is known: every error counts alike.
        self.hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        upper = _reversed_cholesky(self.hessian)
        scale = upper.diagonal().clone()
        self.importance = scale.square()
        self.feedback = (upper / scale).triu_(1).contiguous()


def _reversed_cholesky(matrix: Tensor) -> Tensor:
    """Upper triangular V with V V^T = matrix: Cholesky of the matrix with rows and columns reversed.

    With this one factor GPTQ needs no inverse: rounding column by column with the errors fed back through U is the
    same as the updates of its paper (QuIP, arXiv 2307.13304, section 3.1 and theorem 6).
    """
    flipped = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if int(failed):
        # float32 was not enough for inputs that are nearly dependent; damping makes it positive in float64.
        lower = torch.linalg.cholesky(flipped.double()).float()
    upper: Tensor = lower.flip(0, 1)
    return upper
