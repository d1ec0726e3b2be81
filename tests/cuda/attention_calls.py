"""Requests to the launch planning in C++ (csrc/cuda/host): GroupQueryAttention.

The comments of attention.h describe the fields. Addresses are integers; 0: absent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import Launch

CODE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "int8": 1, "fp8": 1}
"""The types of a cache, and the bytes of one code."""


@dataclass(frozen=True)
class AttentionShape:
    """`AttentionShape` of attention.h."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    size: int
    capacity: int
    positions: int
    activations: str = "bf16"
    cache: str = "bf16"

    @property
    def rows(self) -> int:
        """Rows per sequence and KV head."""
        return self.tokens * self.heads // self.kv_heads

    def cache_bytes(self) -> int:
        """Bytes of the key cache; the value cache has the same size."""
        return self.batch * self.kv_heads * self.capacity * row_bytes(self.cache, self.size)

    def counter_bytes(self) -> int:
        """Bytes of `AttentionBuffers.counters`."""
        return 4 * self.batch * self.kv_heads


@dataclass(frozen=True)
class AttentionBuffers:
    """`AttentionBuffers` of attention.h."""

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
    prefetch: int = 0
    prefetch_bytes: int = 0


def attention_launches(
    shape: AttentionShape,
    buffers: AttentionBuffers,
    multiprocessors: int,
    *,
    epsilon: float = 1e-5,
    clip: float = 0.0,
    scale: float = 0.0,
    splits: int | None = None,
) -> list[Launch]:
    """Return the launches of one GroupQueryAttention."""
    options = {"epsilon": epsilon, "clip": clip, "scale": scale, "splits": splits or 0}
    fields = {**asdict(shape), **asdict(buffers), **options, "multiprocessors": multiprocessors}
    return planning.launches("attention_launches", fields)


def workspace_bytes(shape: AttentionShape, multiprocessors: int, splits: int | None = None) -> int:
    """Return the bytes of scratch memory that `attention_launches` needs."""
    fields = {**asdict(shape), "multiprocessors": multiprocessors, "splits": splits or 0}
    return int(planning.call("attention_workspace", fields))


def row_bytes(cache: str, size: int) -> int:
    """Return the bytes of the cache per head and token."""
    return int(planning.call("attention_row", {"cache": cache, "size": size}))


def kernels_for(activations: str, cache: str, size: int) -> tuple[str, ...]:
    """Return all kernels that a model with this head size needs."""
    fields = {"activations": activations, "cache": cache, "size": size}
    return tuple(planning.call("attention_kernels", fields).decode().split())
