"""Are tokens chosen as in transformers, reproducibly, and quickly for a large vocabulary?"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.errors import GenerationError
from edgelm.generation.sampling import Sampler, Sampling, candidates, penalise


def random_logits(size: int, seed: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def distribution(logits: NDArray[np.float32], options: Sampling) -> NDArray[np.float64]:
    """Return the probabilities of the whole vocabulary."""
    ids, probabilities = candidates(logits, options)
    assert len(set(ids.tolist())) == len(ids)
    dense = np.zeros(logits.size)
    dense[ids] = probabilities
    return dense


OPTIONS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=1),
    Sampling(temperature=1.0, top_k=40),
    Sampling(temperature=1.0, top_k=10**6),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=2.5, top_p=0.999),
    Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=0.6, top_k=50, top_p=0.8, min_p=0.02),
    Sampling(temperature=1.5, top_k=7, top_p=0.5),
    Sampling(temperature=1.5, top_k=500, top_p=0.95, min_p=0.2),
]


@pytest.mark.parametrize("size", [5, 97, 5000, 100_000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_equals_that_of_transformers(size: int, options: Sampling) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(size, seed=size)
    # float64, so that rounding in transformers does not move a token across a threshold.
    scores = torch.from_numpy(logits).double()[None]
    if options.temperature != 1:
        scores = warpers.TemperatureLogitsWarper(options.temperature)(None, scores)
    if options.top_k:
        scores = warpers.TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = warpers.TopPLogitsWarper(options.top_p)(None, scores)
    if options.min_p:
        scores = warpers.MinPLogitsWarper(options.min_p)(None, scores)
    np.testing.assert_allclose(distribution(logits, options), scores.softmax(-1)[0].numpy(), rtol=1e-5, atol=1e-300)


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process").RepetitionPenaltyLogitsProcessor(penalty)
    logits = random_logits(97, seed=3)
    seen = np.array([4, 90, 17, 3])
    # transformers also gets repeated ids, and penalises each token once.
    want = process(torch.tensor([[4, 90, 17, 3, 4, 4]]), torch.from_numpy(logits)[None])[0].numpy()
    np.testing.assert_allclose(penalise(logits, seen, penalty), want, rtol=1e-6)


def test_the_repetition_penalty_lowers_logits_of_either_sign() -> None:
    logits = np.array([2, -2, 3, -3], np.float32)
    np.testing.assert_array_equal(penalise(logits, np.array([0, 1]), 2.0), [1, -4, 3, -3])


def test_tokens_that_tie_with_the_kth_are_kept() -> None:
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    np.testing.assert_allclose(distribution(logits, Sampling(1.0, top_k=2)), [0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    np.testing.assert_allclose(distribution(logits, Sampling(1.0, top_p=0.6)), [0, 2 / 3, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(distribution(logits, Sampling(1.0, top_p=0.4)), [0, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("top_p", [0.5, 0.99, 0.9999])
def test_top_p_is_right_beyond_the_first_number_of_candidates(top_p: float) -> None:
    logits = random_logits(60_000, seed=1, scale=0.1)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities = np.sort(probabilities / probabilities.sum())[::-1]
    want = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
    ids, kept = candidates(logits, Sampling(1.0, top_p=top_p))
    assert want > 10_000
    assert ids.size == want
    np.testing.assert_allclose(kept.sum(), 1)


def test_min_p_is_a_fraction_of_the_best() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    ids, _ = candidates(logits, Sampling(1.0, min_p=0.29))
    assert sorted(ids.tolist()) == [0, 1, 2]


def test_greedy_takes_the_best_and_the_penalty_applies_to_it() -> None:
    logits = np.array([0.0, 5.0, 4.0, -1.0], np.float32)
    before = logits.copy()
    assert Sampler(Sampling()).sample(logits) == 1
    sampler = Sampler(Sampling(repetition_penalty=1.5), seen=[3])
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 1]
    assert Sampler(Sampling(repetition_penalty=1.5), seen=[1, 2]).sample(logits) == 1
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(1.0, seed=7))
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=4)
    expected = 4000 * np.array([0.5, 0.3, 0.15, 0.05])
    # Chi-square with 3 degrees of freedom: one in a thousand seeds exceeds 16.3 by chance; this seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


def test_a_seed_repeats_and_other_seeds_differ() -> None:
    logits = random_logits(1000, seed=0, scale=1.0)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, top_p=0.95, seed=seed))
        return [sampler.sample(logits) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_the_stream_of_a_seed_never_changes() -> None:
    # Recorded tokens: they would change with the generator or the inverse, on any platform.
    sampler = Sampler(Sampling(1.0, seed=1234))
    assert [sampler.sample(np.zeros(1000, np.float32)) for _ in range(6)] == EXPECTED_DRAWS


EXPECTED_DRAWS = [976, 380, 923, 261, 319, 118]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_an_error(value: float) -> None:
    logits = np.full(10, -1 if value == math.inf else value, np.float32)
    logits[3] = value
    with pytest.raises(GenerationError, match="highest logit is"):
        Sampler(Sampling()).sample(logits)


def test_tokens_the_model_excludes_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    for options in (Sampling(1.0, seed=1), Sampling(1.0, top_p=0.99, seed=1), Sampling(1.0, top_k=3, seed=1)):
        sampler = Sampler(options)
        assert {sampler.sample(logits) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: it has to be a number, 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1, "top_k": 2.5}, "top_k is 2.5"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"temperature": 1, "top_p": 1.01}, "top_p is 1.01"),
        ({"temperature": 1, "min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"top_p": 0.9, "top_k": 5}, "top_k and top_p would do nothing with temperature 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[4], OPTIONS[9]], ids=str)
def test_a_vocabulary_of_256000_takes_milliseconds(options: Sampling) -> None:
    logits = random_logits(256_000, seed=5)
    sampler = Sampler(options)
    best = math.inf
    for _ in range(5):
        started = time.process_time()
        sampler.sample(logits)
        best = min(best, time.process_time() - started)
    # 1 to 2 ms of CPU time; a full sort takes 25.
    assert best < 0.015


def test_a_draw_has_all_the_bits_of_a_float64() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=7))
    draws = [sampler._uniform() for _ in range(50)]
    # Equals numpy's current method. NumPy guarantees the raw bits, but not their conversion.
    assert draws == np.random.Generator(np.random.PCG64(7)).random(50).tolist()
    assert any(draw * 2**52 != int(draw * 2**52) for draw in draws)
