"""Limits of the shipped graph, derived from the device's rounding of activations and KV cache.

The pack holds the results of the reference with that rounding simulated (`RoundedRecord`). A correct device is another
sample of the same distribution: its values differ in their last bits before they are rounded, or its kernels round a
little differently. So the limit of each statistic is the simulation's value, plus the difference of two finite samples,
times a margin for kernels that round more coarsely:

    quantiles   the simulation's quantile at q + Z sqrt(q (1 - q) (1/N + 1/M)): a count above a level is binomial
    means       mean + Z std sqrt(1/N + 1/M)
    rare events (sqrt(share) + Z/2 sqrt(1/N + 1/M))^2: the square root of a Poisson count varies by 1/2
    margin      FACTOR in the errors' size, its square in KL, which is quadratic in small errors
    floor       what float32 arithmetic is allowed, added

with N positions of the device and M of the simulation. In an MoE model rounding also flips near-ties of the router, and
one flip may cost more than all other rounding together. Coarser rounding causes more flips, but each costs the same:
for positions where the simulation's experts differ ("flipped") the margin applies to their number, for all others to
their size. Flips hardly change the median and the 90th percentile, so damage shows there. For means and largest values
the simulation's flips give the cost of one; if it has fewer than `FLIPS`, one flip of `FLIP_KL` is allowed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from edgelm.parity.limits import LIKELY, LIMITS, NOISE, Limits
from edgelm.parity.logits import bucketed_kl, logit_error
from edgelm.parity.pack import ParityPack
from edgelm.parity.result import Floats, largest, quantile

# Explained at `Noise`.
FACTOR, Z, CLEAR = NOISE.factor, NOISE.z, NOISE.clear
LARGEST, LARGEST_FLIP = NOISE.largest, NOISE.largest_flip
FLIPS, FLIP_KL = NOISE.flips, NOISE.flip_kl


def rounding_limits(pack: ParityPack, limits: Limits) -> Limits:
    """Return `limits`, with those of the shipped graph derived from the pack's rounded record, if it has one."""
    rounded, want = pack.rounded, pack.target
    if rounded is None:
        return limits
    rows, exact = rounded.rows, LIMITS["none"]
    kl = bucketed_kl(want.top_logits[rows], want.logsumexp[rows], rounded.top_logits, rounded.logsumexp)
    logits = np.concatenate([want.top_logits, want.probe_logits], axis=1)[rows]
    moved = np.concatenate([rounded.top_logits, rounded.probe_logits], axis=1)
    sums = want.logsumexp[rows], rounded.logsumexp
    error = logit_error(logits, moved, *sums)
    likely = logit_error(logits, moved, *sums, likely=LIKELY)
    count, flipped = len(pack.ids), rounded.flipped != 0
    # If every position flips, use all: there is nothing else.
    calm = ~flipped if not flipped.all() else np.ones_like(flipped)
    unseen = max(FLIP_KL, float(kl.max())) if pack.num_experts and flipped.sum() < FLIPS else 0.0
    steps = sum(len(prompt.greedy) for prompt in pack.prompts)

    def below(values: Floats, q: float, margin: float, draws: int = count) -> float:
        return max(margin * _quantile(values[calm], q, draws), _quantile_of_more(values, q, draws))

    size = FACTOR * CLEAR * math.sqrt(2) * _quantile((error * logits.std(axis=1))[calm], 0.9, count)
    clear_gap = exact.clear_gap + size
    clear_steps = sum(int((want.gap[prompt.greedy_positions] >= clear_gap).sum()) for prompt in pack.prompts)
    smooth, tipped = np.where(flipped, 0.0, kl), np.where(flipped, kl, 0.0)
    return replace(
        limits,
        kl_mean=exact.kl_mean + FACTOR**2 * _mean(smooth, count) + FACTOR * _mean(tipped, count) + unseen / count,
        kl_p99=exact.kl_p99 + below(kl, 0.99, FACTOR**2),
        kl_max=exact.kl_max
        + max(FACTOR**2 * LARGEST * largest(kl[calm]), LARGEST_FLIP * largest(tipped), LARGEST * unseen),
        logit_error=exact.logit_error + below(error, 0.5, FACTOR),
        logit_error_p90=exact.logit_error_p90 + below(error, 0.9, FACTOR),
        decode_error=exact.decode_error + below(likely, 0.5, FACTOR, max(steps, 1)),
        clear_gap=clear_gap,
        top1_clear=1 - _share_that_may_differ(pack, clear_gap),
        greedy_clear=math.floor(clear_steps * _share_that_may_differ(pack, clear_gap, max(clear_steps, 1))),
        perplexity=exact.perplexity + _perplexity(pack, unseen),
    )


def _spread(count: int, simulated: int) -> float:
    """Return the standard deviation of the difference of two means of `count` and `simulated` draws, per draw."""
    return math.sqrt(1 / count + 1 / simulated)


def _quantile(values: Floats, q: float, count: int) -> float:
    """Return an upper bound of the q-quantile of `count` further draws."""
    return quantile(values, min(1.0, q + Z * math.sqrt(q * (1 - q)) * _spread(count, len(values))))


def _quantile_of_more(values: Floats, q: float, count: int) -> float:
    """Return the same if `FACTOR` times as many draws exceed any level, without being larger."""
    tail = 1 - q - Z * math.sqrt(q * (1 - q)) * _spread(count, len(values))
    return quantile(values, 1 - tail / FACTOR) if tail > 0 else LARGEST * largest(values)


def _mean(values: Floats, count: int) -> float:
    """Return an upper bound of the mean of `count` further draws."""
    return float(values.mean() + Z * values.std() * _spread(count, len(values)))


def _share_that_may_differ(pack: ParityPack, clear_gap: float, count: int | None = None) -> float:
    """Return the share of `count` clear choices that may differ: none in a dense model whose simulation has none.

    Such choices are few, so their number is Poisson, whose square root has a standard deviation of 1/2.
    """
    rounded, want = pack.rounded, pack.target
    assert rounded is not None
    clear = want.gap >= clear_gap
    seen = clear[rounded.rows]
    if not seen.any():
        return 1.0
    different = int((rounded.best != want.best[rounded.rows])[seen].sum())
    if not pack.num_experts and not different:
        return 0.0
    simulated = int(seen.sum())
    root = math.sqrt((FACTOR * different + 3 / 8) / simulated) + Z / 2 * _spread(count or int(clear.sum()), simulated)
    return min(1.0, root**2)


def _perplexity(pack: ParityPack, unseen: float) -> float:
    """Return the largest allowed difference of the ratio of perplexities from 1."""
    rounded, want = pack.rounded, pack.target
    assert rounded is not None
    rows = rounded.rows[pack.has_next[rounded.rows]]
    if not len(rows):
        return 0.0
    before = want.next_logit[rows].astype(np.float64) - want.logsumexp[rows]
    after = (rounded.next_logit.astype(np.float64) - rounded.logsumexp)[pack.has_next[rounded.rows]]
    change = after - before
    count = int(pack.has_next.sum())
    bound = abs(float(change.mean())) + Z * float(change.std()) * _spread(count, len(rows))
    return math.expm1(min(FACTOR * bound + unseen / count, 100.0))
