"""Sampling: choose the next token from the logits.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, then a draw from the softmax of
the tokens left. Each filter keeps the same tokens as the one of transformers, ties included.

A draw inverts the cumulative distribution in float64 at a number from PCG64's raw 64-bit stream. NumPy keeps that
stream stable over versions and systems, but not the distributions of `Generator`. So the same logits, options and seed
give the same token everywhere.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GenerationError, GenerationTypeError, GenerationValueError

# First number of candidates for top-p. The tokens kept are almost always fewer; otherwise more are tried.
_FIRST_GUESS = 1024
_BLOCK = 32
_LEAST, _MOST = 1e-30, 1e30


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


def _clamped(value: float) -> float:
    """Clamp a temperature or penalty so that no logit overflows float32. Beyond the limits nothing would change."""
    return min(max(value, _LEAST), _MOST)


def penalise(logits: NDArray[np.float32], tokens: NDArray[np.int64], penalty: float) -> NDArray[np.float32]:
    """Return a copy of logits [V] in which those of the distinct ids `tokens` are divided by `penalty`.

    Negative logits are multiplied instead. Keskar et al. 2019 (CTRL), with the sign rule of transformers.
    """
    result = logits.copy()
    chosen, factor = result[tokens], np.float32(_clamped(penalty))
    result[tokens] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return result


def candidates(logits: NDArray[np.float32], options: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that pass the filters and their probabilities, for a temperature above 0.

    Probabilities are computed in float64; sums over the whole vocabulary have float32 terms.

    Args:
        logits: [V], after the repetition penalty; the highest is finite.
        options: temperature, top_k, top_p and min_p.

    Returns:
        ids [C], and probabilities [C] that sum to 1, in no particular order.
    """
    highest = logits.max()
    temperature = _clamped(options.temperature)
    total = None
    if 0 < options.top_k < logits.size:
        ids = _top_k(logits, options.top_k)
    elif options.top_p < 1:
        with np.errstate(over="ignore"):
            total = float(np.exp((logits - highest) / np.float32(temperature)).sum(dtype=np.float64))
        ids = _at_least_best(logits, _FIRST_GUESS)
    elif options.min_p > 0:
        ids = np.arange(logits.size)
    else:
        with np.errstate(over="ignore"):
            weights = np.exp((logits - highest) / np.float32(temperature)).astype(np.float64)
        return np.arange(logits.size), weights / weights.sum()
    if options.min_p > 0 and options.top_p == 1:
        # A cheap first filter with a small margin; the exact test follows below.
        floor = float(highest) + temperature * math.log(options.min_p)
        ids = ids[logits[ids] >= np.float32(floor - 1e-3 * (1 + abs(floor)))]
    scores = _scores(logits, ids, temperature)
    if options.top_p < 1:
        kept = _nucleus(scores, options.top_p, total)
        guess = _FIRST_GUESS
        while kept is None:
            guess *= 16
            ids = _at_least_best(logits, guess)
            scores = _scores(logits, ids, temperature)
            kept = _nucleus(scores, options.top_p, total if ids.size < logits.size else None)
        ids, scores = ids[kept], scores[kept]
    if options.min_p > 0:
        near = scores >= math.log(options.min_p)
        ids, scores = ids[near], scores[near]
    weights = np.exp(scores)
    return ids, weights / weights.sum()


def _scores(logits: NDArray[np.float32], ids: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """Return (logit - highest logit) / temperature of `ids`, so that the best score is 0."""
    scores: NDArray[np.float64] = logits[ids].astype(np.float64)
    scores -= scores.max()
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


def _top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the ids of the k highest logits and of all ties with the k-th, as in transformers."""
    ids = _at_least_best(logits, k)
    chosen = logits[ids]
    kept: NDArray[np.int64] = ids[chosen >= np.partition(chosen, chosen.size - k)[chosen.size - k]]
    return kept


def _nucleus(scores: NDArray[np.float64], top_p: float, total: float | None) -> NDArray[np.int64] | None:
    """Return the indices of the fewest highest scores whose exponentials sum to `top_p` of `total`.

    Without `total`, the scores are those of the whole vocabulary. None where all scores together do not reach it.
    """
    order = np.argsort(-scores, kind="stable")
    reached = np.cumsum(np.exp(scores[order]))
    if total is not None and reached[-1] < top_p * total:
        return None
    # A token is kept while the tokens above it do not reach top_p; the first is always kept.
    wanted = top_p * (reached[-1] if total is None else total)
    return order[: int(np.searchsorted(reached, wanted, side="left")) + 1]


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


class Sampler:
    """Chooses the tokens of one sequence. Holds the random number generator and the tokens that occurred.

    Args:
        options: how to choose.
        seen: the prompt's ids, for the repetition penalty.
    """

    def __init__(self, options: Sampling, seen: Iterable[int] = ()) -> None:
        self.options = options
        seed = secrets.randbits(64) if options.seed is None else int(options.seed)
        self._bits = np.random.PCG64(seed)
        self._seen = dict.fromkeys(seen) if options.repetition_penalty != 1 else {}

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token by the logits [V], which are not changed, and count it for the repetition penalty.

        Raises:
            GenerationError: the highest logit is not finite.
        """
        options = self.options
        highest = float(logits.max())
        require_finite(highest)
        if self._seen:
            logits = penalise(logits, np.fromiter(self._seen, np.int64, len(self._seen)), options.repetition_penalty)
        if options.greedy:
            token = int(logits.argmax())
        else:
            ids, probabilities = candidates(logits, options)
            cumulative = np.cumsum(probabilities)
            draw = self._uniform() * cumulative[-1]
            token = int(ids[min(int(np.searchsorted(cumulative, draw, side="right")), ids.size - 1)])
        if options.repetition_penalty != 1:
            self._seen[token] = None
        return token

    def _uniform(self) -> float:
        """Return a random number in [0, 1) from the upper 53 bits of the stream."""
        return int(self._bits.random_raw() >> 11) * 2.0**-53
