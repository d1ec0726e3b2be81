"""The distances of the parity check, as pure functions of arrays.

Letters: N positions, V vocabulary, E experts, k chosen. Everything is computed in float64: the inputs are float32 and
the differences of interest are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

LIKELY = 16
"""How many of the recorded tokens the error of a decoding step is taken over.

For one token the native operators compute the logits of improbable ones with the upper half of the head's bits
(docs/quantisation.md, "The head by halves"). Beyond the first few, tokens that the float reference finds likely may be
improbable to the quantised one.
"""

_TINY = 1e-300


def logsumexp(logits: ArrayLike) -> Floats:
    """log sum exp over the last axis, [..., V] -> [...]."""
    values = np.asarray(logits)
    peak = values.max(axis=-1, keepdims=True)
    # Exponentials in the input's own precision: a float64 copy of [N, 256000] logits would cost more than it tells.
    total = np.exp(values - peak).sum(axis=-1, dtype=np.float64)
    return np.asarray(np.log(total) + peak[..., 0].astype(np.float64), dtype=np.float64)


def bucketed_kl(p_logits: ArrayLike, p_lse: ArrayLike, q_logits: ArrayLike, q_lse: ArrayLike) -> Floats:
    """KL(P || Q) in nats per position, over the recorded tokens and one bucket for all others.

    `p_logits`, `q_logits` [N, M] are the logits of the same M tokens, `*_lse` [N] the log-sum over the whole
    vocabulary. Merging outcomes into one bucket can only lose information, so this is a **lower bound** of the true KL
    (the data processing inequality); it equals it when the others keep their proportions.
    """
    log_p = np.asarray(p_logits, np.float64) - np.asarray(p_lse, np.float64)[:, None]
    log_q = np.asarray(q_logits, np.float64) - np.asarray(q_lse, np.float64)[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    rest_p = np.clip(1 - p.sum(axis=1), 0.0, 1.0)
    # A float32 log-sum may put the recorded mass a few 1e-7 above one; a bucket below that is noise, not a zero.
    rest_q = np.clip(1 - q.sum(axis=1), 1e-7, 1.0)
    rest = np.where(rest_p > 1e-7, rest_p * (np.log(np.maximum(rest_p, _TINY)) - np.log(rest_q)), 0.0)
    return np.asarray(np.maximum((p * (log_p - log_q)).sum(axis=1) + rest, 0.0), dtype=np.float64)


def logit_error(
    expected: ArrayLike,
    actual: ArrayLike,
    expected_lse: ArrayLike | None = None,
    actual_lse: ArrayLike | None = None,
    *,
    likely: int | None = None,
) -> Floats:
    """Root mean square difference of logits [N, M] relative to the spread of the expected ones, per position.

    `likely`: the difference at so many of the columns only, those with the largest expected logits; the spread is that
    of all.

    With the log-sums given, log-probabilities are compared, so that a constant added to every logit, which changes
    nothing, costs nothing. Unlike KL it also sees errors where the distribution is flat or the token improbable.
    """
    a, b = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected_lse is not None and actual_lse is not None:
        a = a - np.asarray(expected_lse, np.float64)[:, None]
        b = b - np.asarray(actual_lse, np.float64)[:, None]
    spread = np.maximum(a.std(axis=1), 1e-12)
    squares = (a - b) ** 2
    if likely is not None:
        squares = np.take_along_axis(squares, np.argsort(-a, axis=1)[:, :likely], axis=1)
    return np.asarray(np.sqrt(squares.mean(axis=1)) / spread, dtype=np.float64)


def agreement(expected: ArrayLike, actual: ArrayLike, where: Mask | None = None) -> float:
    """Share of equal entries (under `where`), NaN when there is none to compare."""
    same = np.asarray(expected) == np.asarray(actual)
    if where is not None:
        same = same[where]
    return float(same.mean()) if same.size else float("nan")


def perplexity(next_logits: ArrayLike, lse: ArrayLike, where: Mask) -> float:
    """exp of the mean of -log p(next token) over the positions `where`; NaN when there is none."""
    if not where.any():
        return float("nan")
    loss = np.asarray(lse, np.float64)[where] - np.asarray(next_logits, np.float64)[where]
    return float(np.exp(loss.mean()))


@dataclass(frozen=True)
class GreedyResult:
    """How far a device follows a greedy continuation.

    `prefix`: tokens equal from the start. `clear_differences`: steps of another choice at which the reference was not
    undecided, so that rounding does not explain it. They count after a difference too: every step is fed the recorded
    token, whatever the device would have chosen.
    """

    total: int
    prefix: int
    clear_differences: int


def greedy_prefix(expected: ArrayLike, actual: ArrayLike, gap: ArrayLike, near_tie: float) -> GreedyResult:
    """Compare token choices step by step; `gap` is the reference's top-1 minus top-2 logit at each step, in nats."""
    different = np.asarray(expected) != np.asarray(actual)
    prefix = int(different.argmax()) if different.any() else len(different)
    return GreedyResult(len(different), prefix, int((different & (np.asarray(gap, np.float64) >= near_tie)).sum()))


