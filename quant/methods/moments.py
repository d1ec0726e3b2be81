"""Second moments of a matrix's calibration inputs, and their factors for GPTQ."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 1024  # columns from which computing H in blocks is faster


class Moments:
    """H = sum over tokens of x x^T, for the inputs x [K] of a matrix [N, K].

    tr(dW H dW^T) is the summed squared error of the outputs for rounding errors dW [N, K].

    Attributes:
        hessian: H, float32 [K, K]. The Hessian of the squared output error is 2 H; the factor makes no difference.
        tokens: Number of inputs added.
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
        """Return the moments of no tokens."""
        return cls(torch.zeros(columns, columns), 0)

    def add(self, inputs: Tensor) -> None:
        """Add inputs, float32 [n, K]."""
        columns = inputs.shape[1]
        # H is symmetric. Copying the blocks below the diagonal from those above saves three eighths of the work.
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
        """Return the factor for groups of `group` columns; cached, because matrices with the same input share it."""
        key = (group, damping)
        if key not in self._factors:
            self._factors[key] = Factor(self.hessian, group, damping)
        return self._factors[key]

    def padded(self, columns: int) -> Moments:
        """Return the moments with zero inputs added up to `columns`; cached like factors."""
        missing = columns - self.hessian.shape[0]
        if missing == 0:
            return self
        if self._padded is None or self._padded.hessian.shape[0] != columns:
            self._padded = Moments(torch.nn.functional.pad(self.hessian, (0, missing, 0, missing)), self.tokens)
        return self._padded

    def output_energy(self, weights: Tensor) -> float:
        """Return tr(W H W^T) of `weights` [N, K], the summed squares of their outputs."""
        return float(((weights @ self.hessian) * weights).sum(dtype=torch.float64))


class Factor:
    """H in the order in which columns are rounded, and its factors: H = (I + U) D (I + U)^T with U strictly upper.

    Groups with the largest inputs come first, and within a group the columns with the largest inputs. (This is GPTQ's
    activation order with contiguous groups, whose columns share a scale.) The earlier a column, the more later columns
    can correct its error.

    Attributes:
        order: Columns in that order, int64 [K].
        groups: Groups in that order, int64 [K / group].
        hessian: H in that order, float32 [K, K], with `damping` times the mean of its diagonal added to the diagonal.
        feedback: U, float32 [K, K]: before column j is rounded, U[i, j] times the error of each earlier column i is
            added to it.
        importance: D, float32 [K]: weight of a column's error after the correction by later columns.
    """

    def __init__(self, hessian: Tensor, group: int, damping: float) -> None:
        diagonal = hessian.diagonal()
        per_group = diagonal.view(-1, group)
        self.groups = per_group.sum(1).argsort(descending=True, stable=True)
        inner = per_group[self.groups].argsort(dim=1, descending=True, stable=True)
        self.order = (self.groups[:, None] * group + inner).flatten()
        self.hessian = hessian[self.order][:, self.order]
        mean = float(diagonal.double().mean())
        # If all inputs were zero, all errors count equally.
        self.hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
        upper = _reversed_cholesky(self.hessian)
        scale = upper.diagonal().clone()
        self.importance = scale.square()
        self.feedback = (upper / scale).triu_(1).contiguous()


def _reversed_cholesky(matrix: Tensor) -> Tensor:
    """Return the upper triangular V with V V^T = matrix, by Cholesky of the matrix with rows and columns reversed.

    With this factor GPTQ needs no inverse: rounding column by column with error feedback through U equals the updates
    in its paper (QuIP, arXiv 2307.13304, section 3.1 and theorem 6).
    """
    flipped = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    if int(failed):
        # float32 was not precise enough for nearly dependent inputs. In float64 damping makes it positive definite.
        lower = torch.linalg.cholesky(flipped.double()).float()
    upper: Tensor = lower.flip(0, 1)
    return upper
