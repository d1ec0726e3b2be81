"""Do the limits from simulated rounding pass every other draw of the same rounding, and fail larger errors?"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from small_checkpoint import tokens, write_small
from test_parity_pack import make_pack, make_record

from edgelm.parity.limits import LIMITS
from edgelm.parity.logits import greedy_checks, logit_checks
from edgelm.parity.noise import rounding_limits
from edgelm.parity.pack import GoldenPrompt, RoundedRecord
from edgelm.reference.hooks import Hooks, LaterRows
from edgelm.reference.layerwise import LayerwiseReference

VOCAB, TOP, COUNT = 300, 64, 400


def draw(rng, logits, noise, flips, scale=1.0):
    """Return logits with simulated rounding: small noise everywhere, and at some positions another expert's output."""
    flipped = rng.random(len(logits)) < flips
    size = np.where(flipped, 30.0, 1.0)[:, None] * noise * scale
    return logits + size * rng.standard_normal(logits.shape), flipped


def sampled(pack, logits):
    total = np.log(np.exp(logits).sum(axis=1))
    rows = np.arange(len(logits))
    return {
        "top_logits": np.take_along_axis(logits, pack.top_ids, axis=1),
        "probe_logits": logits[:, pack.probe_ids],
        "next_logit": logits[rows, pack.next_ids],
        "logsumexp": total,
        "best": logits.argmax(axis=1),
    }


def packed(rng, noise, flips):
    """Return a pack whose target has random logits, with one draw of rounding recorded, and the target's logits."""
    logits = 3 * rng.standard_normal((COUNT, VOCAB))
    prompts = tuple(GoldenPrompt(f"p{i}", "", "", 40 * i, 33, tuple(range(8))) for i in range(10))
    pack = replace(
        make_pack(),
        prompts=prompts,
        ids=rng.integers(0, VOCAB, COUNT).astype(np.int32),
        top_ids=np.argsort(-logits)[:, :TOP].astype(np.int32),
        probe_ids=np.arange(0, VOCAB, 5, dtype=np.int32),
    )
    ordered = np.sort(logits)
    record = replace(make_record(rng, count=COUNT), gap=ordered[:, -1] - ordered[:, -2], **sampled(pack, logits))
    pack = replace(pack, reference=record, quantized=record)
    moved, flipped = draw(rng, logits, noise, flips)
    rounded = RoundedRecord(
        np.arange(COUNT, dtype=np.int32), **sampled(pack, moved), flipped=flipped.astype(np.int32), kv="float16"
    )
    return replace(pack, rounded=rounded), logits


def failures(pack, limits, logits):
    record = SimpleNamespace(**sampled(pack, logits), seen=np.ones(COUNT, dtype=bool))
    checks = [*logit_checks(pack, record, limits), *greedy_checks(pack, record, limits)]
    return {check.name for check in checks if check.passed is False}


@pytest.mark.parametrize(("noise", "flips"), [(1e-3, 0.0), (0.02, 0.05), (0.3, 0.0), (0.1, 0.3), (2.0, 0.5)])
def test_other_draws_of_the_same_rounding_pass(noise, flips):
    rng = np.random.default_rng(7)
    failed = []
    for _ in range(10):
        pack, logits = packed(rng, noise, flips)
        limits = rounding_limits(pack, LIMITS["int4"])
        failed += [failures(pack, limits, draw(rng, logits, noise, flips)[0]) for _ in range(4)]
    assert not any(failed), failed


@pytest.mark.parametrize("noise", [1e-3, 0.02])
def test_three_times_the_rounding_fails_unlike_with_fixed_limits(noise):
    rng = np.random.default_rng(8)
    pack, logits = packed(rng, noise, 0.0)
    worse = draw(rng, logits, noise, 0.0, scale=3)[0]
    assert {"logits.error", "greedy.error"} <= failures(pack, rounding_limits(pack, LIMITS["int4"]), worse)
    assert not failures(pack, LIMITS["int4"], worse)


def test_an_error_at_a_tenth_of_the_positions_is_detected():
    rng = np.random.default_rng(9)
    pack, logits = packed(rng, 0.02, 0.0)
    device = draw(rng, logits, 0.02, 0.0)[0]
    device[::7] = draw(rng, logits[::7], 0.3, 0.0)[0]
    assert "logits.error_p90" in failures(pack, rounding_limits(pack, LIMITS["int4"]), device)


