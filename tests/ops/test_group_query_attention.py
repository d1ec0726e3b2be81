"""Does GroupQueryAttention compute causal attention, for every type of KV cache and any lengths?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from operator_models import Array, feeds, run, session

from edgelm.bundle.kv_cache import KV_TYPES, row_bytes

U = 2.0**-24  # unit roundoff of float32
CACHES = list(KV_TYPES)
POSITIONS = 800
Generator = np.random.Generator


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    size: int

    @property
    def attributes(self) -> dict[str, int]:
        return {"num_heads": self.heads, "kv_num_heads": self.kv_heads}

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size

    def rotary(self) -> tuple[Array, Array]:
        half = self.size // 2
        angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(half) / half)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def cache(self, kind: str, batch: int, capacity: int, rng: Generator) -> Array:
        """Return a cache filled with values that must not be read."""
        return rng.integers(0, 256, (batch, self.kv_heads, capacity, row_bytes(kind, self.size))).astype(np.uint8)


GROUPED = Heads(4, 2, 16)
SHAPES = [GROUPED, Heads(4, 4, 32), Heads(8, 1, 128), Heads(2, 1, 6)]


def norms(rng: Generator, heads: Heads, *, q_per_head: bool = False, k_per_head: bool = False) -> dict[str, Array]:
    q, k = 1 if q_per_head else heads.heads, 1 if k_per_head else heads.kv_heads
    return {
        "q_norm": rng.uniform(0.5, 2, q * heads.size).astype(np.float32),
        "k_norm": rng.uniform(0.5, 2, k * heads.size).astype(np.float32),
    }


def normed(x: Array, weight: Array) -> Array:
    """RMSNorm over as many numbers as the weight has: over all heads, or per head."""
    parts = x.reshape(len(x), -1, len(weight))
    return (parts / np.sqrt((parts * parts).mean(-1, keepdims=True) + 1e-5) * weight).reshape(x.shape)


def as_fp8(x: Array) -> tuple[Array, Array]:
    """Return x [..., size] rounded as in an fp8 cache, and the slack of elements that float32 may round the other way.

    E4M3: three bits of mantissa, steps of 2^-9 below 2^-6; the scale has eight bits and is rounded up.
    """
    largest = np.abs(x).max(-1, keepdims=True)
    unit = np.exp2(np.floor(np.log2(largest / 448)) - 7)
    units = largest / 448 / unit
    scale = np.ceil(units) * unit
    step = scale * np.exp2(np.maximum(np.floor(np.log2(np.abs(x) / scale + 1e-30)), -6) - 3)
    codes = x / step
    unsure = (np.abs(units - np.rint(units)) < 2e-4) | (np.abs(np.abs(codes) % 1 - 0.5) < 2e-5)
    return np.rint(codes) * step, np.where(unsure, step, 0.0)


def expected(
    qkv: Array, heads: Heads, kind: str, norm: dict[str, Array] | None = None, clip: float = 0, scale: float = 0
) -> tuple[Array, float]:
    """Return attention of one whole sequence in float64, and the operator's tolerance."""
    tokens, h, kv, size = len(qkv), heads.heads, heads.kv_heads, heads.size
    q, k, v = np.split(qkv.astype(np.float64), [h * size, (h + kv) * size], axis=-1)
    if norm is not None:
        q, k = normed(q, norm["q_norm"]), normed(k, norm["k_norm"])
    if clip:
        q, k, v = (np.clip(x, -clip, clip) for x in (q, k, v))
    cos, sin = (table[:tokens, None].astype(np.float64) for table in heads.rotary())

    def rotated(x: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q, k = rotated(q.reshape(tokens, h, size)), rotated(k.reshape(tokens, kv, size))
    v = v.reshape(tokens, kv, size)
    k_slack, v_slack = np.zeros_like(k), np.zeros_like(v)
    if kind == "fp8":
        (k, k_slack), (v, v_slack) = as_fp8(k), as_fp8(v)
    k, v, k_slack, v_slack = (np.repeat(x, h // kv, axis=1) for x in (k, v, k_slack, v_slack))
    factor = scale or 1 / np.sqrt(size)
    scores = np.einsum("thd,uhd->htu", q, k) * factor
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("htu,uhd->thd", p, v).reshape(tokens, h * size)

    # The error of an element of the cache (for int8 also of the queries), relative to the largest of its vector, is at
    # most half a step of 127, or of float16's 11 bits. Errors are independent, so six standard deviations bound a
    # score's error. That changes the weights by at most twice as much; int8 weights add half a step of their largest.
    # For fp8 the rounded values are known, except for the few elements with slack.
    step = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5 / 127, "fp8": 0.0}[kind]
    largest_q, largest_k, largest_v = (np.abs(x).max() for x in (q, k, v))
    norm_q, norm_k = (np.linalg.norm(x, axis=-1).max() for x in (q, k))
    score_error = factor * (
        6 / np.sqrt(3) * step * (norm_q * largest_k + norm_k * largest_q) + (size + 24) * U * norm_q * norm_k
    )
    slack = 4 * largest_v * factor * np.einsum("thd,uhd->htu", np.abs(q), k_slack) + v_slack.max(-1).T[:, None]
    unsure = (p * slack).sum(-1).max()
    return out, float(largest_v * (2 * np.expm1(score_error) + 3 * step + (tokens + 16) * U) + unsure)


def check_steps(
    rng: Generator, heads: Heads, kind: str, steps: list[int], norm: dict[str, Array] | None = None, **attributes: Any
) -> None:
    """Feed a sequence in `steps` of tokens, passing the cache from step to step, and check the results."""
    norm = norm or norms(rng, heads)
    qkv = rng.standard_normal((1, sum(steps), heads.width)).astype(np.float32)
    out, tolerance = expected(qkv[0], heads, kind, norm, **attributes)
    cos, sin = heads.rotary()
    capacity = sum(steps) + 3
    inputs = {
        "qkv": qkv,
        "past_key": heads.cache(kind, 1, capacity, rng),
        "past_value": heads.cache(kind, 1, capacity, rng),
        "past_lengths": np.zeros(1, np.int64),
        "cos": cos,
        "sin": sin,
        **norm,
    }
    s = session("GroupQueryAttention", inputs, threads=2, **heads.attributes, **attributes)
    for step in steps:
        past = int(inputs["past_lengths"][0])
        y, inputs["past_key"], inputs["past_value"] = s.run(
            None, feeds(s, inputs | {"qkv": qkv[:, past : past + step]})
        )
        error = np.abs(y[0] - out[past : past + step]).max()
        assert error <= tolerance, f"{past} + {step} tokens: off by {error}, tolerance {tolerance}"
        inputs["past_lengths"] += step


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_tokens_attend_to_themselves_and_all_before(rng: Generator, heads: Heads, kind: str) -> None:
    check_steps(rng, heads, kind, [1, 5, 30, 1, 16, 1, 7, 3, 1])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_a_norm_weight_of_one_head_norms_each_head_separately(rng: Generator, heads: Heads, kind: str) -> None:
    for q_per_head, k_per_head in ((True, True), (True, False), (False, True)):
        check_steps(rng, heads, kind, [1, 20, 3], norms(rng, heads, q_per_head=q_per_head, k_per_head=k_per_head))


@pytest.mark.parametrize(("size", "smaller"), [(2, "fp8"), (4, "int8")])
def test_of_two_types_with_equal_row_sizes_the_larger_is_assumed(rng: Generator, size: int, smaller: str) -> None:
    assert row_bytes("float16", size) == row_bytes(smaller, size)
    check_steps(rng, Heads(2, 1, size), "float16", [1, 5, 30, 1])


@pytest.mark.parametrize("kind", CACHES)
def test_a_long_cache_is_split(rng: Generator, kind: str) -> None:
    check_steps(rng, GROUPED, kind, [511, 1, 1, 4, 70, 8, 9, 1])


@pytest.mark.parametrize("kind", CACHES)
def test_clip_and_scale(rng: Generator, kind: str) -> None:
    check_steps(rng, GROUPED, kind, [20, 1, 3], clip=0.75, scale=0.4)


def arguments(rng: Generator, heads: Heads, kind: str, batch: int, tokens: int, capacity: int) -> dict[str, Array]:
    cos, sin = heads.rotary()
    return {
        "qkv": rng.standard_normal((batch, tokens, heads.width)).astype(np.float32),
        "past_key": heads.cache(kind, batch, capacity, rng),
        "past_value": heads.cache(kind, batch, capacity, rng),
        "past_lengths": np.zeros(batch, np.int64),
        "cos": cos,
        "sin": sin,
    }


def test_without_norms(rng: Generator) -> None:
    inputs = arguments(rng, GROUPED, "float32", 1, 12, 12)
    out, tolerance = expected(inputs["qkv"][0], GROUPED, "float32")
    y, _, _ = run("GroupQueryAttention", inputs, **GROUPED.attributes)
    assert np.abs(y[0] - out).max() <= tolerance


@pytest.mark.parametrize("kind", CACHES)
def test_a_sequence_does_not_depend_on_the_others(rng: Generator, kind: str) -> None:
    """Sequences of different lengths, one of them empty, give the same results as each alone."""
    batch, tokens, capacity = 5, 20, 70
    inputs = arguments(rng, GROUPED, kind, batch, 45, capacity)
    s = session("GroupQueryAttention", inputs, threads=2, **GROUPED.attributes)
    _, key, value = s.run(None, feeds(s, inputs))
    inputs |= {
        "qkv": rng.standard_normal((batch, tokens, GROUPED.width)).astype(np.float32),
        "past_key": key,
        "past_value": value,
        "past_lengths": np.array([0, 45, 17, 31, 40]),
        "new_lengths": np.array([20, 1, 0, 9, 20]),
    }
    y, key, value = run("GroupQueryAttention", inputs, threads=2, **GROUPED.attributes)
    for b, new in enumerate(inputs["new_lengths"]):
        alone = {name: inputs[name][b : b + 1] for name in ("past_key", "past_value", "past_lengths")}
        alone["qkv"] = inputs["qkv"][b : b + 1, :new]
        y1, key1, value1 = s.run(None, feeds(s, inputs | alone))
        assert y[b, :new].tobytes() == y1[0].tobytes()
        assert (y[b, new:] == 0).all()
        assert key[b].tobytes() == key1[0].tobytes()
        assert value[b].tobytes() == value1[0].tobytes()
    assert key[2].tobytes() == inputs["past_key"][2].tobytes()


@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_is_updated_in_place_where_past_is_present(rng: Generator, kind: str) -> None:
    inputs = arguments(rng, GROUPED, kind, 2, 9, 40)
    s = session("GroupQueryAttention", inputs, **GROUPED.attributes)
    before = {name: array.copy() for name, array in inputs.items()}
    y, key, value = s.run(None, feeds(s, inputs))
    assert all((inputs[name] == array).all() for name, array in before.items())  # copied

    binding = s.io_binding()
    for name in ("qkv", "past_lengths"):
        binding.bind_cpu_input(name, inputs[name])
    for name in ("key", "value"):
        cache = ort.OrtValue.ortvalue_from_numpy(inputs[f"past_{name}"])
        binding.bind_ortvalue_input(f"past_{name}", cache)
        binding.bind_ortvalue_output(f"present_{name}", cache)
        inputs[name] = cache
    result = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(y))
    binding.bind_ortvalue_output("y", result)
    s.run_with_iobinding(binding)
    assert result.numpy().tobytes() == y.tobytes()
    assert inputs["key"].numpy().tobytes() == key.tobytes()
    assert inputs["value"].numpy().tobytes() == value.tobytes()


@pytest.mark.parametrize("kind", CACHES)
def test_tokens_may_be_dropped_from_the_end(rng: Generator, kind: str) -> None:
    inputs = arguments(rng, GROUPED, kind, 1, 30, 60)
    s = session("GroupQueryAttention", inputs, **GROUPED.attributes)
    _, key, value = s.run(None, feeds(s, inputs))
    first = {"past_key": key, "past_value": value, "past_lengths": np.array([18]), "qkv": inputs["qkv"][:, :12]}
    again, _, _ = s.run(None, feeds(s, inputs | first))
    _, key, value = s.run(None, feeds(s, inputs | {"qkv": inputs["qkv"][:, :18]}))
    fresh, _, _ = s.run(None, feeds(s, inputs | first | {"past_key": key, "past_value": value}))
    assert again.tobytes() == fresh.tobytes()


def test_fp8_rounds_keys_and_values_and_nothing_else(rng: Generator) -> None:
    """If keys and values are E4M3 numbers already, the result has the same bits as with a float32 cache."""
    inputs = arguments(rng, GROUPED, "float32", 1, 40, 60)
    inputs["cos"], inputs["sin"] = np.ones_like(inputs["cos"]), np.zeros_like(inputs["sin"])  # no rotation
    heads = inputs["qkv"][0, :, 64:].reshape(40, 4, 16)
    steps = rng.integers(0, 8, heads.shape)
    numbers = np.where(
        rng.random(heads.shape) < 0.1, steps * 2.0**-9, (8 + steps) * np.exp2(rng.integers(-9, 5, heads.shape))
    )
    numbers[:, :, 3] = 448
    inputs["qkv"][0, :, 64:] = (np.sign(heads) * numbers / 256).reshape(40, 64)  # and the scale 1 / 256
    exact, _, _ = run("GroupQueryAttention", inputs, **GROUPED.attributes)
    inputs |= {name: GROUPED.cache("fp8", 1, 60, rng) for name in ("past_key", "past_value")}
    rounded, _, _ = run("GroupQueryAttention", inputs, **GROUPED.attributes)
    assert rounded.tobytes() == exact.tobytes()


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3)])
def test_nothing_gives_nothing(rng: Generator, batch: int, tokens: int) -> None:
    inputs = arguments(rng, GROUPED, "int8", batch, tokens, 8)
    y, key, value = run("GroupQueryAttention", inputs, **GROUPED.attributes)
    assert y.shape == (batch, tokens, 64)
    assert (key == inputs["past_key"]).all()
    assert (value == inputs["past_value"]).all()


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        (
            {"qkv": zeros(2, 3, 104)},
            {},
            "qkv has shape [2, 3, 104], expected [batch, tokens, 8 * head size] with an even",
        ),
        ({"qkv": zeros(3, 128)}, {}, "qkv has shape [3, 128], expected [batch, tokens, 8 * head size]"),
        (
            {"past_key": np.zeros((2, 4, 10, 64), np.uint8)},
            {},
            "past_key has shape [2, 4, 10, 64], expected [2, 2, capacity, bytes per token]",
        ),
        (
            {"past_value": np.zeros((2, 2, 9, 64), np.uint8)},
            {},
            "past_value has shape [2, 2, 9, 64], past_key [2, 2, 10,",
        ),
        (
            {"past_key": np.zeros((2, 2, 10, 48), np.uint8), "past_value": np.zeros((2, 2, 10, 48), np.uint8)},
            {},
            "past_key has 48 bytes per token, expected 64 (float32), 32 (float16), 20 (int8) or 18 (fp8) for a head "
            "size of 16",
        ),
        (
            {"past_lengths": np.array([1, 8])},
            {},
            "sequence 1 has 8 past tokens and 3 new ones, the cache has room for 10",
        ),
        ({"past_lengths": np.array([-1, 0])}, {}, "sequence 0 has -1 past tokens and 3 new ones"),
        ({"past_lengths": np.array([1])}, {}, "past_lengths has shape [1], expected [2]"),
        ({"new_lengths": np.array([1, 4])}, {}, "new_lengths of sequence 1 is 4, expected 0..3, the tokens in qkv"),
        ({"new_lengths": np.array([-1, 3])}, {}, "new_lengths of sequence 0 is -1, expected 0..3"),
        ({"new_lengths": np.array([1, 2, 3])}, {}, "new_lengths has shape [3], expected [2]"),
        ({"cos": zeros(20, 16)}, {}, "cos has shape [20, 16], expected [positions, 8], half a head's size"),
        ({"sin": zeros(20, 8)}, {}, "sin has shape [20, 8], cos [800, 8]"),
        (
            {"cos": zeros(2, 8), "sin": zeros(2, 8)},
            {},
            "sequence 0 has 0 past tokens and 3 new ones, cos has 2 positions",
        ),
        (
            {"q_norm": zeros(32)},
            {},
            "q_norm has shape [32], expected [64], one value per element of the queries, or [16], "
            "one value per element of a head",
        ),
        (
            {"k_norm": zeros(64)},
            {},
            "k_norm has shape [64], expected [32], one value per element of the keys, or [16], one value per elem",
        ),
        ({"k_norm": zeros(2, 16)}, {}, "k_norm has shape [2, 16], expected [32], one value per element of the keys"),
        (
            {},
            {"kv_num_heads": 3},
            "attributes num_heads and kv_num_heads are 4 and 3, expected num_heads to be a multiple",
        ),
        ({}, {"num_heads": 0}, "attributes num_heads and kv_num_heads are 0 and 2"),
    ],
)
def test_what_does_not_fit_is_named(
    rng: Generator, inputs: dict[str, Array], attributes: dict[str, int], message: str
) -> None:
    given = arguments(rng, GROUPED, "float32", 2, 3, 10) | inputs
    with pytest.raises(Exception, match=re.escape(f"GroupQueryAttention layers.3/attention: {message}")):
        run("GroupQueryAttention", given, node="layers.3/attention", **{**GROUPED.attributes, **attributes})
