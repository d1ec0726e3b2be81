"""Does SparseMoE route like PyTorch and sum the experts' results, for any kinds of weights and choice of experts?"""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operator_models import Array, feeds, run, session
from packed_weights import Packed, pack, pack_experts, random_matrix

U = 2.0**-24  # unit roundoff of float32
D, F = 64, 96
MIXED = ["int4", "int8", "int3", "split", "int5", "fp8", "bfloat16", "int6"]
INTEGERS = ["int5", "int8", "int3", "int6"]
Generator = np.random.Generator
Experts = list[tuple[Packed, Packed]]


def random_experts(rng: Generator, kinds: list[str], d: int = D, f: int = F) -> Experts:
    """Return random experts of these kinds, with different groups."""

    def expert(kind: str, group: int) -> tuple[Packed, Packed]:
        return (
            random_matrix(rng, kind, 2 * f, d, group=group, swiglu=True),
            random_matrix(rng, kind, d, f, group=32),
        )

    return [expert(kind, 32 if i % 2 else d) for i, kind in enumerate(kinds)]


def random_layer(rng: Generator, kinds: list[str], batch: int, tokens: int) -> tuple[dict[str, Array], Packed, Experts]:
    router, experts = random_matrix(rng, "float32", len(kinds), D), random_experts(rng, kinds)
    inputs = {
        "x": rng.standard_normal((batch, tokens, D)).astype(np.float32),
        "router": router.blob,
        "experts": pack_experts(experts),
        "norm": rng.uniform(0.5, 2, D).astype(np.float32),
        "residual": rng.standard_normal((batch, tokens, D)).astype(np.float32),
    }
    return inputs, router, experts


def normed(inputs: dict[str, Array], eps: float = 1e-5) -> Array:
    x = inputs["x"].reshape(-1, D).astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * inputs["norm"]


def routing(logits: Array, k: int, normalize: bool) -> tuple[Array, Array]:
    """Return weights and experts [tokens, k] for float32 logits, computed as transformers' OlmoeTopKRouter does."""
    weights, chosen = torch.topk(torch.softmax(torch.from_numpy(logits), -1, dtype=torch.float32), k)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.double().numpy(), chosen.numpy()


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 5), (2, 17), (1, 64)])
def test_float_activations_give_the_weighted_sum(rng: Generator, batch: int, tokens: int, normalize: int) -> None:
    inputs, router, experts = random_layer(rng, MIXED, batch, tokens)
    y, logits, chosen = run("SparseMoE", inputs, k=3, normalize=normalize, activations="float32", epsilon=1e-5)
    x = normed(inputs)
    # x has 12 roundings of its norm, the sum over its columns D.
    assert (np.abs(logits - x @ router.dense.T) <= (D + 14) * U * (np.abs(x) @ np.abs(router.dense.T))).all()
    weights, expected_chosen = routing(logits, 3, normalize == 1)
    assert (chosen == expected_chosen).all()

    expected = inputs["residual"].reshape(-1, D).astype(np.float64)
    magnitude = np.abs(expected)
    for token, (row, ids) in enumerate(zip(weights, chosen, strict=True)):
        for weight, expert in zip(row, ids, strict=True):
            gate_up, down = (matrix.dense for matrix in experts[expert])
            gate, up = np.split(gate_up @ x[token], 2)
            expected[token] += weight * (down @ (silu(gate) * up))
            most_gate, most_up = np.split(np.abs(gate_up) @ np.abs(x[token]), 2)
            magnitude[token] += weight * (np.abs(down) @ (1.1 * most_gate * most_up))
    # Gate and up (D terms each, and x's norm), SwiGLU (8), down (F), the softmax (10 and the logits' error), the sum.
    tolerance = (3 * D + F + 64) * U * magnitude
    assert y.shape == inputs["x"].shape
    assert (np.abs(y.reshape(-1, D) - expected) <= tolerance).all()


