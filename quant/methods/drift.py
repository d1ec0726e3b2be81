"""Makes a matrix undo, as far as it can, what everything quantised before it has done to its inputs.

A quantised model's hidden states x drift from those of the float model, x~. What a matrix W should compute from x is
what the float model computes from x~, so the target of its quantisation is not W but the W' that comes nearest:

    minimise  sum |W' x - W x~ - r|^2 + a |W' - W|^2      W' = W + (W D + R) (H + a)^-1
    H = sum x x^T,   D = sum (x~ - x) x^T,   R = sum r x^T

r is what is to be added to the output besides: for a matrix that writes into the residual stream, the drift of the
stream itself. W' costs nothing to run. (GPTAQ, arXiv 2504.02692, puts the first term into GPTQ's column updates; here
it is a matrix of its own, so that every method profits and experts can share it.)

The damping `a` keeps W' from fitting noise: a tenth of the mean of H's diagonal was no worse than a hundredth, with few
calibration tokens and with many (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1
ROUTER_DAMPING = 0.01
"""Of routers, which have few rows and see every token."""


class Drift:
    """The moments H, D and R of a matrix's inputs [K], and with a residual of its outputs [N]."""

    def __init__(self) -> None:
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None
        self._shared: tuple[float, Tensor] | None = None

    def add(self, inputs: Tensor, reference: Tensor, residual: Tensor | None = None) -> None:
        """Count the same tokens in both models.

        Args:
            inputs: float32 [n, K], of the quantised model.
            reference: float32 [n, K], of the float model.
            residual: float32 [n, N], what the output is to make up for besides; always or never given.
        """
        if self._hessian is None or self._drift is None:
            self._hessian = torch.zeros(inputs.shape[1], inputs.shape[1])
            self._drift = torch.zeros_like(self._hessian)
        self._hessian.addmm_(inputs.T, inputs)
        self._drift.addmm_((reference - inputs).T, inputs)
        if residual is not None:
            if self._residual is None:
                self._residual = torch.zeros(residual.shape[1], inputs.shape[1])
            self._residual.addmm_(residual.T, inputs)
        self._shared = None

    def corrected(self, weight: Tensor, damping: float = DAMPING) -> Tensor:
        """W' for `weight`, float32 [N, K]; `damping` is a share of the mean of H's diagonal."""
        if self._hessian is None or self._drift is None:
            return weight
        if self._residual is None and len(weight) * 4 >= weight.shape[1]:
            # Several matrices have the same inputs: what they share is worth a matrix of its own.
            if self._shared is None or self._shared[0] != damping:
                self._shared = (damping, self._solve(self._drift, damping))
            return torch.addmm(weight, weight, self._shared[1])
        wanted = weight @ self._drift
        if self._residual is not None:
            wanted += self._residual
        return weight + self._solve(wanted, damping)

    def _solve(self, wanted: Tensor, damping: float) -> Tensor:
        """wanted (H + a)^-1."""
        assert self._hessian is not None
        damped = self._hessian.clone()
        mean = float(damped.diagonal().double().mean())
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        solved: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T
        return solved
