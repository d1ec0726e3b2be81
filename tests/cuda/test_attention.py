"""Do the GPU kernels of GroupQueryAttention compute causal attention, for every type of KV cache?

The kernels are emulated, compiled from the same sources as for a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import attention_calls as attention
import numpy as np
import pytest
from attention_calls import AttentionBuffers, AttentionShape
from kernel_device import ON_GPU, kernel_device
from numpy.typing import NDArray

from edgelm.checkpoint.writer import float32_to_bf16
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.kernels.sources import kernels

Array = NDArray[Any]
Generator = np.random.Generator

U = 2.0**-24
"""Unit roundoff of float32."""
UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": U}
"""Half a step, relative to the number."""
MULTIPROCESSORS = 4


# -- numbers of two bytes and one --------------------------------------------------------------------------------------


def to_bits(x: Array, kind: str) -> Array:
    """Convert floats to the bits that a device stores."""
    if kind == "f32":
        return x.astype(np.float32)
    if kind == "f16":
        return x.astype(np.float16)
    return float32_to_bf16(x.astype(np.float32))


def from_bits(x: Array, kind: str) -> Array:
    if kind == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def rounded(x: Array, kind: str) -> Array:
    return from_bits(to_bits(x, kind), kind)


def e4m3_values() -> Array:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(codes & 0x80, -size, size)


# -- the operator in float64 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call: shapes, lengths and options."""

    shape: AttentionShape
    past: tuple[int, ...]
    new: tuple[int, ...] | None = None
    norm: bool = False
    per_head: tuple[bool, bool] = (False, False)  # whether the norms of queries and of keys are per head
    clip: float = 0.0
    scale: float = 0.0
    splits: int | None = None
    counters: bool = True
    prefetch: int = 0  # bytes of the next weights
    multiprocessors: int = MULTIPROCESSORS
    seed: int = 0
    epsilon: float = 1e-5

    @property
    def fresh(self) -> tuple[int, ...]:
        return self.new or (self.shape.tokens,) * self.shape.batch

    @property
    def factor(self) -> float:
        return self.scale or 1 / math.sqrt(self.shape.size)


def rotary(shape: AttentionShape) -> tuple[Array, Array]:
    half = shape.size // 2
    angles = np.arange(shape.positions)[:, None] / 10000 ** (np.arange(half) / half)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def normed(case: Case, x: Array, weight: Array) -> Array:
    """RMSNorm over as many numbers as the weight has: over all heads, or per head."""
    parts = x.reshape(*x.shape[:-1], -1, len(weight))
    return (parts / np.sqrt((parts * parts).mean(-1, keepdims=True) + case.epsilon) * weight).reshape(x.shape)


