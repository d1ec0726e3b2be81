"""Are the parity metrics computed by their definitions?"""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from edgelm.parity.diagnose import choose, expert_flips, guilty_experts, router_margin
from edgelm.parity.logits import GreedyResult, agreement, bucketed_kl, greedy_prefix, logit_error, logsumexp, perplexity
from edgelm.parity.sketch import SKETCH_SEED, probe_ids, relative_error, sign_matrix, sketch, splitmix64


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def true_kl(p_logits, q_logits):
    p, q = softmax(p_logits), softmax(q_logits)
    return (p * (np.log(p) - np.log(q))).sum(-1)


def top(logits, k):
    return np.argsort(-logits, axis=-1)[:, :k]


def bucketed(p_logits, q_logits, ids):
    return bucketed_kl(
        np.take_along_axis(p_logits, ids, 1),
        logsumexp(p_logits),
        np.take_along_axis(q_logits, ids, 1),
        logsumexp(q_logits),
    )


def test_splitmix64_gives_the_published_sequence():
    # The first outputs for seed 1234567, as in the reference implementation (Vigna's splitmix64.c).
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, 5).tolist() == expected


def test_signs_are_balanced_and_independent_of_the_number_asked_for():
    signs = sign_matrix(2048)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.01
    assert np.array_equal(sign_matrix(64), signs[:64])


def test_the_default_signs_are_unchanged():
    # Existing packs use exactly these signs.
    assert SKETCH_SEED == 0x456467654C4D3031
    assert zlib.crc32(sign_matrix(2048).tobytes()) == 3350420698


def test_a_sketch_estimates_distances_within_its_stated_error():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200, 512)).astype(np.float32)
    b = a + 0.05 * rng.standard_normal((200, 512)).astype(np.float32)
    signs = sign_matrix(512)
    estimate = relative_error(sketch(a, signs), sketch(b, signs), np.linalg.norm(a, axis=1))
    truth = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    assert np.std(estimate / truth) == pytest.approx(0.09, abs=0.02)
    assert np.mean(estimate / truth) == pytest.approx(1.0, abs=0.03)


def test_a_sketch_of_another_width_is_refused():
    with pytest.raises(ValueError, match="width 3"):
        sketch(np.zeros((2, 3), np.float32), sign_matrix(4))


def test_probes_are_distinct_and_cover_the_vocabulary():
    ids = probe_ids(50304, 64)
    assert len(set(ids.tolist())) == 64
    assert ids.min() >= 0
    assert ids.max() < 50304
    assert np.all(np.diff(ids) > 0)
    assert probe_ids(10, 64).tolist() == list(range(10))


def test_bucketed_kl_is_exact_when_every_token_is_recorded():
    rng = np.random.default_rng(1)
    p, q = rng.standard_normal((2, 5, 64)) * 3
    ids = top(p, 64)
    assert bucketed(p, q, ids) == pytest.approx(true_kl(p, q), rel=1e-6)


def test_bucketed_kl_is_a_lower_bound_and_zero_for_equal_distributions():
    rng = np.random.default_rng(2)
    p = rng.standard_normal((50, 1000)) * 2
    q = p + 0.3 * rng.standard_normal((50, 1000))
    ids = top(p, 64)
    bound, truth = bucketed(p, q, ids), true_kl(p, q)
    assert np.all(bound <= truth + 1e-9)
    assert np.all(bound > 0)
    assert bucketed(p, p + 7, ids) == pytest.approx(np.zeros(50), abs=1e-9)


def test_bucketed_kl_has_the_right_direction_in_the_bucket():
    """P = (1/2, 1/2) and Q = (1/4, 3/4), with both tokens recorded, either one, or a bucket of two halves."""
    forward, backward = math.log(4 / 3) / 2, 0.75 * math.log(3) - math.log(2)
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    for recorded in ([0, 1], [0], [1]):
        a, b = p[:, recorded], q[:, recorded]
        assert bucketed_kl(a, [0.0], b, [0.0]) == pytest.approx([forward], rel=1e-9)
        assert bucketed_kl(b, [0.0], a, [0.0]) == pytest.approx([backward], rel=1e-9)
    # Each log-sum-exp is over the whole vocabulary of its own logits.
    assert bucketed_kl(p + 3, [3.0], q - 2, [-2.0]) == pytest.approx([forward], rel=1e-9)


def test_bucketed_kl_of_unrelated_logits_is_large():
    p = np.zeros((1, 8))
    q = np.full((1, 8), np.nan)
    assert not bucketed(p, q, top(p, 4))[0] <= 1e9


