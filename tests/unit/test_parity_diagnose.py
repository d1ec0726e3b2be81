"""Does the diagnosis find the first diverged layer and its cause, and ignore near-ties? Uses synthetic traces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgelm.parity.diagnose import DeviceTrace, choose, diagnose
from edgelm.parity.limits import LIMITS
from edgelm.parity.pack import GoldenPrompt, ParityPack, ReferenceRecord
from edgelm.parity.sketch import sign_matrix, sketch

LAYERS, WIDTH, EXPERTS, CHOSEN = 4, 256, 16, 2
PROMPTS = (30, 50, 40)
COUNT = sum(PROMPTS)
LIMIT = LIMITS["int4"]


def make(dense=False):
    """Make a synthetic model: hidden states with random updates, and router logits that are a projection of them."""
    rng = np.random.default_rng(0)
    hidden = np.cumsum(rng.standard_normal((LAYERS + 1, COUNT, WIDTH)).astype(np.float32), axis=0)
    gate = rng.standard_normal((LAYERS, WIDTH, EXPERTS)).astype(np.float32)
    starts = np.cumsum([0, *PROMPTS])
    prompts = tuple(GoldenPrompt(f"p{i}", "", "", int(starts[i]), n, ()) for i, n in enumerate(PROMPTS))
    norms, sketches, router, experts = trace_of(hidden, gate)
    nothing = np.zeros((COUNT, 1), np.float32)
    record = ReferenceRecord(
        top_logits=nothing,
        logsumexp=nothing[:, 0],
        probe_logits=nothing,
        next_logit=nothing[:, 0],
        best=np.zeros(COUNT, np.int32),
        gap=nothing[:, 0],
        norms=norms,
        sketches=sketches,
        router=None if dense else router,
        experts=None if dense else experts,
    )
    ids = np.arange(COUNT, dtype=np.int32)
    pack = ParityPack(prompts, ids, np.zeros((COUNT, 1), np.int32), np.zeros(1, np.int32), record, None, None)
    return pack, hidden, gate


def trace_of(hidden, gate):
    signs = sign_matrix(WIDTH)
    router = np.stack([hidden[i] @ gate[i] for i in range(LAYERS)])
    return (
        np.linalg.norm(hidden, axis=-1).astype(np.float32),
        sketch(hidden, signs),
        router,
        choose(router, CHOSEN),
    )


def judge(pack, hidden, gate, router=None, experts=None):
    norms, sketches, own_router, own_experts = trace_of(hidden, gate)
    if pack.reference.router is None:
        return diagnose(pack, DeviceTrace(norms, sketches, None, None), LIMIT)
    router = own_router if router is None else router
    experts = own_experts if experts is None else experts
    return diagnose(pack, DeviceTrace(norms, sketches, router, experts), LIMIT)


def noise(shape, size, seed=1):
    return size * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dense", [False, True])
def test_rounding_is_not_a_divergence(dense):
    pack, hidden, gate = make(dense)
    result = judge(pack, hidden + noise(hidden.shape, 1e-6), gate)
    assert result.first is None
    assert result.cause is None
    # Two errors of 1e-6 relative to the allowed 1e-4 of an update give 0.014. The largest of 120 sketches is 0.019 to
    # 0.027 (16 draws).
    assert 0.01 < max(layer.worst for layer in result.layers) < 0.04


def test_an_error_that_is_only_passed_on_is_not_blamed_on_a_layer():
    """If the stream is a thousand times its updates, an earlier error is far larger than a layer's allowed error."""
    pack, hidden, gate = make(dense=True)
    hidden = hidden + np.float32(1000)
    norms, sketches, _, _ = trace_of(hidden, gate)
    pack = dataclasses.replace(pack, reference=dataclasses.replace(pack.reference, norms=norms, sketches=sketches))
    assert judge(pack, hidden + noise(hidden.shape[1:], 5e-3), gate).first is None


@pytest.mark.parametrize("layer", range(LAYERS))
def test_only_the_first_wrong_layer_is_blamed(layer):
    pack, hidden, gate = make()
    wrong = hidden.copy()
    wrong[layer + 1 :] += noise(hidden.shape[1:], 0.01)
    result = judge(pack, wrong, gate)
    assert result.first == layer
    assert [item.diverged for item in result.layers] == [item.layer == layer for item in result.layers]


