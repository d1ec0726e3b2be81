"""Compare the predictions of two models without holding the logits of all tokens.

Logits come in blocks of the vocabulary, and for each token only running sums are kept. With logits a of the float model
P and b of the target Q, shifted by the running maximum m of a (the "online softmax"):

    KL(P || Q) = sum_v p_v (log p_v - log q_v) = [sum_v e^(a_v - m) (a_v - b_v)] / [sum_v e^(a_v - m)] - (lse a - lse b)

A constant added to all logits of a model cancels. Sums are float64, logits float32.

Letters: n rows (tokens), v width of a block, W windows, T tokens of a window.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.evaluation.result import Divergence, Estimate
from edgelm.slices import slices

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ELEMENTS = 1 << 19
"""Number of logits converted to float64 at once; a few copies of them fit into the CPU's cache."""


class Predictions:
    """Log-sum-exp, largest logit and logit of the next token of n rows, from blocks of logits."""

    def __init__(self, following: Ints) -> None:
        """`following`: int64 [n], the token that follows each row."""
        count = len(following)
        self._following = following
        self._peak = np.full(count, -np.inf)
        self._total = np.zeros(count)
        self._following_logit = np.full(count, np.nan)
        self.best = np.zeros(count, np.int64)
        """int64 [n], the most likely token; of equal ones the first."""

    def add(self, start: int, logits: NDArray[np.float32], first_row: int = 0) -> None:
        """Add float32 logits [n', v]: columns are vocabulary entries from `start` on, rows from `first_row` on."""
        for part in slices(len(logits), _ELEMENTS // logits.shape[1]):
            rows = slice(first_row + part.start, first_row + part.stop)
            self.add_float64(rows, start, logits[part].astype(np.float64))

    def add_float64(self, rows: slice, start: int, logits: Floats) -> tuple[Floats, Floats]:
        """Add float64 logits [n', v] of these rows; columns are vocabulary entries from `start` on.

        Returns:
            exp(logits - running maximum) [n', v], and the factors [n'] by which to scale earlier sums of them.
        """
        peak, best = logits.max(axis=1), logits.argmax(axis=1)
        before = self._peak[rows]
        self.best[rows] = np.where(peak > before, best + start, self.best[rows])
        after = np.maximum(before, peak)
        exponentials = np.exp(logits - after[:, None])
        scale = np.exp(before - after)
        self._total[rows] = self._total[rows] * scale + exponentials.sum(axis=1)
        self._peak[rows] = after
        local = self._following[rows] - start
        inside = np.flatnonzero((local >= 0) & (local < logits.shape[1]))
        self._following_logit[rows.start + inside] = logits[inside, local[inside]]
        return exponentials, scale

    @property
    def logsumexp(self) -> Floats:
        """Log-sum-exp of the logits, float64 [n]."""
        return np.asarray(self._peak + np.log(self._total))

    @property
    def total(self) -> Floats:
        """Sum of exp(logits - maximum), float64 [n]."""
        return self._total

    @property
    def loss(self) -> Floats:
        """-log p(next token) in nats, float64 [n]."""
        return np.asarray(self.logsumexp - self._following_logit)


class Comparison:
    """Comparison of a target with the float model over n rows, from running sums."""

    def __init__(self, following: Ints) -> None:
        self.reference = Predictions(following)
        self.target = Predictions(following)
        self._weighted = np.zeros(len(following))

    def add(self, start: int, reference: ArrayLike, target: ArrayLike, first_row: int = 0) -> None:
        """Add float32 logits [n', v] of both models; rows and columns as in `Predictions.add`."""
        a, b = np.asarray(reference), np.asarray(target)
        for part in slices(len(a), _ELEMENTS // a.shape[1]):
            rows = slice(first_row + part.start, first_row + part.stop)
            a64, b64 = a[part].astype(np.float64), b[part].astype(np.float64)
            exponentials, scale = self.reference.add_float64(rows, start, a64)
            self.target.add_float64(rows, start, b64)
            exponentials *= a64 - b64
            self._weighted[rows] = self._weighted[rows] * scale + exponentials.sum(axis=1)

    @property
    def kl(self) -> Floats:
        """KL(float || target) of each row in nats, float64 [n]; rounding errors below zero are set to zero."""
        mean = self._weighted / self.reference.total
        return np.maximum(mean - (self.reference.logsumexp - self.target.logsumexp), 0.0)


def standard_error(window_means: ArrayLike) -> float:
    """Return the standard error of the mean over W windows: s / sqrt(W), s^2 = sum (x - mean)^2 / (W - 1).

    NaN for fewer than two windows. The tokens of a window depend on each other, so the windows are the sample.
    """
    values = np.asarray(window_means, np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def estimate(values: Floats) -> Estimate:
    """Return the mean of values [W, T] and its standard error over windows."""
    return Estimate(float(values.mean()), standard_error(values.mean(axis=1)))


def perplexity(loss: Floats) -> float:
    """Return exp of the mean of losses in nats."""
    return float(np.exp(loss.mean()))


def divergence(kl: Floats, same: NDArray[np.bool_]) -> Divergence:
    """Summarise the KL [W, T] of every token, and whether both models have the same most likely token [W, T]."""
    found = estimate(kl)
    return Divergence(
        mean=found.mean,
        standard_error=found.standard_error,
        median=float(np.median(kl)),
        p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
    )
