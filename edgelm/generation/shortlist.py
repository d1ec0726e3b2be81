"""Choosing a token by a shortlist of the logits and by sums, where a device has all logits and a copy would be slow.

A device lists the tokens with the highest logits and sums exponentials over segments of the vocabulary. The token is
chosen from these by the functions of `edgelm.generation.sampling`, so that the arithmetic is written once and the token
is the one that all logits give. That holds because

- the list is complete above a bound: top-k, top-p and min-p keep the same tokens of it, in the same order;
- the sums are used with limits of their error, and an answer counts only if it is the same anywhere within them.

Otherwise there is no answer, and the caller needs all logits: for a top-k or a nucleus beyond the list, for thousands
of equal logits, and where a draw from the whole vocabulary falls as close to the border of two tokens as the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampling, draw, filtered, penalise, top_k, weights_of

# Limit of the relative error of a sum of float32 exponentials on the device against numpy's sum of float64 ones: CUDA's
# differ from the exact ones by 2 units in the last place (2^-23), and some room.
_ERROR = 8 * 2.0**-23
# Limit of the error that does not grow with a sum, as a part of the total, which is at least 1: up to 2^20 numbers are
# rounded down to multiples of 2^-44.
_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Shortlist:
    """What a device tells about a row of V logits: a `ListedLogits` of `edgelm.generation.sampling`.

    Attributes:
        vocab_size: V.
        highest: the highest logit; NaN if any logit is.
        top: the highest logit after the repetition penalty.
        best: its token; of equal ones the first.
        bound: every token with a higher logit is listed.
        ids: int64 [C], the listed tokens in ascending order.
        logits: float32 [C], their logits after the repetition penalty.
        sums: float64 [S], the sum of exp((logit - top) / temperature) of each segment of the vocabulary, in float32 but
            for the sum; empty if `wants_sums` is False for the options.
        segment: tokens of a segment.
        fetch: copies the logits from one token to another, before the penalty, from the device.
    """

    vocab_size: int
    highest: float
    top: float
    best: int
    bound: float
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    sums: NDArray[np.float64]
    segment: int
    fetch: Callable[[int, int], NDArray[np.float32]]

    def full(self) -> NDArray[np.float32]:
        """Copy all logits [V], before the repetition penalty, from the device."""
        return self.fetch(0, self.vocab_size)

    def token(self, options: Sampling, seen: Iterable[int], uniform: float) -> int | None:
        """Return the token that `edgelm.generation.sampling.choose` returns for all logits; None if this is too little.

        Arguments are those of `choose`; options and penalised tokens must be those that the device had.
        """
        if options.greedy:
            return self.best
        if not math.isfinite(self.top):
            return None
        if not wants_shortlist(options, self.vocab_size):
            return self._drawn_from_all(options, seen, uniform)
        tokens = {draw(*kept, uniform) for kept in self._filtered(options)}
        return tokens.pop() if len(tokens) == 1 else None

    def _filtered(self, options: Sampling) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Return the possible results of `candidates` for all logits; none if they cannot be told."""
        limited = _limits(options.top_k, self.vocab_size)
        if self.ids.size < (options.top_k if limited else 1):
            return []
        if limited:
            kept = top_k(self.logits, options.top_k)
            return filtered(self.ids[kept], self.logits[kept], options)
        total = float(self.sums.sum())
        limits = (total * (1 - _ERROR), (total + _ROUNDING) * (1 + _ERROR))
        return filtered(
            self.ids, self.logits, options, limits, None if self.ids.size == self.vocab_size else self.bound
        )

    def _drawn_from_all(self, options: Sampling, seen: Iterable[int], uniform: float) -> int | None:
        """Invert the cumulative distribution of the whole vocabulary: find the segment, then the token in it."""
        reached = np.cumsum(self.sums)
        total, wanted = float(reached[-1]), uniform * float(reached[-1])
        number = min(int(np.searchsorted(reached, wanted, side="right")), reached.size - 1)
        begin = number * self.segment
        logits = self.fetch(begin, min(begin + self.segment, self.vocab_size))
        tokens = np.fromiter(seen, np.int64) - begin
        penalised = tokens[(tokens >= 0) & (tokens < logits.size)]
        if penalised.size:
            logits = penalise(logits, penalised, options.repetition_penalty)
        before = float(reached[number - 1]) if number else 0.0
        edges = before + np.concatenate([[0.0], np.cumsum(weights_of(logits, np.float32(self.top), options))])
        place = int(np.searchsorted(edges[1:], wanted, side="right"))
        if place == logits.size:
            return None
        # Errors of what is before an edge and of what is behind it move it by that much at most.
        low, high = edges[place] / total, edges[place + 1] / total
        margins = [2 * _ERROR * edge * (1 - edge) + _ROUNDING for edge in (low, high)]
        return begin + place if low + margins[0] <= uniform < high - margins[1] else None


def wants_shortlist(options: Sampling, vocab_size: int) -> bool:
    """Whether the most likely tokens are needed to choose one of `vocab_size`."""
    return not options.greedy and (_limits(options.top_k, vocab_size) or options.top_p < 1 or options.min_p > 0)


def wants_sums(options: Sampling, vocab_size: int) -> bool:
    """Whether sums over the whole vocabulary are needed to choose one of `vocab_size`."""
    limited = _limits(options.top_k, vocab_size) or (options.min_p > 0 and options.top_p == 1)
    return not options.greedy and not limited


def _limits(k: int, vocab_size: int) -> bool:
    return 0 < k < vocab_size