def test_errors_before_and_after_the_router_are_distinguished():
    pack, hidden, gate = make()
    wrong = hidden.copy()
    wrong[2:] += noise(hidden.shape[1:], 0.01)
    after = judge(pack, wrong, gate)
    assert "MoE block as a whole" in after.cause
    router = np.stack([wrong[i] @ gate[i] for i in range(LAYERS)])
    router[1] = (hidden[1] + noise(hidden.shape[1:], 0.01)) @ gate[1]
    before = judge(pack, wrong, gate, router=router, experts=pack.reference.experts)
    assert before.first == 1
    assert "router logits differ though the input agrees" in before.cause


def test_single_experts_are_named():
    pack, hidden, gate = make()
    guilty = int(pack.reference.experts[2][0, 0])
    hit = (pack.reference.experts[2] == guilty).any(1)
    wrong = hidden.copy()
    wrong[3:, hit] += noise((int(hit.sum()), WIDTH), 0.01)
    result = judge(pack, wrong, gate, experts=pack.reference.experts, router=pack.reference.router)
    assert result.first == 2
    assert result.cause == f"layer 2, expert {guilty}: only positions that chose it are wrong"


@pytest.mark.parametrize("dense", [False, True])
def test_if_first_positions_agree_the_attention_scores_are_blamed(dense):
    pack, hidden, gate = make(dense)
    wrong = hidden.copy()
    later = np.ones(COUNT, bool)
    later[[prompt.start for prompt in pack.prompts]] = False
    wrong[1:, later] += noise((int(later.sum()), WIDTH), 0.01)
    result = judge(pack, wrong, gate)
    assert result.first == 0
    assert "attention scores" in result.cause


def tie(pack, layer, position):
    """Make the last selected and the first other expert of a position nearly equal; return the pack and both."""
    router = pack.reference.router.copy()
    order = np.argsort(-router[layer, position])
    last, out = order[CHOSEN - 1], order[CHOSEN]
    router[layer, position, out] = router[layer, position, last] - 1e-4 * router[layer, position].std()
    record = dataclasses.replace(pack.reference, router=router, experts=choose(router, CHOSEN))
    return dataclasses.replace(pack, reference=record), int(last), int(out)


def test_a_changed_choice_at_a_near_tie_is_not_blamed():
    pack, hidden, gate = make()
    pack, last, out = tie(pack, layer=1, position=40)
    experts = pack.reference.experts.copy()
    experts[1, 40, CHOSEN - 1] = out
    assert last in pack.reference.experts[1, 40]
    wrong = hidden.copy()
    wrong[2:, 40] += noise(WIDTH, 0.3)
    # Attention carries a part of the position's error to later positions.
    wrong[3:, 41:80] += 0.1 * noise((39, WIDTH), 0.3)
    result = judge(pack, wrong, gate, router=pack.reference.router, experts=experts)
    assert result.first is None, result.cause
    assert result.layers[1].near < 1
    assert result.layers[1].clear == 1
    assert result.layers[1].severe_flips == 0


def test_a_changed_clear_choice_is_blamed():
    pack, hidden, gate = make()
    experts = pack.reference.experts.copy()
    experts[1, 40, CHOSEN - 1] = int(np.argmin(pack.reference.router[1, 40]))
    result = judge(pack, hidden, gate, experts=experts)
    assert result.layers[1].severe_flips == 1
    assert result.first == 1


def test_rows_of_the_embedding_are_named():
    pack, hidden, gate = make()
    wrong = hidden.copy()
    wrong[:, [7, 90]] *= 1.01
    result = judge(pack, wrong, gate)
    assert result.first == -1
    assert result.cause == "the embedding, rows of token ids 7, 90"
    assert judge(pack, hidden * 1.01, gate).cause == "the embedding, most rows"


def test_nan_is_a_divergence():
    pack, hidden, gate = make()
    wrong = hidden.copy()
    wrong[3:] = np.nan
    result = judge(pack, wrong, gate)
    assert result.first == 2
    assert result.layers[2].bad == COUNT


def test_rounding_of_a_huge_activation_is_not_an_error():
    pack, hidden, gate = make()
    # One value of one position is huge from layer 1 on: float32 rounds the sum to 1e-7 of it.
    huge = hidden.copy()
    huge[1:, 5, 3] += 5e4
    norms, sketches, router, experts = trace_of(huge, gate)
    record = dataclasses.replace(pack.reference, norms=norms, sketches=sketches, router=router, experts=experts)
    pack = dataclasses.replace(pack, reference=record)
    result = judge(pack, huge * np.float32(1 + 2e-7), gate)
    assert result.first is None, result.cause