def test_logit_error_ignores_a_constant_and_measures_noise():
    rng = np.random.default_rng(3)
    a = rng.standard_normal((4, 64)) * 5
    shifted = logit_error(a, a + 3, logsumexp(a), logsumexp(a + 3))
    assert shifted == pytest.approx(np.zeros(4), abs=1e-9)
    noise = 0.5 * rng.standard_normal(a.shape)
    by_hand = [
        math.sqrt(sum(x * x for x in row) / 64) / spread for row, spread in zip(noise, a.std(axis=1), strict=True)
    ]
    assert logit_error(a, a + noise) == pytest.approx(by_hand, rel=1e-12)
    # The error is relative to the spread of the expected logits, so it is not symmetric.
    assert logit_error([[0.0, 2.0]], [[0.0, 6.0]]) == pytest.approx([math.sqrt(8)], rel=1e-12)


def test_agreement_uses_a_mask_and_is_nan_for_an_empty_one():
    assert agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    assert agreement([1, 2, 3, 4], [1, 2, 0, 4], np.array([True, False, True, False])) == 0.5
    assert np.isnan(agreement([1], [1], np.array([False])))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    logits = np.zeros((6, 50))
    lse = logsumexp(logits)
    assert perplexity(logits[:, 0], lse, np.ones(6, bool)) == pytest.approx(50)


def test_greedy_prefix_allows_a_near_tie_but_not_another_clear_choice():
    assert greedy_prefix([1, 2, 3], [1, 2, 3], [1, 1, 1], 0.1) == GreedyResult(3, 3, 0)
    assert greedy_prefix([1, 2, 3], [1, 9, 9], [1, 0.01, 5], 0.1) == GreedyResult(3, 1, 1)
    assert greedy_prefix([1, 2, 3], [1, 9, 9], [1, 0.1, 5], 0.1) == GreedyResult(3, 1, 2)
    assert greedy_prefix([], [], [], 0.1) == GreedyResult(0, 0, 0)


def test_router_margin_is_scale_free_and_infinite_when_all_are_chosen():
    logits = np.array([[5.0, 3.0, 2.5, 0.0]])
    spread = logits.std()
    assert router_margin(logits, 2)[0] == pytest.approx(0.5 / spread)
    assert router_margin(10 * logits, 2)[0] == pytest.approx(0.5 / spread)
    assert np.isinf(router_margin(logits, 4)[0])


def test_expert_flips_are_compared_as_sets_with_their_severity():
    router = np.array([[4.0, 3.0, 2.9, 0.0]] * 3)
    flips = expert_flips(router, [[0, 1]] * 3, [[1, 0], [0, 2], [0, 3]])
    assert flips.changed.tolist() == [False, True, True]
    spread = router[0].std()
    assert flips.severity == pytest.approx([0, 0.1 / spread, 3 / spread])


def make_routes(count=300, total=64, k=8, seed=4):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((count, total)), axis=1)[:, :k]


def test_one_wrong_expert_is_named():
    experts = make_routes()
    bad = (experts == 17).any(1)
    assert guilty_experts(experts, bad, ~bad) == [17]


def test_two_swapped_experts_are_named():
    experts = make_routes(total=32, k=4)
    bad = ((experts == 3) | (experts == 21)).any(1)
    assert guilty_experts(experts, bad, ~bad) == [3, 21]


def test_a_wrong_expert_with_a_small_weight_somewhere_is_named():
    experts = make_routes()
    bad = (experts == 17).any(1)
    bad[np.flatnonzero(bad)[0]] = False
    assert guilty_experts(experts, bad, ~bad) == [17]


def test_wrong_expert_weights_are_not_blamed_on_single_experts():
    experts = make_routes()
    everything = np.ones(len(experts), bool)
    assert guilty_experts(experts, everything, ~everything) is None
    most = everything.copy()
    most[:10] = False
    assert guilty_experts(experts, most, ~most) is None


def test_choose_takes_the_largest_in_order():
    assert choose([[1.0, 5.0, 3.0, 5.0]], 3).tolist() == [[1, 3, 2]]


def test_logit_error_at_likely_tokens_ignores_the_others():
    rng = np.random.default_rng(4)
    a = rng.standard_normal((4, 64)) * 5
    improbable = np.argsort(-a, axis=1)[:, 16:]
    b = a.copy()
    np.put_along_axis(b, improbable, np.take_along_axis(a, improbable, axis=1) + 1, axis=1)
    assert logit_error(a, b).min() > 0.1
    assert logit_error(a, b, likely=16) == pytest.approx(np.zeros(4), abs=1e-12)
    assert logit_error(a, b + 0.5, likely=16) == pytest.approx(0.5 / a.std(axis=1))
