"""Is a token told from a shortlist and from sums with errors the one that all logits give, or none?

tests/cuda/test_device_sampling.py does the same with what the GPU kernels find.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.generation.sampling import Sampling, candidates, choose, penalise, weights_of
from edgelm.generation.shortlist import Shortlist, wants_shortlist, wants_sums

V, SEGMENT = 5000, 512
ULP = 2.0**-23


def normal(scale: float = 3.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(V) * scale).astype(np.float32)


def shortlist(
    logits: NDArray[np.float32], options: Sampling, seen: list[int], *, listed: int = 300, error: float = 0.0
) -> Shortlist:
    """Return a shortlist of the `listed` highest logits. `error`: of the sums, relative, with a random sign each."""
    after = penalise(logits, np.array(seen, np.int64), options.repetition_penalty)
    bound = float(np.sort(after)[-listed - 1]) if listed < V else -np.inf
    ids = np.flatnonzero(after > bound) if listed < V else np.arange(V)
    weights = weights_of(after, after.max(), options)
    sums = np.add.reduceat(weights, range(0, V, SEGMENT))
    sums *= 1 + error * np.random.default_rng(1).choice([-1, 1], sums.size)
    return Shortlist(
        V, float(logits.max()), float(after.max()), int(after.argmax()), bound, ids, after[ids], sums, SEGMENT,
        lambda begin, end: logits[begin:end].copy(),
    )  # fmt: skip


@pytest.mark.parametrize("error", [0.0, 6 * ULP])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_draws_at_the_borders_of_tokens_are_right_or_not_told(error: float, penalty: float) -> None:
    options, seen = Sampling(1.1, repetition_penalty=penalty), [4, 600, 4999] if penalty != 1 else []
    logits = normal()
    found = shortlist(logits, options, seen, error=error)
    borders = np.cumsum(candidates(penalise(logits, np.array(seen, np.int64), penalty), options)[1])
    tokens, untold = np.random.default_rng(3).integers(0, V, 300), 0
    for border in borders[tokens]:
        for distance in (0.0, 1e-10, -1e-10, 5e-7, -5e-7, 3e-6, -3e-6):
            uniform = min(max(float(border + distance), 0.0), 1 - 2.0**-53)
            token = found.token(options, seen, uniform)
            untold += token is None
            assert token in (None, choose(logits, options, seen, uniform)), (border, distance)
    assert 300 * 3 <= untold <= 300 * 6  # those within 1e-10 are not told; farther ones are, but for small tokens


@pytest.mark.parametrize("error", [0.0, 6 * ULP])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_nuclei_that_end_at_the_border_of_a_token_are_right_or_not_told(error: float, min_p: float) -> None:
    logits = normal(2.0)
    weights = np.sort(weights_of(logits, logits.max(), Sampling(1.0)))[::-1]
    reached = np.cumsum(weights) / weights.sum()
    for place in (0, 1, 5, 40, 250, 297, 298, 299, 300, 301, 350):
        for distance in (0.0, 1e-12, -1e-12, 3e-7, -3e-7, 1e-5, -1e-5):
            options = Sampling(1.0, top_p=float(reached[place] + distance), min_p=min_p)
            found = shortlist(logits, options, [], error=error)
            for uniform in (0.0, 0.3, 0.77, 0.9999, 1 - 2.0**-53):
                token = found.token(options, (), uniform)
                assert token in (None, choose(logits, options, [], uniform)), (place, distance, uniform)
                assert place > 297 or abs(distance) < 1e-6 or token is not None
                # Beyond the list, min-p alone decides.
                assert place < 301 or (token is not None) == (min_p > 0)


@pytest.mark.parametrize("k", [1, 7, 299, 300, 301, V - 1])
def test_top_k_is_told_if_the_list_has_k_tokens(k: int) -> None:
    options = Sampling(1.0, top_k=k, top_p=0.95, min_p=0.001)
    found = shortlist(normal(), options, [])
    for uniform in (0.0, 0.4, 0.9, 1 - 2.0**-53):
        expected = choose(normal(), options, [], uniform) if k <= 300 else None
        assert found.token(options, (), uniform) == expected


def test_a_list_of_the_whole_vocabulary_tells_every_filter() -> None:
    for options in (Sampling(3.0, top_k=V - 1), Sampling(2.0, top_p=0.9), Sampling(9.0, min_p=0.01)):
        found = shortlist(normal(), options, [], listed=V)
        assert [found.token(options, (), u) for u in (0.1, 0.5, 0.9)] == [
            choose(normal(), options, [], u) for u in (0.1, 0.5, 0.9)
        ]


def test_an_empty_list_and_a_logit_beyond_float32_tell_nothing_but_the_best_token() -> None:
    logits = np.full(V, 1.0, np.float32)
    for options in (Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.5), Sampling(1.0, min_p=0.5)):
        found = shortlist(logits, options, [])
        assert found.ids.size == 0
        assert found.token(options, (), 0.5) is None
    assert shortlist(logits, Sampling(), []).token(Sampling(), (), 0.5) == 0
    options = Sampling(1.0, top_k=5)
    found = shortlist(normal(), options, [])
    assert found.token(options, (), 0.5) is not None
    assert replace(found, top=np.inf).token(options, (), 0.5) is None


@pytest.mark.parametrize(("options", "expected"), [
    (Sampling(), (False, False)),
    (Sampling(1.0), (False, True)),
    (Sampling(1.0, top_k=V), (False, True)),
    (Sampling(1.0, top_k=5), (True, False)),
    (Sampling(1.0, top_k=5, top_p=0.5, min_p=0.1), (True, False)),
    (Sampling(1.0, top_p=0.5), (True, True)),
    (Sampling(1.0, top_p=0.5, min_p=0.1), (True, True)),
    (Sampling(1.0, min_p=0.1), (True, False)),
])  # fmt: skip
def test_what_is_wanted_follows_from_the_options(options: Sampling, expected: tuple[bool, bool]) -> None:
    assert (wants_shortlist(options, V), wants_sums(options, V)) == expected