@pytest.mark.parametrize("kinds", [INTEGERS, MIXED])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_int8_activations_do_what_quant_linear_does(rng: Generator, kinds: list[str], tokens: int) -> None:
    inputs, _, experts = random_layer(rng, kinds, 1, tokens)
    y, logits, chosen = run("SparseMoE", inputs, k=2)
    weights, _ = routing(logits, 2, False)
    x, total = inputs["x"][0], inputs["residual"][0].astype(np.float64)
    magnitude = np.abs(total)
    for expert, (gate_up, down) in enumerate(experts):
        rows, places = np.nonzero(chosen == expert)
        if not len(rows):
            continue
        (h,) = run("QuantLinear", {"x": x[rows], "weights": gate_up.blob, "norm": inputs["norm"]})
        (part,) = run("QuantLinear", {"x": h, "weights": down.blob})
        total[rows] += weights[rows, places][:, None] * part
        magnitude[rows] += np.abs(weights[rows, places][:, None] * part)
    # The experts' results have the same bits. Weights differ by the rounding of two softmaxes, the sum by one per term.
    assert (np.abs(y[0] - total) <= 32 * U * magnitude).all()


def test_without_norm_residual_and_optional_outputs(rng: Generator) -> None:
    inputs, _, _ = random_layer(rng, INTEGERS, 2, 9)
    norm = np.ones(D, np.float32)
    unit = inputs["x"] / np.sqrt((inputs["x"] ** 2).mean(-1, keepdims=True))
    plain = {"x": unit, "router": inputs["router"], "experts": inputs["experts"]}
    (y,) = run("SparseMoE", plain, k=2, outputs=["y"])
    zero = np.zeros_like(unit)
    full, logits, _ = run("SparseMoE", plain | {"residual": zero}, k=2)
    assert y.tobytes() == full.tobytes()
    assert logits.shape == (18, 4)
    near, _, _ = run("SparseMoE", plain | {"norm": norm}, k=2, activations="float32", epsilon=0.0)
    (exact,) = run("SparseMoE", plain, k=2, activations="float32", outputs=["y"])
    assert np.allclose(near, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_all_tokens_may_go_to_one_expert(rng: Generator, tokens: int) -> None:
    experts = random_experts(rng, INTEGERS)
    rows = np.zeros((4, D), np.float32)
    rows[2, 0] = 100
    x = rng.standard_normal((1, tokens, D)).astype(np.float32)
    x[..., 0] = 1
    y, _, chosen = run("SparseMoE", {"x": x, "router": pack("float32", rows, D), "experts": pack_experts(experts)}, k=1)
    assert (chosen == 2).all()
    (h,) = run("QuantLinear", {"x": x, "weights": experts[2][0].blob})
    (expected,) = run("QuantLinear", {"x": h, "weights": experts[2][1].blob})
    assert (y == expected).all()  # its weight is 1: e^-100 is negligible beside it


def test_equal_probabilities_choose_the_lower_index(rng: Generator) -> None:
    experts = random_experts(rng, ["int4"] * 6)
    rows = np.zeros((6, D), np.float32)
    rows[4] = rows[1] = 0.5
    x = np.abs(rng.standard_normal((1, 3, D))).astype(np.float32)
    inputs = {"x": x, "router": pack("float32", rows, D), "experts": pack_experts(experts)}
    _, _, chosen = run("SparseMoE", inputs, k=4)
    assert (chosen == [1, 4, 0, 2]).all()


def test_all_experts_may_be_chosen(rng: Generator) -> None:
    inputs, _, _ = random_layer(rng, INTEGERS, 1, 6)
    _, logits, chosen = run("SparseMoE", inputs, k=4)
    assert (chosen == np.argsort(-logits, axis=-1, kind="stable")).all()


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_nan_affects_only_its_own_token(rng: Generator, tokens: int, activations: str) -> None:
    inputs, _, _ = random_layer(rng, MIXED, 1, tokens)
    good, _, _ = run("SparseMoE", inputs, k=3, activations=activations)
    inputs["x"][0, -1, 7] = np.nan
    y, _, chosen = run("SparseMoE", inputs, k=3, activations=activations)
    assert np.isnan(y[0, -1]).all()
    assert (chosen[-1] == [0, 1, 2]).all()
    assert y[0, :-1].tobytes() == good[0, :-1].tobytes()


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_token_does_not_depend_on_the_others(rng: Generator, activations: str) -> None:
    inputs, _, _ = random_layer(rng, MIXED, 1, 700)
    s = session("SparseMoE", inputs, k=3, activations=activations, threads=2)
    y, logits, chosen = s.run(None, feeds(s, inputs))
    for tokens in [*range(1, 10), 17, 100]:
        part = {"x": inputs["x"][:, -tokens:], "residual": inputs["residual"][:, -tokens:]}
        some_y, some_logits, some_chosen = s.run(None, part)
        assert some_y.tobytes() == y[:, -tokens:].tobytes()
        assert some_logits.tobytes() == logits[-tokens:].tobytes()
        assert (some_chosen == chosen[-tokens:]).all()


def test_a_long_prompt_is_processed_in_chunks(rng: Generator) -> None:
    d, tokens = 32, 240_000  # intermediate results of more than 64 MiB
    router, experts = random_matrix(rng, "float32", 2, d), random_experts(rng, ["int4", "int8"], d, 32)
    x = rng.standard_normal((1, tokens, d), np.float32)
    inputs = {"x": x, "router": router.blob, "experts": pack_experts(experts), "residual": x}
    s = session("SparseMoE", inputs, k=1, threads=2)
    y, logits, chosen = s.run(None, {"x": x, "residual": x})
    for part in (slice(0, 300), slice(tokens // 2, tokens // 2 + 300), slice(tokens - 300, tokens)):
        some = s.run(None, {"x": x[:, part], "residual": x[:, part]})
        assert some[0].tobytes() == y[:, part].tobytes()
        assert some[1].tobytes() == logits[part].tobytes()
        assert some[2].tobytes() == chosen[part].tobytes()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of resident pages")
def test_a_prompts_memory_is_given_back(rng: Generator) -> None:
    inputs, _, _ = random_layer(rng, INTEGERS, 1, 40_000)
    s = session("SparseMoE", inputs, k=4, outputs=["y"])
    s.run(None, feeds(s, inputs))
    before = resident_bytes()
    token = {name: inputs[name][:, :1] for name in ("x", "residual")}
    for _ in range(2 * 64):
        s.run(None, token)
    # A chunk's intermediate results are 64 MiB, of which some memory is reserved but not touched.
    assert before - resident_bytes() > 32 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_no_tokens_give_no_tokens(rng: Generator) -> None:
    inputs, _, _ = random_layer(rng, INTEGERS, 1, 0)
    y, logits, chosen = run("SparseMoE", inputs, k=2)
    assert (y.shape, logits.shape, chosen.shape) == ((1, 0, D), (0, 4), (0, 2))


def test_weights_may_be_fed(rng: Generator) -> None:
    inputs, _, _ = random_layer(rng, INTEGERS, 1, 5)
    for fed, held in zip(run("SparseMoE", inputs, k=2, constant=[]), run("SparseMoE", inputs, k=2), strict=True):
        assert fed.tobytes() == held.tobytes()


SEEDED = np.random.default_rng(5)
ROUTER = random_matrix(SEEDED, "float32", 4, D).blob
EXPERTS = random_experts(SEEDED, INTEGERS)
BLOB = pack_experts(EXPERTS)
X = np.ones((1, 2, D), np.float32)


def replaced(expert: int, part: int, kind: str, rows: int, columns: int, **options: Any) -> Array:
    """Return the experts with one matrix of another shape."""
    experts = [list(pair) for pair in EXPERTS]
    experts[expert][part] = random_matrix(SEEDED, kind, rows, columns, group=32, **options)
    return pack_experts([(gate_up, down) for gate_up, down in experts])


def damaged(at: int, *values: int) -> Array:
    blob = BLOB.copy()
    blob[at : at + len(values)] = values
    return blob


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"x": X[..., :32]}, {}, "x has shape [1, 2, 32], expected [batch, tokens, 64] as experts' gate_up is for 64"),
        ({"x": X[0]}, {}, "x has shape [2, 64], expected [batch, tokens, 64]"),
        ({"norm": X[0, 0, :9]}, {}, "norm has shape [9], expected [64], one value per column of the experts' gate_up"),
        ({"residual": X[:, :1]}, {}, "residual has shape [1, 1, 64], expected [1, 2, 64] like the result"),
        ({}, {"k": 0}, "attribute k is 0, expected 1 or more"),
        ({}, {"k": 5}, "attribute k is 5, expected at most the number of experts, 4"),
        ({}, {"normalize": 2}, "attribute normalize is 2, expected 0 or 1"),
        ({}, {"activations": "bf16"}, "attribute activations is bf16, expected int8 or float32"),
        (
            {"router": random_matrix(SEEDED, "float32", 5, D).blob},
            {},
            "router has 5 rows, expected 4, one per expert",
        ),
        (
            {"router": random_matrix(SEEDED, "float32", 4, 32).blob},
            {},
            "router is for 32 columns, expected as for experts' gate_up, 64",
        ),
        ({"router": BLOB}, {}, "router: not a packed matrix, it does not begin with EDLM"),
        ({"experts": ROUTER}, {}, "experts: the packed experts do not begin with EDLX"),
        ({"experts": BLOB[:32]}, {}, "experts: 32 bytes are too few for packed experts"),
        ({"experts": BLOB[:-1]}, {}, f"experts: the header says {len(BLOB)} bytes, the input has {len(BLOB) - 1}"),
        ({"experts": damaged(4, 2)}, {}, "experts: the layout version is 2, not 1"),
        ({"experts": damaged(8, 0)}, {}, "experts: the header says 0 experts"),
        ({"experts": damaged(8, *[255] * 7, 127)}, {}, "experts: the header says 9223372036854775807 experts"),
        ({"experts": damaged(64, *[255] * 7, 127)}, {}, "experts' gate_up of expert 0 begins at byte 922337203685477"),
        ({"experts": damaged(72, 1, 0)}, {}, "experts' down of expert 0 begins at byte 1 of"),
        (
            {"experts": damaged(64, 129)},
            {},
            "experts' gate_up of expert 0 begins at byte 129, expected a multiple of 64",
        ),
        ({"experts": damaged(128 + 5, 99)}, {}, "experts' gate_up of expert 0: not a packed matrix, its kind"),
        (
            {"experts": replaced(3, 0, "int4", 2 * F, 32, swiglu=True)},
            {},
            "experts' gate_up of expert 3 is for 32 columns, expected as for expert 0, 64",
        ),
        (
            {"experts": replaced(2, 0, "int4", 2 * 64, D, swiglu=True)},
            {},
            "experts' gate_up of expert 2 has 128 rows, expected as for expert 0, 192",
        ),
        ({"experts": replaced(1, 0, "int4", 2 * F, D)}, {}, "experts' gate_up of expert 1 is not a SwiGLU matrix"),
        ({"experts": replaced(1, 1, "int4", D, F, swiglu=True)}, {}, "experts' down of expert 1 is a SwiGLU matrix"),
        (
            {"experts": replaced(1, 1, "int8", D, 64)},
            {},
            "experts' down of expert 1 is for 64 columns, expected the outputs of its gate_up, 96",
        ),
        (
            {"experts": replaced(1, 1, "int8", 70, F)},
            {},
            "experts' down of expert 1 has 70 rows, expected the columns of its gate_up, 64",
        ),
    ],
)
def test_what_does_not_fit_is_named(inputs: dict[str, Array], attributes: dict[str, Any], message: str) -> None:
    given = {"x": X, "router": ROUTER, "experts": BLOB} | inputs
    with pytest.raises(Exception, match=re.escape(f"SparseMoE layers.3/moe: {message}")):
        run("SparseMoE", given, node="layers.3/moe", **{"k": 2, **attributes})