def choose(router: ArrayLike, k: int) -> NDArray[np.int32]:
    """The k largest of router logits [..., E], largest first, the lower index first among equals.

    Softmax is monotone, so the choice by logits is the choice by weight.
    """
    return np.argsort(-np.asarray(router, np.float64), axis=-1, kind="stable")[..., :k].astype(np.int32)


def router_margin(router: ArrayLike, k: int) -> Floats:
    """Gap between the k-th and the (k+1)-th router logit, [..., E] -> [...], in standard deviations of the position's.

    Infinite where every expert is chosen. The unit makes one limit serve routers of any temperature.
    """
    logits = np.asarray(router, np.float64)
    if k >= logits.shape[-1]:
        return np.full(logits.shape[:-1], np.inf)
    ordered = -np.sort(-logits, axis=-1)
    spread = np.maximum(logits.std(axis=-1), 1e-12)
    return np.asarray((ordered[..., k - 1] - ordered[..., k]) / spread, dtype=np.float64)


@dataclass(frozen=True)
class Flips:
    """Per position: whether the sets of chosen experts differ, and how clear the reference was about it.

    `severity` is the reference logit of the best expert that was dropped minus that of the worst that came instead, in
    standard deviations: a rounding flip has a severity near zero. Zero where nothing differs.
    """

    changed: Mask
    severity: Floats


def expert_flips(router: ArrayLike, expected: ArrayLike, actual: ArrayLike) -> Flips:
    """Compare chosen experts [N, k] as sets, with the reference's router logits [N, E]."""
    logits = np.asarray(router, np.float64)
    count = logits.shape[-1]
    want, got = _as_sets(expected, count), _as_sets(actual, count)
    dropped, added = want & ~got, got & ~want
    changed: Mask = np.asarray(dropped.any(axis=-1))
    best_dropped = np.where(dropped, logits, -np.inf).max(axis=-1)
    worst_added = np.where(added, logits, np.inf).min(axis=-1)
    spread = np.maximum(logits.std(axis=-1), 1e-12)
    severity = np.zeros(len(logits))
    severity[changed] = (best_dropped[changed] - worst_added[changed]) / spread[changed]
    return Flips(changed, severity)


def _as_sets(chosen: ArrayLike, count: int) -> Mask:
    indices = np.asarray(chosen, dtype=np.int64)
    sets = np.zeros((*indices.shape[:-1], count), dtype=bool)
    np.put_along_axis(sets, indices, True, axis=-1)
    return sets


def relative_error(expected: ArrayLike, actual: ArrayLike, norms: ArrayLike) -> Floats:
    """|actual - expected| / |expected| per position, from sketches [..., 64] and the expected exact norms [...]."""
    a, b = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    width = a.shape[-1]
    distance = np.sqrt(((a - b) ** 2).sum(axis=-1) / width)
    return np.asarray(distance / np.maximum(np.asarray(norms, np.float64), 1e-30), dtype=np.float64)


def quantile(values: ArrayLike, q: float) -> float:
    """A quantile, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(np.quantile(array, q)) if array.size else float("nan")


def mean(values: ArrayLike) -> float:
    """The mean, NaN for an empty array."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else float("nan")


def largest(values: ArrayLike) -> float:
    """The maximum, NaN for an empty array (and NaN where any value is NaN, so that a broken device cannot pass)."""
    array = np.asarray(values, np.float64)
    return float(array.max()) if array.size else float("nan")


def guilty_experts(experts: ArrayLike, bad: Mask, good: Mask) -> list[int] | None:
    """The few experts that explain the bad positions and not the good ones, None when there is no such set.

    `experts` [N, k] are the experts both sides chose. An expert is suspect when at least 70 % of the positions that
    used it are bad (not all: one that got almost no weight somewhere leaves that position good). Of the suspects the
    one that explains most of what is unexplained is taken until nothing is (greedy set cover). None when no position
    is good, or when it would take more than an eighth of the experts in use: then it is not single experts.
    """
    chosen = np.asarray(experts, dtype=np.int64)
    if not bad.any() or not good.any():
        return None
    count = int(chosen.max()) + 1
    in_bad = np.bincount(chosen[bad].ravel(), minlength=count)
    in_use = in_bad + np.bincount(chosen[good].ravel(), minlength=count)
    suspects = (in_bad > 0) & (in_bad >= 0.7 * in_use)
    left = bad.copy()
    guilty: list[int] = []
    while left.any():
        explained = np.bincount(chosen[left].ravel(), minlength=count) * suspects
        worst = int(explained.argmax())
        if explained[worst] == 0:
            return None
        guilty.append(worst)
        left &= ~(chosen == worst).any(axis=-1)
    return sorted(guilty) if len(guilty) <= max(2, int((in_use > 0).sum()) // 8) else None