def prepared(case: Case, qkv: Array, weights: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Queries [B, T, H, S], keys and values [B, T, G, S] after norm, clip and rotation, in float64."""
    s = case.shape
    q, k, v = np.split(qkv.astype(np.float64), [s.heads * s.size, (s.heads + s.kv_heads) * s.size], axis=-1)
    if case.norm:
        q = normed(case, q, weights["q_norm"])
        k = normed(case, k, weights["k_norm"])
    if case.clip:
        q, k, v = (np.clip(x, -case.clip, case.clip) for x in (q, k, v))
    cos, sin = (table.astype(np.float64) for table in rotary(s))
    at = np.minimum(np.asarray(case.past)[:, None] + np.arange(s.tokens), s.positions - 1)

    def rotated(x: Array) -> Array:
        first, second = np.split(x, 2, axis=-1)
        c, n = cos[at][:, :, None], sin[at][:, :, None]
        return np.concatenate([first * c - second * n, second * c + first * n], axis=-1)

    q = rotated(q.reshape(s.batch, s.tokens, s.heads, s.size))
    k = rotated(k.reshape(s.batch, s.tokens, s.kv_heads, s.size))
    return q, k, v.reshape(s.batch, s.tokens, s.kv_heads, s.size)


def read_cache(shape: AttentionShape, cache: Array) -> Array:
    """Return the contents of a cache as float64 [B, G, C, S]."""
    count = shape.capacity * shape.size
    width = attention.CODE_BYTES[shape.cache]
    flat = cache.reshape(shape.batch, shape.kv_heads, -1)
    codes = np.ascontiguousarray(flat[..., : count * width])
    full = (shape.batch, shape.kv_heads, shape.capacity, shape.size)
    if width > 1:
        dtype = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}[shape.cache]
        return from_bits(codes.view(dtype).reshape(full), shape.cache)
    scales = np.ascontiguousarray(flat[..., count:]).view(np.float32).astype(np.float64)
    numbers = codes.view(np.int8).astype(np.float64) if shape.cache == "int8" else e4m3_values()[codes]
    return numbers.reshape(full) * scales.reshape(*full[:3], 1)


def attended(case: Case, q: Array, keys: Array, values: Array) -> tuple[Array, Array]:
    """Return attention [B, T, H, S] over the cache after the call, and a kernel's tolerance."""
    s = case.shape
    out, tolerance = np.zeros(q.shape), np.zeros(q.shape)
    shared_by = s.heads // s.kv_heads
    mma_type = s.activations if attention.CODE_BYTES[s.cache] == 1 else s.cache
    unit = UNIT[mma_type]
    for b in range(s.batch):
        for t in range(case.fresh[b]):
            seen = case.past[b] + t + 1
            for h in range(s.heads):
                k, v = keys[b, h // shared_by, :seen], values[b, h // shared_by, :seen]
                score = k @ q[b, t, h] * case.factor
                p = np.exp(score - score.max())
                p /= p.sum()
                out[b, t, h] = p @ v
                # Queries and weights of values are rounded to the type of the mma, the result to A. A query's
                # elements are rounded independently: six standard deviations of that sum, and float32's own errors.
                moved = case.factor * (
                    6 / math.sqrt(3) * unit * np.sqrt((k * k) @ (q[b, t, h] * q[b, t, h]))
                    + (s.size + 24) * U * np.abs(k) @ np.abs(q[b, t, h])
                )
                about = np.abs(v - out[b, t, h])  # a common factor of all weights has no effect
                tolerance[b, t, h] = (
                    (p * np.expm1(np.minimum(moved, 50))) @ about * 1.05
                    + (unit + (seen + 40) * U) * (p @ np.abs(v))
                    + UNIT[s.activations] * np.abs(out[b, t, h])
                )
    return out, tolerance + 1e-30


# -- running it --------------------------------------------------------------------------------------------------------


@functools.cache
def device_for(capability: tuple[int, int], seed: int, activations: str, cache: str, size: int) -> Device:
    return kernel_device(attention.kernels_for(activations, cache, size), capability=capability, seed=seed)


@dataclass
class Result:
    out: Array
    key_cache: Array
    value_cache: Array
    launches: int
    prefetched: tuple[int, int] | None  # the first and the last line requested, as offsets in the next weights


def compute(
    case: Case, qkv: Array, weights: dict[str, Array], caches: tuple[Array, Array],
    capability: tuple[int, int] = (8, 0), order: int = 0,
) -> Result:  # fmt: skip
    s = case.shape
    device = device_for(capability, order, s.activations, s.cache, s.size)
    addresses: list[int] = []

    def uploaded(data: Array) -> int:
        addresses.append(device.allocate(max(data.nbytes, 1)))
        device.upload(addresses[-1], data)
        return addresses[-1]

    cos, sin = rotary(s)
    raw = to_bits(qkv, s.activations)
    out = np.empty((s.batch, s.tokens, s.heads, s.size), raw.dtype)
    workspace = attention.workspace_bytes(s, case.multiprocessors, case.splits)
    nothing = np.full(workspace, 0xFF, np.uint8)
    counters = np.zeros(s.counter_bytes(), np.uint8)
    buffers = AttentionBuffers(
        uploaded(raw), uploaded(caches[0]), uploaded(caches[1]), uploaded(np.array(case.past, np.int32)),
        uploaded(cos), uploaded(sin), uploaded(np.full(out.nbytes, 0xFF, np.uint8)), uploaded(nothing),
        uploaded(weights["q_norm"]) if case.norm else 0, uploaded(weights["k_norm"]) if case.norm else 0,
        uploaded(np.array(case.new, np.int32)) if case.new is not None else 0,
        uploaded(counters) if case.counters else 0, *case.per_head,
        uploaded(np.zeros(case.prefetch, np.uint8)) if case.prefetch else 0, case.prefetch,
    )  # fmt: skip
    launches = attention.attention_launches(
        s, buffers, case.multiprocessors, epsilon=case.epsilon, clip=case.clip, scale=case.scale, splits=case.splits
    )
    for launch in launches:
        device.launch(launch)
    device.synchronize()
    requested = device.prefetched if isinstance(device, EmulatedDevice) else None
    prefetched = (requested[0] - buffers.prefetch, requested[1] - buffers.prefetch) if requested else None
    result = Result(out, np.empty_like(caches[0]), np.empty_like(caches[1]), len(launches), prefetched)
    device.download(buffers.out, out)
    device.download(buffers.key_cache, result.key_cache)
    device.download(buffers.value_cache, result.value_cache)
    if case.counters:
        device.download(buffers.counters, counters)
        assert not counters.any(), "the counters were not reset to zeros"
    for address in addresses:
        device.free(address)
    result.out = from_bits(out, s.activations)
    return result


def random_call(case: Case) -> tuple[Array, dict[str, Array], tuple[Array, Array]]:
    """qkv, norms, and caches whose past is random and whose rest is NaNs."""
    s = case.shape
    rng = np.random.default_rng(case.seed)
    qkv = rounded(rng.standard_normal((s.batch, s.tokens, (s.heads + 2 * s.kv_heads) * s.size)), s.activations)
    weights = {
        "q_norm": rng.uniform(0.5, 2, s.size if case.per_head[0] else s.heads * s.size).astype(np.float32),
        "k_norm": rng.uniform(0.5, 2, s.size if case.per_head[1] else s.kv_heads * s.size).astype(np.float32),
    }
    return qkv, weights, (random_cache(case, rng), random_cache(case, rng))


def random_cache(case: Case, rng: Generator) -> Array:
    s = case.shape
    cache = np.full((s.batch, s.kv_heads, s.capacity * attention.row_bytes(s.cache, s.size)), 0xFF, np.uint8)
    for b, past in enumerate(case.past):
        x = rng.standard_normal((s.kv_heads, past, s.size)) * 1.5
        width = attention.CODE_BYTES[s.cache]
        if width > 1:
            codes = to_bits(x, s.cache)
        elif s.cache == "int8":
            codes = rng.integers(-127, 128, x.shape).astype(np.int8)
        else:
            codes = rng.integers(0, 0x7F, x.shape).astype(np.uint8) | rng.integers(0, 2, x.shape).astype(np.uint8) << 7
        cache[b, :, : past * s.size * width] = codes.reshape(s.kv_heads, -1).view(np.uint8)
        if width == 1:
            largest = 127 if s.cache == "int8" else 448
            scales = (rng.uniform(0.5, 2, (s.kv_heads, past)) / largest).astype(np.float32)
            start = s.capacity * s.size
            cache[b, :, start : start + 4 * past] = scales.view(np.uint8)
    return cache


def check_appended(case: Case, before: Array, after: Array, x: Array) -> None:
    """Check that x [B, T, G, S] was appended, rounded to the nearest code, and that nothing else changed."""
    s = case.shape
    old, new = read_cache(s, before), read_cache(s, after)
    for b, past in enumerate(case.past):
        fresh = case.fresh[b]
        assert np.array_equal(old[b, :, :past], new[b, :, :past])
        assert np.array_equal(old[b, :, past + fresh :], new[b, :, past + fresh :], equal_nan=True)
        exact = np.moveaxis(x[b, :fresh], 0, 1)
        found = new[b, :, past : past + fresh]
        largest = np.abs(exact).max(-1, keepdims=True)
        if s.cache == "int8":
            step = largest / 127 / 2
        elif s.cache == "fp8":
            step = np.maximum(np.abs(exact) * 2.0**-4, largest / 448 * 2.0**-10)
        else:
            step = np.maximum(np.abs(exact) * UNIT[s.cache], 2.0**-25 if s.cache == "f16" else 0)
        # Before rounding, an element has the errors of the norm's sum, its multiplications and the rotation.
        tolerance = step * (1 + 2.0**-10) + 12 * U * largest * (1.5 if s.cache == "f32" else 1)
        if not fresh:
            continue
        worst = np.unravel_index((np.abs(found - exact) - tolerance).argmax(), exact.shape)
        assert np.abs(found - exact)[worst] <= np.broadcast_to(tolerance, exact.shape)[worst], (
            f"sequence {b}, (g, token, element) {worst}: {found[worst]} for {exact[worst]}"
        )


def check(case: Case, capability: tuple[int, int] = (8, 0), order: int = 0) -> Result:
    qkv, weights, caches = random_call(case)
    result = compute(case, qkv, weights, caches, capability, order)
    q, k, v = prepared(case, qkv, weights)
    check_appended(case, caches[0], result.key_cache, k)
    check_appended(case, caches[1], result.value_cache, v)
    held = [read_cache(case.shape, cache) for cache in (result.key_cache, result.value_cache)]
    compare(case, result.out, *attended(case, q, *held))
    return result


def compare(case: Case, out: Array, expected: Array, tolerance: Array) -> None:
    error = np.where(np.isnan(out), np.inf, np.abs(out - expected))
    worst = np.unravel_index((error / tolerance).argmax(), out.shape)
    assert error[worst] <= tolerance[worst], (
        f"{case}: at (sequence, token, head, element) {tuple(map(int, worst))} {out[worst]}, expected "
        f"{expected[worst]} +- {tolerance[worst]}; {int((error > tolerance).sum())} of {error.size} are off"
    )


def shape(
    batch: int, tokens: int, heads: int, kv_heads: int, size: int, capacity: int,
    cache: str = "bf16", activations: str = "bf16",
) -> AttentionShape:  # fmt: skip
    return AttentionShape(batch, tokens, heads, kv_heads, size, capacity, capacity + 3, activations, cache)


COMBINATIONS = [  # activations, cache, size of a head, compute capability
    ("bf16", "bf16", 32, (8, 0)),
    ("bf16", "int8", 32, (8, 0)),
    ("bf16", "fp8", 32, (8, 9)),
    ("f16", "int8", 64, (8, 0)),
    ("f16", "fp8", 32, (8, 0)),
    ("f16", "f16", 64, (8, 0)),
    ("bf16", "f16", 128, (8, 0)),
    ("bf16", "fp8", 128, (8, 0)),
    ("f32", "f32", 64, (8, 0)),
]
PASTS = (0, 1, 63, 64, 65, 200)


def case(
    combination: tuple[str, str, int, tuple[int, int]], tokens: int, shared_by: int, past: tuple[int, ...],
    kv_heads: int = 1, **more: Any,
) -> Case:  # fmt: skip
    activations, cache, size, _ = combination
    capacity = -(-(max(past) + tokens) // 4) * 4 + 4
    return Case(
        shape(len(past), tokens, kv_heads * shared_by, kv_heads, size, capacity, cache, activations), past, **more
    )


@pytest.mark.parametrize("tokens", [*range(1, 18), 33, 64, 100])
def test_any_number_of_tokens_sees_all_before_it(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    combination = COMBINATIONS[tokens % 4]
    for shared_by in (1, 2, 4, 8) if tokens < 18 else ((1, 4)[tokens % 2],):
        past = tuple(int(x) for x in rng.choice(PASTS if tokens < 5 else PASTS[:5], 1 + (tokens + shared_by) % 3))
        check(
            case(combination, tokens, shared_by, past, seed=tokens, multiprocessors=(1, 8)[shared_by % 3 % 2]),
            combination[3],
        )


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_every_kind_of_cache_with_norm_clip_scale_and_padding(
    combination: tuple[str, str, int, tuple[int, int]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for tokens, shared_by, multiprocessors in ((1, 4, 4), (3, 2, 4), (9, 4, 1), (19, 1, 99)):
        past = tuple(int(x) for x in rng.choice(PASTS[:5], 2))
        new = (int(rng.integers(0, tokens + 1)), tokens) if seed else None
        more = {"clip": 1.2, "scale": 0.2} if seed == 7 else {}
        one = case(combination, tokens, shared_by, past, 2, new=new, norm=seed < 7, seed=seed, **more)
        check(replace(one, multiprocessors=multiprocessors, counters=bool(seed)), combination[3], order=seed)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_a_norm_weight_of_one_head_norms_each_head_separately(
    combination: tuple[str, str, int, tuple[int, int]],
) -> None:
    for tokens, shared_by, kv_heads in ((1, 4, 2), (3, 2, 3), (21, 2, 2)):
        one = case(combination, tokens, shared_by, (65, 3), kv_heads, norm=True, clip=1.5, seed=tokens)
        for per_head in ((True, True), (True, False), (False, True)):
            check(replace(one, per_head=per_head), combination[3], order=tokens)
        check(replace(one, per_head=(True, True), counters=False), combination[3])
    check(case(combination, 2, 1, (5,), norm=True, per_head=(True, True)), combination[3])


@pytest.mark.parametrize("combination", COMBINATIONS[:3], ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize(("tokens", "counters"), [(2, True), (2, False), (24, True)])
def test_splits_change_only_rounding_and_the_order_of_warps_changes_nothing(
    combination: tuple[str, str, int, tuple[int, int]], tokens: int, counters: bool
) -> None:
    for splits in (1, 2, 5):
        one = case(combination, tokens, 4, (200, 3, 64), counters=counters, splits=splits)
        results = [check(one, combination[3], order) for order in (0, 1, 7)]
        for other in results[1:]:
            assert np.array_equal(results[0].out, other.out)
        assert results[0].launches == (1 if counters and tokens == 2 else 2)


@pytest.mark.skipif(ON_GPU, reason="a GPU does not say what it prefetched")
def test_blocks_without_keys_prefetch_all_of_the_next_weights_and_change_nothing() -> None:
    few = case(COMBINATIONS[0], 1, 4, (70, 1, 130), kv_heads=2, splits=5)  # 2, 1 and 3 of 5 splits have keys
    plain = check(few)
    assert plain.prefetched is None
    for nbytes in (1, 128, 129, 200_000):  # fewer lines than idle threads, and several for each
        result = check(replace(few, prefetch=nbytes))
        assert np.array_equal(result.out, plain.out)
        assert result.prefetched == (0, (nbytes - 1) // 128 * 128)
    full = case(COMBINATIONS[0], 1, 4, (300,), splits=5, prefetch=4096)
    assert check(full).prefetched is None


@pytest.mark.parametrize("combination", COMBINATIONS[:3], ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_more_splits_than_are_merged_at_a_time(combination: tuple[str, str, int, tuple[int, int]]) -> None:
    for past in (1100, 2090):  # 18 and 33 tiles; 16 splits are loaded at a time
        check(case(combination, 1, 4, (past,), splits=40), combination[3])


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_token_by_token_gives_the_same_as_all_at_once(combination: tuple[str, str, int, tuple[int, int]]) -> None:
    tokens, steps = 23, (18, 1, 3, 1)
    whole = case(combination, tokens, 2, (50,), 2, norm=True)
    qkv, weights, caches = random_call(whole)
    at_once = compute(whole, qkv, weights, caches, combination[3])
    q, _, _ = prepared(whole, qkv, weights)
    held = [read_cache(whole.shape, cache) for cache in (at_once.key_cache, at_once.value_cache)]
    _, tolerance = attended(whole, q, *held)
    done = 0
    for step in steps:
        part = replace(whole, shape=replace(whole.shape, tokens=step), past=(50 + done,))
        found = compute(part, qkv[:, done : done + step], weights, caches, combination[3])
        caches = (found.key_cache, found.value_cache)
        compare(part, found.out, at_once.out[:, done : done + step], 2 * tolerance[:, done : done + step])
        done += step
    assert np.array_equal(caches[0], at_once.key_cache)
    assert np.array_equal(caches[1], at_once.value_cache)


@pytest.mark.parametrize("combination", COMBINATIONS[:3], ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("tokens", [1, 20])
def test_keys_and_values_that_are_all_zero(combination: tuple[str, str, int, tuple[int, int]], tokens: int) -> None:
    one = case(combination, tokens, 4, (2,))
    qkv, weights, caches = random_call(one)
    qkv[..., one.shape.heads * one.shape.size :] = 0
    result = compute(one, qkv, weights, caches, combination[3])
    held = [read_cache(one.shape, cache) for cache in (result.key_cache, result.value_cache)]
    assert not held[0][:, :, 2 : 2 + tokens].any()
    compare(one, result.out, *attended(one, prepared(one, qkv, weights)[0], *held))


@pytest.mark.parametrize("combination", COMBINATIONS[:3], ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_nan_does_not_affect_other_sequences(combination: tuple[str, str, int, tuple[int, int]], tokens: int) -> None:
    one = case(combination, tokens, 4, (70, 70))
    qkv, weights, caches = random_call(one)
    clean = compute(one, qkv, weights, caches, combination[3])
    qkv[1, 0] = np.nan
    spoiled = compute(one, qkv, weights, caches, combination[3])
    assert np.isnan(spoiled.out[1]).any()
    assert np.array_equal(spoiled.out[0], clean.out[0])


def test_room_for_two_stages_on_the_smallest_multiprocessors() -> None:
    launched = set()
    types = [("f32", "f32"), *((a, e) for a in ("bf16", "f16") for e in ("bf16", "f16", "int8", "fp8"))]
    for (activations, cache), size, tokens, counters, multiprocessors in itertools.product(
        types, (32, 64, 128), (1, 100), (0, 1), (1, 1000)
    ):
        one = AttentionShape(1, tokens, 4, 4, size, 4096, 4096, activations, cache)
        buffers = AttentionBuffers(*range(1, 9), counters=counters)
        for launch in attention.attention_launches(one, buffers, multiprocessors):
            assert launch.shared <= 99 << 10, launch.kernel
            launched.add(launch.kernel)
    assert launched == {name for name in kernels() if name.startswith("attention_")}


def test_a_model_asks_for_kernels_that_exist() -> None:
    for activations, cache in (("bf16", "f16"), ("f16", "fp8"), ("f32", "f32")):
        assert set(attention.kernels_for(activations, cache, 64)) <= set(kernels())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, "the size of a head is 48, expected 32, 64, 128"),
        ({"heads": 6}, "heads is 6, expected a multiple of the 4 key/value heads"),
        ({"cache": "int8", "capacity": 98}, "the capacity of an int8 cache is 98, expected a multiple of 4"),
        ({"cache": "f32"}, "the cache of bf16 activations is f32, expected bf16 or f16 or int8 or fp8"),
        ({"activations": "f32"}, "the cache of f32 activations is bf16, expected f32"),
        ({"activations": "int8"}, "the type of qkv is int8, expected bf16, f16 or f32"),
        ({"tokens": 101}, "tokens is 101, expected at most the cache's 100"),
        ({"tokens": 0}, "tokens is 0, expected at least 1"),
        ({"positions": 99}, "the number of rotary positions is 99, expected at least the cache's 100"),
    ],
)
def test_a_shape_without_kernels_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(f"GroupQueryAttention: {message}")):
        attention.workspace_bytes(replace(shape(1, 1, 8, 4, 64, 100), **change), 4)


def test_missing_buffers_are_named() -> None:
    nothing = AttentionBuffers(1, 0, 1, 1, 1, 1, 0, 1)
    with pytest.raises(DeviceError, match="key_cache, out has no address"):
        attention.attention_launches(shape(1, 1, 8, 4, 64, 100), nothing, 4)
    one_norm = AttentionBuffers(1, 1, 1, 1, 1, 1, 1, 1, q_norm=1)
    with pytest.raises(DeviceError, match="one of q_norm and k_norm"):
        attention.attention_launches(shape(1, 1, 8, 4, 64, 100), one_norm, 4)
    with pytest.raises(DeviceError, match="there is no int4 cache"):
        attention.row_bytes("int4", 64)