def test_a_pack_without_rounded_record_has_the_fixed_limits():
    pack = make_pack()
    assert rounding_limits(pack, LIMITS["int4"]) is LIMITS["int4"]


def test_small_rounding_keeps_the_limits_of_float32():
    pack, _ = packed(np.random.default_rng(3), 0.0, 0.0)
    dense = replace(pack, reference=replace(pack.reference, router=None, experts=None), quantized=None)
    limits = rounding_limits(dense, LIMITS["int4"])
    exact = LIMITS["none"]
    assert (limits.kl_mean, limits.kl_max, limits.logit_error) == (exact.kl_mean, exact.kl_max, exact.logit_error)
    assert (limits.top1_clear, limits.clear_gap) == (1.0, exact.clear_gap)


def statistics(pack):
    """Return by definition, at every position: KL, error of all recorded tokens, of the 16 most likely, and spread."""
    want, rounded = pack.target, pack.rounded
    columns = [np.concatenate([one.top_logits, one.probe_logits], axis=1) for one in (want, rounded)]
    a, b = (logits - one.logsumexp[:, None] for logits, one in zip(columns, (want, rounded), strict=True))
    squares, spread = (a - b) ** 2, a.std(axis=1)
    likely = np.take_along_axis(squares, np.argsort(-a, axis=1)[:, :16], axis=1)
    log_p, log_q = a[:, :TOP], b[:, :TOP]
    rest = np.stack([1 - np.exp(part).sum(axis=1) for part in (log_p, log_q)])
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest[0] * np.log(rest[0] / rest[1])
    return kl, np.sqrt(squares.mean(axis=1)) / spread, np.sqrt(likely.mean(axis=1)) / spread, spread


SAMPLED = ("top_logits", "probe_logits", "next_logit", "logsumexp", "best")
# Standard deviations of a difference of means: of two samples of 400 positions, and of 80 steps and 400 positions.
BETWEEN, OF_STEPS = (2 / 400) ** 0.5, (1 / 80 + 1 / 400) ** 0.5


@pytest.mark.parametrize("dense", [True, False])
def test_limits_follow_the_documentation(dense):
    """Factors of 2 in size, 4 in KL and 16 in the largest KL, plus three standard deviations and float32's limits."""
    pack, _ = packed(np.random.default_rng(4), 0.02, 0.0)
    if dense:
        reference = replace(pack.reference, router=None, experts=None)
        pack = replace(pack, reference=reference, quantized=None)
    limits = rounding_limits(pack, LIMITS["int4"])
    kl, error, likely, spread = statistics(pack)
    # A changed choice of experts, of which the simulation had none, may cost one nat; in a second sample four.
    unseen = 0.0 if dense else 1.0
    assert limits.kl_mean == pytest.approx(1e-6 + 4 * (kl.mean() + 3 * kl.std() * BETWEEN) + unseen / 400, rel=1e-3)
    assert limits.kl_p99 == pytest.approx(1e-5 + 4 * kl.max(), rel=1e-3)
    assert limits.kl_max == pytest.approx(1e-4 + max(16 * kl.max(), 4 * unseen), rel=1e-3)
    assert limits.logit_error == pytest.approx(1e-4 + 2 * np.quantile(error, 0.5 + 1.5 * BETWEEN), rel=1e-3)
    ninth = 0.9 + 0.9 * BETWEEN
    assert limits.logit_error_p90 == pytest.approx(3e-4 + 2 * np.quantile(error, ninth), rel=1e-3)
    assert limits.decode_error == pytest.approx(1e-4 + 2 * np.quantile(likely, 0.5 + 1.5 * OF_STEPS), rel=1e-3)
    gap = 1e-2 + 8 * 2**0.5 * np.quantile(error * spread, ninth)
    assert limits.clear_gap == pytest.approx(gap, rel=1e-3)
    want, rounded = pack.target, pack.rounded
    before, after = (one.next_logit - one.logsumexp for one in (want, rounded))
    change = (after - before)[pack.has_next]
    bound = abs(change.mean()) + 3 * change.std() * (2 / len(change)) ** 0.5
    assert limits.perplexity == pytest.approx(1e-4 + np.expm1(2 * bound + unseen / len(change)), rel=1e-3)
    assert not (rounded.best != want.best)[want.gap >= gap].any()
    clear = int((want.gap >= gap).sum())
    share = 0.0 if dense else ((3 / 8 / clear) ** 0.5 + 1.5 * (2 / clear) ** 0.5) ** 2
    assert limits.top1_clear == pytest.approx(1 - share, rel=1e-3)
    steps = sum(int((want.gap[prompt.greedy_positions] >= gap).sum()) for prompt in pack.prompts)
    root = (3 / 8 / clear) ** 0.5 + 1.5 * (1 / steps + 1 / clear) ** 0.5
    assert limits.greedy_clear == (0 if dense else int(steps * root**2))


