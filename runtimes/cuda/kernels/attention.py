"""Launches of the kernels in attention.cuh: GroupQueryAttention with its KV cache.

`docs/reference/operators.md` defines the operator. Here qkv and the result are bfloat16, float16 or float32. A cache is
bytes [B, G, C, R]: for one sequence and head C * S codes, then, for int8 and fp8, C float32 scales.

| new tokens | launches |
|---|---|
| T * H / G <= 16 rows, `counters` given | 1: decode, which also prepares queries, keys and values |
| T * H / G <= 16 rows | 2: prepare, split |
| more | 2: prepare, prefill (64 rows per block) or, with many rows, wide (128) |
| float32 | 2: prepare, exact |

Lengths stay on the device: grids depend on shapes only, so that a CUDA graph can be replayed as the cache grows.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from edgelm.bundle.gpu_layout import aligned
from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Launch

HEADER = "attention/attention.cuh"

HEAD_SIZES = (32, 64, 128)
CODE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "int8": 1, "fp8": 1}
"""The types of a cache, and the bytes of one code."""
FEW_ROWS = 16
"""The largest number of rows, T * H / G, for which the warps of a block divide the cache."""

_THREADS = 128
_TILE_KEYS = 64
_MAX_SPLITS = {16: 32, 64: 16, 128: 16}  # by rows per block
_CACHE_TYPES = {"f16": "f16", "bf16": "bf16", "f32": "float", "int8": "i8", "fp8": "e4m3"}
_ARGS = struct.Struct("<14Q7i4fi")  # AttentionArgs in attention_cache.cuh
_BODIES = {
    "prepare": "attention_prepare<{a}, {e}, {s}>",
    "decode": "attention_tiles<{a}, {e}, {s}, 16, true>",
    "split": "attention_tiles<{a}, {e}, {s}, 16, false>",
    "prefill": "attention_tiles<{a}, {e}, {s}, 64, false>",
    "wide": "attention_tiles<{a}, {e}, {s}, 128, false>",
    "exact": "attention_exact<{s}>",
}
_MIN_BLOCKS = {"prepare": 4, "decode": 2, "split": 2, "prefill": 2, "wide": 2, "exact": 4}


@dataclass(frozen=True)
class AttentionShape:
    """The shape of one call of the operator.

    Attributes:
        batch: sequences, B.
        tokens: new tokens of each, T, padding included.
        heads: query heads, H.
        kv_heads: key and value heads, G, which divides H.
        size: head size, S: 32, 64 or 128.
        capacity: tokens that the cache has room for, C; a multiple of 4 for int8 and fp8.
        positions: rows of the rotary tables, at least C.
        activations: type of qkv and the result: bf16, f16, or f32 (with an f32 cache).
        cache: type of the cache: bf16, f16, int8, fp8, or f32.

    Raises:
        DeviceError: there are no kernels for the shape.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    capacity: int
    positions: int
    activations: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self) -> None:
        def refuse(what: str, found: object, expected: str) -> None:
            raise DeviceError(f"GroupQueryAttention: {what} is {found}, expected {expected}")

        if self.activations not in ("bf16", "f16", "f32"):
            refuse("the type of qkv", self.activations, "bf16, f16 or f32")
        caches = ("f32",) if self.activations == "f32" else ("bf16", "f16", "int8", "fp8")
        if self.cache not in caches:
            refuse(f"the cache of {self.activations} activations", self.cache, " or ".join(caches))
        for name in ("batch", "tokens", "heads", "kv_heads", "capacity"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "at least 1")
        if self.heads % self.kv_heads:
            refuse("heads", self.heads, f"a multiple of the {self.kv_heads} key/value heads")
        if self.size not in HEAD_SIZES:
            refuse("the size of a head", self.size, ", ".join(map(str, HEAD_SIZES)))
        if CODE_BYTES[self.cache] == 1 and self.capacity % 4:
            refuse(f"the capacity of an {self.cache} cache", self.capacity, "a multiple of 4")
        if self.tokens > self.capacity:
            refuse("tokens", self.tokens, f"at most the cache's {self.capacity}")
        if self.positions < self.capacity:
            refuse("the number of rotary positions", self.positions, f"at least the cache's {self.capacity}")
        if self.batch > 65535 or self.kv_heads > 65535:
            refuse("batch and key/value heads", (self.batch, self.kv_heads), "at most 65535 each")

    @property
    def rows(self) -> int:
        """Rows per sequence and KV head, T * H / G."""
        return self.tokens * self.heads // self.kv_heads

    @property
    def few(self) -> bool:
        """Whether the kernels for few rows are used."""
        return self.rows <= FEW_ROWS

    def cache_bytes(self) -> int:
        """Bytes of the key cache; the value cache has the same size."""
        return self.batch * self.kv_heads * self.capacity * row_bytes(self.cache, self.size)

    def counter_bytes(self) -> int:
        """Bytes of `AttentionBuffers.counters`."""
        return 4 * self.batch * self.kv_heads


