"""Random +-1 projections of hidden states from thousands of numbers to 64.

For S[d, j] = +-1 drawn independently, E |h S|^2 = 64 |h|^2, so the distance of two sketches estimates the distance of
the two hidden states with a standard deviation of 1/sqrt(2 * 64), about 9 % (Achlioptas 2003, "Database-friendly
random projections"). Being linear, sketches may be subtracted: the sketch of a layer's update is the difference of two
sketches.

The signs come from splitmix64 (Steele, Lea and Flood 2014), implemented here because NumPy does not promise that its
generators give the same numbers in every version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

SKETCH_WIDTH = 64
SKETCH_SEED = 0x45646765_4C4D3031

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(seed: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` outputs of splitmix64 with `seed`."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sign_matrix(width: int, seed: int = SKETCH_SEED) -> NDArray[np.float32]:
    """Return the projection [width, 64]: bit j of the d-th splitmix64 output is the sign of entry [d, j]."""
    words = splitmix64(seed, width)
    bits = (words[:, None] >> np.arange(SKETCH_WIDTH, dtype=np.uint64)) & np.uint64(1)
    return (bits.astype(np.float32) * 2 - 1).astype(np.float32)


def sketch(hidden: NDArray[np.float32], signs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the sketches [..., 64] of hidden states [..., D].

    Sums are in float64, so that their order, which differs between libraries, does not show.

    Raises:
        ValueError: the last axis of `hidden` is not the projection's width.
    """
    if hidden.shape[-1] != signs.shape[0]:
        raise ValueError(f"hidden states of width {hidden.shape[-1]} against a projection of width {signs.shape[0]}")
    exact = np.asarray(hidden, dtype=np.float32).astype(np.float64) @ signs.astype(np.float64)
    return exact.astype(np.float32)


def probe_ids(vocab_size: int, count: int, seed: int = SKETCH_SEED) -> NDArray[np.int32]:
    """Return `count` token ids over the whole vocabulary: a random one of each of `count` equal spans.

    Fewer if the vocabulary is smaller. They show errors in rows of the output head that no prompt predicts.
    """
    count = min(count, vocab_size)
    edges = (np.arange(count + 1, dtype=np.uint64) * np.uint64(vocab_size)) // np.uint64(count)
    spans = edges[1:] - edges[:-1]
    return (edges[:-1] + splitmix64(seed ^ 0x5EED, count) % spans).astype(np.int32)


def relative_error(expected: ArrayLike, actual: ArrayLike, norms: ArrayLike) -> NDArray[np.float64]:
    """Return |actual - expected| / |expected| per position, from sketches [..., 64] and exact expected norms [...]."""
    a, b = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    width = a.shape[-1]
    distance = np.sqrt(((a - b) ** 2).sum(axis=-1) / width)
    return np.asarray(distance / np.maximum(np.asarray(norms, np.float64), 1e-30), dtype=np.float64)
