"""Are tokenizer, files, stored pack and loss checked correctly, is the cause right, and has every KL its direction?

The tests use synthetic packs and devices (synthetic.py, device_faults.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from edgelm.parity import check
from edgelm.parity.check import first_divergence, integrity_check, judge, same_pack, tokenizer_checks
from edgelm.parity.limits import LIMITS, LOSS_WARNINGS, SAME_PACK
from edgelm.parity.logits import divergence, float_kl, float_loss
from edgelm.parity.pack import TokenizerPrint
from edgelm.tokenization.tokenizer import Tokenizer

from .conftest import CHECKPOINTS
from .device_faults import (
    INSIDE,
    OUTSIDE,
    embedding,
    failures,
    greedy_error,
    greedy_kl,
    greedy_tokens,
    head,
    judged,
    kl_max,
    layer,
    perplexity_above,
)
from .synthetic import ALL, COUNT, FIRST, SECOND, diverge, kl, make_scene, record_of


def test_integrity_fails_with_the_first_problem():
    assert integrity_check([]).passed is True
    failed = integrity_check(["model.onnx.data has another hash"])
    assert (failed.name, failed.passed, failed.detail) == ("integrity", False, "model.onnx.data has another hash")


@pytest.fixture(scope="module")
def own_tokens():
    """A tokenizer, and a pack with two prompts encoded by it, the second one truncated."""
    tokenizer = Tokenizer.from_folder(CHECKPOINTS / "olmoe-tiny")
    pack = make_scene(LIMITS["int4"], dense=True).pack
    ids, prompts = pack.ids.copy(), []
    for prompt, text, length in zip(pack.prompts[:2], ("def f(x):", "import os\n" * 9), (None, 7), strict=True):
        found = tokenizer.encode(text)[:length]
        ids[prompt.start : prompt.start + len(found)] = found
        prompts.append(replace(prompt, text=text, decoded=tokenizer.decode(found), length=len(found)))
    known = TokenizerPrint(tokenizer.vocab_size, tokenizer.fingerprint())
    return tokenizer, replace(pack, prompts=tuple(prompts), ids=ids, tokenizer=known)


def one_id(pack):
    ids = pack.ids.copy()
    ids[pack.prompts[1].start + 6] += 1
    return replace(pack, ids=ids)


def one_text(pack):
    first, second = pack.prompts
    return replace(pack, prompts=(first, replace(second, decoded=f"{second.decoded} ")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pack: pack, set()),
        (lambda pack: replace(pack, tokenizer=None), set()),
        (one_id, {"tokenizer.encode", "tokenizer.decode"}),  # another id decodes to another text
        (one_text, {"tokenizer.decode"}),
        (lambda pack: replace(pack, prompts=(replace(pack.prompts[0], text="def g(x):"),)), {"tokenizer.encode"}),
        (lambda pack: replace(pack, tokenizer=replace(pack.tokenizer, sha256="0" * 64)), {"tokenizer.vocabulary"}),
        (lambda pack: replace(pack, tokenizer=replace(pack.tokenizer, vocab_size=7)), {"tokenizer.vocabulary"}),
    ],
)
def test_a_wrong_tokenizer_fails_the_right_check(own_tokens, change, expected):
    tokenizer, pack = own_tokens
    assert {item.name for item in tokenizer_checks(tokenizer, change(pack)) if not item.passed} == expected


def test_a_tokenizer_that_does_not_load_is_a_failed_check(own_tokens, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    none, checks = check._tokenizer(SimpleNamespace(path=tmp_path), own_tokens[1])
    assert none is None
    assert [(item.name, item.passed) for item in checks] == [("tokenizer", False)]


def moved_sketches(record, share, size):
    """Return a record whose hidden states differ by `size`, at a share of the positions of every layer."""
    rows = slice(0, round(share * COUNT))
    sketches = record.sketches.astype(np.float64)
    sketches[:, rows] *= 1 + size
    return replace(record, sketches=sketches)


def moved_logits(record, share, size):
    rows = slice(0, round(share * COUNT))
    top, probes = record.top_logits.astype(np.float64), record.probe_logits.astype(np.float64)
    spread = np.concatenate([top, probes], axis=1).std(axis=1)[rows]
    for part in (top, probes):
        part[rows] += size * spread[:, None]
    return replace(record, top_logits=top, probe_logits=probes)


@pytest.mark.parametrize("which", ["reference", "quantized"])
@pytest.mark.parametrize("moved", [moved_sketches, moved_logits])
def test_a_stored_pack_may_differ_by_rounding_only(which, moved):
    stored = make_scene(LIMITS["int4"], dense=False).pack

    def recomputed(share, size):
        return replace(stored, **{which: moved(getattr(stored, which), share, size)})

    # The distance is relative to the reference pack; one position in a hundred may be a changed near-tie.
    assert same_pack(recomputed(1, INSIDE * SAME_PACK), stored).passed
    assert same_pack(recomputed(0.005, 1.0), stored).passed
    failed = same_pack(recomputed(0.02, OUTSIDE * SAME_PACK), stored)
    assert (failed.name, failed.passed, failed.limit) == ("pack", False, SAME_PACK)


def test_a_stored_pack_of_other_tokens_or_another_model_fails():
    moe, dense = (make_scene(LIMITS["int4"], dense=flag).pack for flag in (False, True))
    assert "tokens differ" in same_pack(one_id(moe), moe).detail
    assert "tokens differ" in same_pack(replace(moe, ids=moe.ids[:-1]), moe).detail
    smaller = replace(dense.reference, sketches=dense.reference.sketches[:-1])
    assert "another model" in same_pack(dense, replace(dense, reference=smaller)).detail
    assert same_pack(moe, moe).passed


def test_the_loss_against_the_float_model_is_a_check_only_on_request():
    scene = make_scene(LIMITS["int4"], dense=True)
    diverge(scene, "at_once", ALL, 0.2)
    loss = float_loss(scene.pack, scene.device.run(scene.pack).at_once, "int4")
    assert loss.kl == pytest.approx(kl(scene.exact, scene.device.at_once).mean(), rel=1e-5)
    assert loss.kl_reference == pytest.approx(kl(scene.exact, scene.target).mean(), rel=1e-5)
    assert float_kl(loss, loss.kl).passed
    failed = float_kl(loss, loss.kl * (1 - 1e-9))
    assert (failed.name, failed.passed) == ("float_kl", False)
    assert float_kl(replace(loss, kl=math.nan), 1e9).passed is False


def test_an_unknown_loss_is_not_within_a_limit():
    pack = replace(make_scene(LIMITS["none"], dense=True).pack, quantized=None)
    device = SimpleNamespace(**vars(pack.reference))
    unknown = float_loss(pack, device, "int4")
    assert not unknown.known
    assert float_kl(unknown, 1e9).passed is False
    assert float_loss(pack, device, "none").known


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize(("kl_share", "perplexity_share"), [(0.98, 0.98), (1.02, 0.98), (0.98, 1.02)])
def test_a_loss_is_called_large_above_the_limit_of_its_kind(kind, kl_share, perplexity_share):
    scene, large = make_scene(LIMITS["int4"], dense=True), LOSS_WARNINGS[kind]
    scene.target, scene.device.at_once = scene.exact - 1, scene.exact - 1  # initially the device equals the float model
    diverge(scene, "at_once", ALL, kl_share * large.kl)
    rows = np.flatnonzero(scene.pack.has_next)
    scene.device.at_once[rows, scene.pack.next_ids[rows]] -= math.log1p(perplexity_share * large.perplexity)
    warning = float_loss(scene.pack, scene.device.run(scene.pack).at_once, kind).warning
    assert (warning is None) == (kl_share < 1 and perplexity_share < 1)
    if warning:
        assert ("KL" in warning, "perplexity" in warning) == (kl_share > 1, perplexity_share > 1)


def test_without_data_no_check_passes_or_fails():
    scene = make_scene(LIMITS["int4"], dense=True)
    scene.pack = replace(scene.pack, prompts=tuple(replace(prompt, greedy=()) for prompt in scene.pack.prompts))
    assert (judged(scene, "greedy").passed, failures(scene)) == (None, set())
    singles = tuple(replace(scene.pack.prompts[0], start=i, length=1) for i in range(COUNT))
    scene.pack = replace(scene.pack, prompts=singles)
    assert (judged(scene, "perplexity").passed, failures(scene)) == (None, set())
    unclear = replace(scene.pack.quantized, gap=np.zeros(COUNT, np.float32))
    scene.pack = replace(scene.pack, quantized=unclear)
    assert (judged(scene, "logits.top1").passed, failures(scene)) == (None, set())


@pytest.mark.parametrize(
    ("faults", "traced", "cause"),
    [
        ((kl_max, greedy_kl), True, "the shipped graph"),
        ((perplexity_above,), True, "the shipped graph"),
        ((kl_max, greedy_kl), False, None),
        ((greedy_error,), True, "decoding with the KV cache"),
        ((greedy_tokens,), False, "decoding with the KV cache"),
        ((head, kl_max, greedy_kl), True, "final norm or output head"),
        ((layer, head, kl_max), True, "layer 1"),
        ((embedding, layer), True, "embedding"),
    ],
)
def test_the_cause_is_the_most_specific_one(faults, traced, cause):
    scene = make_scene(LIMITS["int4"], dense=True)
    for fault in faults:
        fault(scene, 2)
    run = scene.device.run(scene.pack)
    if not traced:
        run.trace = None
    checks, diagnosis = judge(scene.pack, run, scene.limits)
    assert (diagnosis is None) == (not traced)
    found = first_divergence(diagnosis, checks)[1]
    assert found == cause if cause is None else cause in found


# P = (1/2, 1/2), Q = (1/4, 3/4): KL(P || Q) = ln(4/3) / 2 and KL(Q || P) = 3/4 ln(3) - ln(2).
HALVES, QUARTERS = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
FORWARD, BACKWARD = math.log(4 / 3) / 2, 0.75 * math.log(3) - math.log(2)


def sampled(logits):
    return SimpleNamespace(top_logits=logits, logsumexp=np.log(np.exp(logits).sum(1)), probe_logits=logits)


def test_kl_is_from_the_expected_to_the_actual():
    assert pytest.approx(0.143841, abs=1e-6) == FORWARD
    assert pytest.approx(0.130812, abs=1e-6) == BACKWARD
    assert divergence(sampled(HALVES), sampled(QUARTERS)) == pytest.approx(FORWARD, rel=1e-12)
    assert divergence(sampled(QUARTERS), sampled(HALVES)) == pytest.approx(BACKWARD, rel=1e-12)
    assert divergence(sampled(HALVES), sampled(QUARTERS), np.array([0, 0])) == pytest.approx([FORWARD] * 2)


def halves_and_quarters(scene, where):
    """Give the two likely tokens 1/2 each in the target, and 1/4 and 3/4 on the device."""
    for logits, (first, second) in ((scene.target, HALVES[0]), (scene.exact, HALVES[0]), (where, QUARTERS[0])):
        logits[:] = -60.0
        logits[:, FIRST], logits[:, SECOND] = first, second
    record = record_of(scene.pack, scene.target, scene.pack.target.sketches, None)
    scene.pack = replace(scene.pack, reference=record, quantized=record)


@pytest.mark.parametrize(
    ("where", "names"),
    [("at_once", {"logits.kl_mean", "logits.kl_p99", "logits.kl_max"}), ("decoded", {"greedy.kl"})],
)
def test_every_kl_of_the_checks_is_from_the_reference_to_the_device(where, names):
    scene = make_scene(LIMITS["int4"], dense=True)
    halves_and_quarters(scene, getattr(scene.device, where))
    for name in names:
        assert judged(scene, name).value == pytest.approx(FORWARD, rel=1e-6), name
    if where == "at_once":
        loss = float_loss(scene.pack, scene.device.run(scene.pack).at_once, "int4")
        assert loss.kl == pytest.approx(FORWARD, rel=1e-6)
        swapped = replace(
            scene.pack, reference=record_of(scene.pack, scene.device.at_once, scene.pack.target.sketches, None)
        )
        loss = float_loss(swapped, scene.device.run(scene.pack).at_once, "int4")
        assert loss.kl_reference == pytest.approx(BACKWARD, rel=1e-6)