@dataclass(frozen=True)
class AttentionBuffers:
    """Addresses on the device; 0 for an absent buffer.

    Attributes:
        qkv: A [B, T, (H + 2 G) S].
        key_cache: bytes [B, G, C, R], updated in place.
        value_cache: bytes [B, G, C, R], updated in place.
        past_lengths: int32 [B], tokens in the cache. past + new tokens must not exceed C; tokens beyond are dropped.
        cos: float32 [positions, S / 2].
        sin: float32 [positions, S / 2].
        out: A [B, T, H S].
        workspace: `workspace_bytes` of scratch memory.
        q_norm: float32 [H S], or [S] if `q_norm_per_head`; or 0.
        k_norm: float32 [G S], or [S] if `k_norm_per_head`; or 0, as q_norm.
        new_lengths: int32 [B], or 0: all T are new.
        counters: `AttentionShape.counter_bytes` of zeros, or 0. The kernels reset them to zeros. Only calls on one
        stream may
            share them. They save a launch for few rows.
        q_norm_per_head: q_norm has the size of one head; each head of the queries is normed separately.
        k_norm_per_head: the same for the keys.
    """

    qkv: int
    key_cache: int
    value_cache: int
    past_lengths: int
    cos: int
    sin: int
    out: int
    workspace: int
    q_norm: int = 0
    k_norm: int = 0
    new_lengths: int = 0
    counters: int = 0
    q_norm_per_head: bool = False
    k_norm_per_head: bool = False


def row_bytes(kind: str, size: int) -> int:
    """Return the bytes of the cache per head and token.

    Raises:
        DeviceError: `kind` is not a type of cache.
    """
    if kind not in CODE_BYTES:
        raise DeviceError(f"there is no {kind} cache on a GPU: choose {', '.join(CODE_BYTES)}")
    return CODE_BYTES[kind] * size + (4 if CODE_BYTES[kind] == 1 else 0)


