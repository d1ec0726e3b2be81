"""Do the running sums over blocks of the vocabulary give the right distances?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgelm.evaluation import distances
from edgelm.evaluation.distances import Comparison, Predictions, divergence, standard_error
from edgelm.evaluation.result import frontier


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def random_pair(rows=23, vocab=57, seed=1):
    rng = np.random.default_rng(seed)
    # Logits ascend along the vocabulary, so that every block has a new maximum; in every other row exp would overflow.
    steep = np.where(np.arange(rows) % 2, 900, 5)[:, None]
    a = (rng.standard_normal((rows, vocab)) * 3 + np.linspace(0, 1, vocab) * steep).astype(np.float32)
    b = (a + rng.standard_normal((rows, vocab))).astype(np.float32)
    a[5], b[5] = a[5, ::-1], b[5, ::-1]
    return a, b, rng.integers(0, vocab, rows)


@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
@pytest.mark.parametrize("width", [1, 10, 57])
def test_kl_from_blocks_equals_the_sum_over_the_whole_vocabulary(width, elements, monkeypatch):
    monkeypatch.setattr(distances, "_ELEMENTS", elements)
    a, b, following = random_pair()
    found = Comparison(following)
    for start in range(0, 57, width):
        part = slice(start, start + width)
        found.add(start, a[:9, part], b[:9, part], 0)
        found.add(start, a[9:, part], b[9:, part], 9)
    p, q = log_softmax(a), log_softmax(b)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-10, atol=2e-12)  # 900 has 1e-13
    assert found.kl.max() > 0.1
    rows = np.arange(len(a))
    np.testing.assert_allclose(found.reference.loss, -p[rows, following], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.target.loss, -q[rows, following], rtol=1e-12, atol=1e-12)
    assert np.array_equal(found.reference.best, a.argmax(axis=1))
    assert np.array_equal(found.target.best, b.argmax(axis=1))


def test_a_constant_on_all_logits_changes_nothing():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 30)).astype(np.float32)
    b = (a + 0.1 * rng.standard_normal((4, 30))).astype(np.float32)
    following = np.zeros(4, np.int64)
    plain, moved = Comparison(following), Comparison(following)
    plain.add(0, a, b)
    moved.add(0, a, b + np.float32(64))
    # Sums below 128 are rounded to 2^-18. The error of KL is the mean of such errors under P, at most the largest.
    np.testing.assert_allclose(moved.kl, plain.kl, rtol=0, atol=2**-17)
    assert (plain.kl > 100 * 2**-17).all()


def test_kl_is_from_the_float_model_to_the_target():
    """P = (1/2, 1/2) and Q = (1/4, 3/4), by hand."""
    p, q = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.25, 0.75]]).astype(np.float32)
    for reference, target, expected in ((p, q, math.log(4 / 3) / 2), (q, p, 0.75 * math.log(3) - math.log(2))):
        reference, target = reference + np.float32(3), target - np.float32(2)  # a constant changes nothing
        whole, parts = Comparison(np.array([1])), Comparison(np.array([1]))
        whole.add(0, reference, target)
        for token in (0, 1):
            parts.add(token, reference[:, token : token + 1], target[:, token : token + 1])
        assert whole.kl == pytest.approx([expected], rel=1e-6)
        assert parts.kl == pytest.approx([expected], rel=1e-6)
        assert whole.reference.loss == pytest.approx(3 - reference[:, 1], rel=1e-6)
        assert whole.target.loss == pytest.approx(-2 - target[:, 1], rel=1e-6)


def test_equal_logits_have_zero_kl():
    a, _, following = random_pair()
    found = Comparison(following)
    found.add(0, a, a)
    assert (found.kl == 0).all()


def test_nan_logits_do_not_count_as_equal():
    a, b, following = random_pair()
    b[3, 7] = np.nan
    found = Comparison(following)
    found.add(0, a, b)
    assert np.isnan(found.kl[3])
    assert np.isfinite(np.delete(found.kl, 3)).all()


def test_of_equal_logits_the_first_is_the_most_likely_token():
    logits = np.zeros((2, 6), np.float32)
    logits[1, [2, 5]] = 1
    found = Predictions(np.zeros(2, np.int64))
    for start in (0, 3):
        found.add(start, logits[:, start : start + 3])
    assert found.best.tolist() == [0, 2]


def test_the_standard_error_is_that_of_the_mean_over_windows():
    values = [1.0, 2.0, 4.0, 9.0]
    mean = 4.0
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
    assert standard_error(values) == pytest.approx(spread / 2)
    assert math.isnan(standard_error([1.0]))
    # The sample is the windows, not the tokens: a window of equal values counts once.
    kl = np.repeat(np.array(values)[:, None], 10, axis=1)
    assert divergence(kl, np.ones(40, bool)).standard_error == pytest.approx(spread / 2)


def test_summary_of_a_divergence():
    kl = np.arange(100.0).reshape(4, 25)
    found = divergence(kl, np.arange(100) % 4 != 0)
    assert (found.mean, found.median, found.top1) == (49.5, 49.5, 0.75)
    assert found.p99 == pytest.approx(98.01)


def test_the_frontier_is_the_pareto_frontier():
    points = [(4.0, 1.0), (3.0, 2.0), (3.0, 3.0), (5.0, 1.0), (8.0, 0.5), (2.0, math.nan), (6.0, 0.7)]
    assert frontier(points) == [1, 0, 6, 4]
    assert frontier([]) == []
