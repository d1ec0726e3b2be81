"""Sampling: choose the next token from the logits.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, then a draw from the softmax of
the tokens left. Each filter keeps the same tokens as the one of transformers, ties included.

A draw inverts the cumulative distribution in float64 at a number from PCG64's raw 64-bit stream. NumPy keeps that
stream stable over versions and systems, but not the distributions of `Generator`. So the same logits, options and seed
give the same token everywhere, also in libedgelm, whose sampler is a second one in C++: a device that runs bundles in
Python need not have the compiled library, and an app with the library need not have Python. tests/vectors has what both
have to give.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError, GenerationTypeError, GenerationValueError

# First number of candidates for top-p. The tokens kept are almost always fewer; otherwise more are tried.
_FIRST_GUESS = 1024
_BLOCK = 32
_LEAST, _MOST = 1e-30, 1e30
# How many ends of a nucleus are tried where its total is not exactly known.
_MOST_ENDS = 8


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. The default is greedy decoding: always the most likely token.

    Attributes:
        temperature: 0 is greedy; 1 samples from the model's own distribution.
        top_k: sample among the k most likely tokens (0: all).
        top_p: sample among the most likely tokens that together reach this probability (1: all).
        min_p: sample among tokens with at least this fraction of the highest probability (0: all).
        repetition_penalty: divide positive and multiply negative logits of every token that occurs in the prompt or the
            answer; 1 changes nothing. It applies to greedy decoding as well.
        seed: makes sampling reproducible; None for a random one.

    Raises:
        GenerationTypeError: a value has a wrong type.
        GenerationValueError: a value is out of range; or top_k, top_p or min_p is given with temperature 0, where it
            has no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, lambda t: 0 <= t < math.inf, "a number, 0 (greedy) or more")
        _require("top_k", self.top_k, lambda k: k >= 0, "an integer, 0 (all tokens) or more", is_integer)
        _require("top_p", self.top_p, lambda p: 0 < p <= 1, "a number, more than 0 and at most 1 (all tokens)")
        _require("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number, 0 (all tokens) to 1")
        _require(
            "repetition_penalty",
            self.repetition_penalty,
            lambda penalty: 0 < penalty < math.inf,
            "a number, more than 0 (1 changes nothing)",
        )
        if self.seed is not None:
            _require("seed", self.seed, lambda seed: 0 <= seed < 2**64, "an integer from 0 to 2**64 - 1", is_integer)
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) != _DEFAULTS[name]]
        if self.temperature == 0 and idle:
            raise GenerationValueError(
                f"{' and '.join(idle)} would do nothing with temperature 0 (greedy): give a temperature, such as 0.8"
            )

    def __repr__(self) -> str:
        return f"Sampling({changed(self)})"

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether decoding is greedy and nothing changes the logits."""
        return self.greedy and self.repetition_penalty == 1


_DEFAULTS = {field.name: field.default for field in fields(Sampling)}


def changed(options: Any) -> str:
    """Return the fields of a dataclass that differ from their defaults, as keyword arguments, for a short `repr`."""
    given = [(field, getattr(options, field.name)) for field in fields(options)]
    return ", ".join(f"{field.name}={value!r:.60}" for field, value in given if value != field.default)


def is_integer(value: object) -> bool:
    """Return whether a value is an integer of Python or numpy; False for bool and for floats such as 2.0."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, (float, np.floating))


def _require(
    name: str, value: Any, in_range: Callable[[Any], bool], wanted: str, kind: Callable[[object], bool] = _is_number
) -> None:
    right_type = kind(value)
    if not right_type or not in_range(value):
        kind_of_error = GenerationValueError if right_type else GenerationTypeError
        raise kind_of_error(f"{name} is {value!r:.100}: it has to be {wanted}")


def clamped(value: float) -> float:
    """Clamp a temperature or penalty so that no logit overflows float32. Beyond the limits nothing would change."""
    return min(max(value, _LEAST), _MOST)


def penalise(logits: NDArray[np.float32], tokens: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    """Return a copy of logits [V] in which those of the distinct ids `tokens` are divided by `penalty`.

    Negative logits are multiplied instead. Keskar et al. 2019 (CTRL), with the sign rule of transformers.
    """
    result = logits.copy()
    chosen, factor = result[tokens], np.float32(clamped(penalty))
    result[tokens] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return result


def candidates(logits: NDArray[np.float32], options: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that pass the filters and their probabilities, for a temperature above 0.

    Probabilities are computed in float64; for the whole vocabulary their exponents are float32.

    Args:
        logits: [V], after the repetition penalty; the highest is finite.
        options: temperature, top_k, top_p and min_p.

    Returns:
        ids [C], and probabilities [C] that sum to 1, in no particular order.
    """
    if 0 < options.top_k < logits.size:
        ids = top_k(logits, options.top_k)
        ((ids, probabilities),) = filtered(ids, logits[ids], options)
        return ids, probabilities
    if options.top_p == 1 and options.min_p == 0:
        weights = weights_of(logits, logits.max(), options)
        return np.arange(logits.size), weights / weights.sum()
    if options.top_p == 1:
        ((ids, probabilities),) = filtered(np.arange(logits.size), logits, options)
        return ids, probabilities
    total: float | None = float(weights_of(logits, logits.max(), options).sum())
    guess, found = _FIRST_GUESS, []
    ids = _at_least_best(logits, guess)
    while not (found := filtered(ids, logits[ids], options, None if total is None else (total, total))):
        guess *= 16
        ids = _at_least_best(logits, guess)
        total = total if ids.size < logits.size else None
    return found[0]


