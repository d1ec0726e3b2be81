"""Compensate the drift of a matrix's inputs: the error that the quantised matrices before it cause.

The hidden states x of the quantised model drift from those of the float model, x~. A matrix W should compute from x
what the float model computes from x~. So the matrix that is quantised is not W but the W' of least squared error:

    minimise  sum |W' x - W x~ - r|^2 + a |W' - W|^2      W' = W + (W D + R) (H + a)^-1
    H = sum x x^T,   D = sum (x~ - x) x^T,   R = sum r x^T

r is a further correction of the output. For a matrix that writes to the residual stream it is the drift of the stream.
W' costs nothing at run time. GPTAQ (arXiv 2504.02692) puts the first term into GPTQ's column updates. Here it is a
separate matrix, so every method can use it and experts can share it.

The damping `a` keeps W' from fitting noise. A tenth of the mean of H's diagonal was no worse than a hundredth, with few
and with many calibration tokens (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1
ROUTER_DAMPING = 0.01
"""Damping for routers, which have few rows and see every token."""


class Drift:
    """The moments H and D of a matrix's inputs [K], and R if a residual [N] of its outputs is given."""

    def __init__(self) -> None:
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None
        self._shared: tuple[float, Tensor] | None = None

    def add(self, inputs: Tensor, reference: Tensor, residual: Tensor | None = None) -> None:
        """Add the inputs of the same tokens in both models.

        Args:
            inputs: Inputs in the quantised model, float32 [n, K].
            reference: Inputs in the float model, float32 [n, K].
            residual: Further correction r of the output, float32 [n, N]; either always or never given.
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
        """Return W' for `weight`, float32 [N, K]; `damping` is a share of the mean of H's diagonal."""
        if self._hessian is None or self._drift is None:
            return weight
        if self._residual is None and len(weight) * 4 >= weight.shape[1]:
            # Several matrices have the same inputs, so the common factor is computed once.
            if self._shared is None or self._shared[0] != damping:
                self._shared = (damping, self._solve(self._drift, damping))
            return torch.addmm(weight, weight, self._shared[1])
        wanted = weight @ self._drift
        if self._residual is not None:
            wanted += self._residual
        return weight + self._solve(wanted, damping)

    def _solve(self, wanted: Tensor, damping: float) -> Tensor:
        """Return wanted (H + a)^-1."""
        assert self._hessian is not None
        damped = self._hessian.clone()
        mean = float(damped.diagonal().double().mean())
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        solved: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(damped)).T
        return solved