@dataclass(frozen=True)
class _Plan:
    """Division of a call: rows per block, blocks per sequence and KV head, splits of the keys."""

    block_rows: int
    row_blocks: int
    splits: int

    @classmethod
    def of(cls, shape: AttentionShape, multiprocessors: int, splits: int | None) -> _Plan:
        heads = shape.batch * shape.kv_heads
        wide = heads * -(-shape.rows // 128) >= multiprocessors
        block_rows = FEW_ROWS if shape.few else 128 if wide else 64
        row_blocks = -(-shape.rows // block_rows)
        # As many splits as give each multiprocessor two blocks, but at least two tiles per split of a full cache.
        tiles = -(-shape.capacity // _TILE_KEYS)
        most = min(2 * multiprocessors // (heads * row_blocks), -(-tiles // 2), _MAX_SPLITS[block_rows])
        return cls(block_rows, row_blocks, splits or max(1, most))

    def workspace(self, shape: AttentionShape) -> tuple[int, int, int, int, int]:
        """Return the offsets of counters, queries, partial results and their totals, and the total size."""
        heads = shape.batch * shape.kv_heads
        exact = shape.activations == "f32"
        rows = heads * self.row_blocks * self.splits * self.block_rows if self.splits > 1 and not exact else 0
        offsets = [0]
        for part in (
            4 * heads * self.row_blocks,
            heads * shape.rows * shape.size * (4 if exact else 2),
            rows * shape.size * 4,
            rows * 8,
        ):
            offsets.append(offsets[-1] + aligned(part))
        return offsets[0], offsets[1], offsets[2], offsets[3], offsets[4]


def workspace_bytes(shape: AttentionShape, multiprocessors: int, splits: int | None = None) -> int:
    """Return the bytes of scratch memory. They do not grow with T monotonically: compute them for every T that is
    used."""
    return _Plan.of(shape, multiprocessors, splits).workspace(shape)[-1]


def attention_launches(
    shape: AttentionShape,
    buffers: AttentionBuffers,
    multiprocessors: int,
    *,
    epsilon: float = 1e-5,
    clip: float = 0.0,
    scale: float = 0.0,
    splits: int | None = None,
) -> tuple[Launch, ...]:
    """Return the launches of one GroupQueryAttention.

    Args:
        shape: of the call.
        buffers: addresses of all buffers.
        multiprocessors: of the device; determines the splits of the cache.
        epsilon: of the norms.
        clip: queries, keys and values are clamped to -clip .. clip after the norms; 0: no clamp.
        scale: of the scores; 0: 1 / sqrt(S).
        splits: number of splits of the keys; None: chosen by shape and device.

    Raises:
        DeviceError: a buffer is missing.
    """
    needed = ("qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin", "out", "workspace")
    missing = [name for name in needed if not getattr(buffers, name)]
    if missing:
        raise DeviceError(f"GroupQueryAttention: {', '.join(missing)} has no address, expected a buffer")
    if bool(buffers.q_norm) != bool(buffers.k_norm):
        raise DeviceError("GroupQueryAttention: one of q_norm and k_norm has no address, expected both or none")
    plan = _Plan.of(shape, multiprocessors, splits)
    scale = scale or 1 / math.sqrt(shape.size)
    one_launch = shape.few and buffers.counters != 0 and shape.activations != "f32"
    counters, queries, partials, totals, _ = (buffers.workspace + offset for offset in plan.workspace(shape))
    args = _ARGS.pack(
        buffers.qkv, buffers.key_cache, buffers.value_cache, buffers.past_lengths, buffers.new_lengths,
        buffers.cos, buffers.sin, buffers.q_norm, buffers.k_norm, buffers.out,
        queries, partials, totals, buffers.counters if one_launch else counters,
        shape.tokens, shape.heads, shape.kv_heads, shape.capacity, shape.positions, plan.splits, plan.row_blocks,
        epsilon, clip, scale, scale / math.log(2), buffers.q_norm_per_head + 2 * buffers.k_norm_per_head,
    )  # fmt: skip

    def launch(step: str, grid: tuple[int, int, int], shared: int) -> Launch:
        return Launch(kernel_name(step, shape.activations, shape.cache, shape.size), grid, _THREADS, shared, args)

    tiles_grid = (plan.row_blocks * plan.splits, shape.kv_heads, shape.batch)
    if one_launch:
        return (launch("decode", tiles_grid, shared_bytes("decode", shape.cache, shape.size)),)
    prepare = launch("prepare", (shape.tokens, shape.batch, 1), shared_bytes("prepare", shape.cache, shape.size))
    if shape.activations == "f32":
        return prepare, launch("exact", (-(-shape.rows // (_THREADS // 32)), shape.kv_heads, shape.batch), 0)
    step = {16: "split", 64: "prefill", 128: "wide"}[plan.block_rows]
    return prepare, launch(step, tiles_grid, shared_bytes(step, shape.cache, shape.size))


def shared_bytes(step: str, cache: str, size: int) -> int:
    """Return the bytes of shared memory per block: stages of keys and values, a tile of upcast codes, 128 rows of
    queries."""
    if step == "prepare":
        return 64
    if step == "exact":
        return 0
    few = step in ("decode", "split")
    stages = (3 if few else 2) * _TILE_KEYS * 2 * row_bytes(cache, size)
    upcast = _TILE_KEYS * 2 * size * 2 if CODE_BYTES[cache] == 1 and not few else 0
    return stages + upcast + (128 * size * 2 if step == "wide" else 0) + 128


def kernel_name(step: str, activations: str, cache: str, size: int) -> str:
    """Return the name of a kernel, e.g. `attention_decode_bf16_int8_s128`."""
    return f"attention_{step}_{activations}_{cache}_s{size}"


def kernels_for(activations: str, cache: str, size: int) -> tuple[str, ...]:
    """Return all kernels that a model with this head size needs."""
    steps = ("prepare", "exact") if activations == "f32" else ("prepare", "decode", "split", "prefill", "wide")
    return tuple(kernel_name(step, activations, cache, size) for step in steps)


def all_kernels() -> tuple[str, ...]:
    """Return the name of every kernel."""
    pairs = [("f32", "f32"), *((a, e) for a in ("bf16", "f16") for e in ("bf16", "f16", "int8", "fp8"))]
    return tuple(name for a, e in pairs for size in HEAD_SIZES for name in kernels_for(a, e, size))


def instantiation(name: str) -> str:
    """Return the line of C++ that instantiates the kernel `name`.

    Raises:
        KeyError: there is no such kernel.
    """
    if name not in all_kernels():
        raise KeyError(name)
    _, step, activations, cache, size = name.split("_")
    kinds = {"a": _CACHE_TYPES[activations], "e": _CACHE_TYPES[cache], "s": size[1:]}
    body = _BODIES[step].format(**kinds)
    return f"EDGELM_KERNEL({name}, AttentionArgs, {_THREADS}, {_MIN_BLOCKS[step]}, ({body}))"