def weights_of(logits: NDArray[np.float32], highest: np.float32, options: Sampling) -> NDArray[np.float64]:
    """Return the exponentials, in float64, of (logits - highest) / temperature in float32.

    Exponentials in float32 take a quarter of the time, but differ between systems in the last bits. Over 50,000 tokens
    that moves so many borders that one draw in 15,000 gives another token.
    """
    with np.errstate(over="ignore"):
        exponents: NDArray[np.float32] = (logits - highest) / np.float32(clamped(options.temperature))
    weights: NDArray[np.float64] = np.exp(exponents, dtype=np.float64)
    return weights


def filtered(
    ids: NDArray[np.int64],
    logits: NDArray[np.float32],
    options: Sampling,
    total: tuple[float, float] | None = None,
    bound: float | None = None,
) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Apply top-p and min-p to tokens; return those left and their probabilities, as `candidates` does.

    Args:
        ids: [C], tokens, among them the most likely one.
        logits: [C], their logits after the repetition penalty.
        options: temperature, top_p and min_p; top_k is not applied.
        total: limits of the sum of exp((logit - highest) / temperature) over the vocabulary, for top_p; None: these
            tokens are all.
        bound: no other token has a higher logit; None: not known, or there are no others.

    Returns:
        The result for every `total` within the limits: one if they are equal. Empty if other tokens may be left as
        well, or if there are too many results.
    """
    highest, temperature = logits.max(), clamped(options.temperature)
    threshold = math.log(options.min_p) if options.min_p > 0 else -math.inf
    alone = bound is not None and score(np.array([bound], np.float32), highest, temperature)[0] < threshold
    if options.top_p == 1 and bound is not None and not alone:
        return []
    if options.top_p == 1 and options.min_p > 0:
        # A cheap first filter with a small margin; the exact test follows below.
        floor = float(highest) + temperature * threshold
        near = logits >= np.float32(floor - 1e-3 * (1 + abs(floor)))
        ids, logits = ids[near], logits[near]
    scores = score(logits, highest, temperature)
    results = []
    for kept in _nuclei(scores, options.top_p, total, alone) if options.top_p < 1 else [np.arange(ids.size)]:
        if options.min_p > 0:
            kept = kept[scores[kept] >= threshold]
        weights = np.exp(scores[kept])
        results.append((ids[kept], weights / weights.sum()))
    return results


def score(logits: NDArray[np.float32], highest: np.float32, temperature: float) -> NDArray[np.float64]:
    """Return (logit - highest) / temperature in float64. It never falls as the logit rises."""
    scores: NDArray[np.float64] = logits.astype(np.float64)
    scores -= float(highest)
    scores /= temperature
    return scores


def _at_least_best(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return ids that include the `count` highest logits and all ties with the last of them; all ids for a large count.

    At least `count` logits reach the count-th highest of the maxima of strided blocks. That bound takes a tenth of the
    time of a partition.
    """
    blocks = logits.size // _BLOCK
    if logits.size < 4 * count:
        return np.arange(logits.size)
    if blocks < 2 * count:
        return np.flatnonzero(logits >= np.partition(logits, logits.size - count)[logits.size - count])
    maxima = logits[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
    bound = np.partition(maxima, blocks - count)[blocks - count]
    return np.flatnonzero(logits >= bound)


def top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the ids of the k highest logits and of all ties with the k-th, as in transformers."""
    ids = _at_least_best(logits, k)
    chosen = logits[ids]
    kept: NDArray[np.int64] = ids[chosen >= np.partition(chosen, chosen.size - k)[chosen.size - k]]
    return kept


def _nuclei(
    scores: NDArray[np.float64], top_p: float, total: tuple[float, float] | None, alone: bool
) -> list[NDArray[np.int64]]:
    """Return the indices of the fewest highest scores whose exponentials sum to `top_p` of the total.

    With limits of the total, return the result for each total within them; none if the limits are far apart. If all
    scores together do not reach it, return all of them if they matter `alone`, otherwise nothing.
    """
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(np.exp(scores[order]))
    low, high = (reached[-1], reached[-1]) if total is None else total
    if total is not None and not alone and reached[-1] < top_p * high:
        return []
    # A token is kept while the tokens above it do not reach top_p; the first is always kept.
    first, last = (int(np.searchsorted(reached, top_p * limit, side="left")) + 1 for limit in (low, high))
    last = min(last, order.size)
    return [order[:count] for count in range(min(first, last), last + 1)] if last - first < _MOST_ENDS else []


def draw(ids: NDArray[np.int64], probabilities: NDArray[np.float64], uniform: float) -> int:
    """Return the token where the cumulative distribution passes `uniform`, a number in [0, 1)."""
    cumulative = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(ids[min(place, ids.size - 1)])


def argmax(logits: NDArray[np.float32]) -> int:
    """Return the token with the highest of logits [V]; of equal ones the first.

    Raises:
        GenerationError: the highest logit is not finite.
    """
    token = int(logits.argmax())
    require_finite(float(logits[token]))
    return token


def require_finite(highest: float) -> None:
    """Check that the highest logit is a finite number.

    Raises:
        GenerationError: it is not.
    """
    if not math.isfinite(highest):
        raise GenerationError(
            f"the model's highest logit is {highest}: the bundle is damaged or its runtime is at fault; "
            "check with `edgelm inspect --verify` and `edgelm parity`"
        )


class ListedLogits(Protocol):
    """A row of V logits on a device, and what the host has of them. See `edgelm.generation.shortlist`."""

    @property
    def highest(self) -> float:
        """The highest logit before the repetition penalty; NaN if any logit is."""

    def token(self, options: Sampling, seen: Iterable[int], uniform: float) -> int | None:
        """Return the token that `choose` returns for all logits; None if what is listed does not determine it."""

    def full(self) -> NDArray[np.float32]:
        """Copy all logits [V], before the repetition penalty, from the device."""


def choose(logits: NDArray[np.float32], options: Sampling, seen: Iterable[int], uniform: float) -> int:
    """Return the next token.

    Args:
        logits: [V]; not changed.
        options: how to choose.
        seen: the tokens that the repetition penalty applies to.
        uniform: a random number in [0, 1); not used if greedy.
    """
    tokens = np.fromiter(seen, np.int64)
    if tokens.size:
        logits = penalise(logits, tokens, options.repetition_penalty)
    return int(logits.argmax()) if options.greedy else draw(*candidates(logits, options), uniform)


class Sampler:
    """Chooses the tokens of one sequence. Holds the random number generator and the tokens that occurred.

    Args:
        options: how to choose.
        seen: the prompt's ids, for the repetition penalty.

    Attributes:
        seen: the distinct tokens that occurred, in order; none where the penalty is 1.
    """

    def __init__(self, options: Sampling, seen: Iterable[int] = ()) -> None:
        self.options = options
        seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        self._bits = np.random.PCG64(seed)
        self.seen = dict.fromkeys(seen) if options.repetition_penalty != 1 else {}

    def sample(self, logits: NDArray[np.float32] | ListedLogits) -> int:
        """Choose a token by the logits [V], which are not changed, and count it for the repetition penalty.

        The token is the same for an array and for the same logits on a device.

        Raises:
            GenerationError: the highest logit is not finite.
        """
        options, uniform = self.options, self._uniform()
        if isinstance(logits, np.ndarray):
            require_finite(float(logits.max()))
            token = choose(logits, options, self.seen, uniform)
        else:
            require_finite(logits.highest)
            listed = logits.token(options, self.seen, uniform)
            token = choose(logits.full(), options, self.seen, uniform) if listed is None else listed
        if options.repetition_penalty != 1:
            self.seen[token] = None
        return token

    def _uniform(self) -> float:
        """Return a random number in [0, 1) from the upper 53 bits of the stream."""
        return int(self._bits.random_raw() >> 11) * 2.0**-53