def test_the_kl_of_the_simulation_is_from_the_target_to_the_rounded():
    pack, _ = packed(np.random.default_rng(6), 1.0, 0.0)
    pack = replace(pack, reference=replace(pack.reference, router=None, experts=None), quantized=None)
    swapped = replace(
        pack,
        reference=replace(pack.reference, **{name: getattr(pack.rounded, name) for name in SAMPLED}),
        rounded=replace(pack.rounded, **{name: getattr(pack.reference, name) for name in SAMPLED}),
    )
    forward, backward = (statistics(one)[0].max() for one in (pack, swapped))
    assert abs(forward / backward - 1) > 0.05
    assert rounding_limits(pack, LIMITS["int4"]).kl_max == pytest.approx(1e-4 + 16 * forward, rel=1e-3)


def test_positions_with_changed_experts_are_counted_with_a_margin():
    pack, _ = packed(np.random.default_rng(5), 0.02, 0.1)
    limits = rounding_limits(pack, LIMITS["int4"])
    kl, flipped = statistics(pack)[0], pack.rounded.flipped != 0
    assert flipped.sum() >= 10
    calm, tipped = np.where(flipped, 0, kl), np.where(flipped, kl, 0)
    smooth = 4 * (calm.mean() + 3 * calm.std() * BETWEEN)
    assert limits.kl_mean == pytest.approx(1e-6 + smooth + 2 * (tipped.mean() + 3 * tipped.std() * BETWEEN), rel=1e-3)
    assert limits.kl_max == pytest.approx(1e-4 + 16 * kl.max(), rel=1e-3)
    clear = pack.target.gap >= limits.clear_gap
    different = int((pack.rounded.best != pack.target.best)[clear].sum())
    root = ((2 * different + 3 / 8) / clear.sum()) ** 0.5 + 1.5 * (2 / clear.sum()) ** 0.5
    assert limits.top1_clear == pytest.approx(1 - root**2, rel=1e-3)


class Coarse(Hooks):
    """Rounds inputs of matmuls and cached keys and values to multiples of 1/4."""

    def inputs(self, matrix, x):
        return (4 * x).round() / 4

    def cached(self, layer, keys, values):
        return (4 * keys).round() / 4, (4 * values).round() / 4


@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_one_run_computes_a_model_and_its_rounded_version(tmp_path, name):
    checkpoint = write_small(tmp_path / name, name)
    ids = list(tokens(2))
    ids[1] = ids[1][:9]
    plain = LayerwiseReference(checkpoint.decoder, checkpoint).step(ids, trace=True)
    coarse = LayerwiseReference(checkpoint.decoder, checkpoint, hooks=Coarse()).step(ids, trace=True)
    later = LaterRows(Coarse(), [len(item) for item in ids + ids], 2)
    both = LayerwiseReference(checkpoint.decoder, checkpoint, hooks=later).step(ids + ids, trace=True)
    for found, expected in zip(both.sequences, plain.sequences + coarse.sequences, strict=True):
        assert np.allclose(found.final, expected.final, atol=1e-5)
        assert np.allclose(found.hidden, expected.hidden, atol=1e-5)
    assert not np.allclose(plain.sequences[0].final, coarse.sequences[0].final, atol=1e-2)
    logits = both.topk(4)[0]
    for found, expected in zip(logits, plain.topk(4)[0] + coarse.topk(4)[0], strict=True):
        assert np.allclose(found.values, expected.values, atol=1e-4)
