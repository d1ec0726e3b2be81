"""Bytes that decoding one token reads, of a bundle that exists or is planned."""

from __future__ import annotations

from collections.abc import Iterable

from edgelm.bundle import ModelInfo
from edgelm.bundle.cpu_layout import RESCORE, TILE
from edgelm.bundle.kv_cache import row_bytes


def weight_bytes_per_token(tensors: Iterable[tuple[str, int]], model: ModelInfo) -> float:
    """Return the bytes of weights that decoding one token reads.

    Of an MoE layer only the selected experts count. The embedding table counts only if it is tied to the head. Of a
    head in split nibbles, the low nibbles are read only in the tiles of the rescored logits.

    Args:
        tensors: name and size in bytes of each tensor in the weights file.
        model: the model's shapes.
    """
    total = 0.0
    for name, size in tensors:
        if ".moe." in name:
            total += size * model.experts_per_token / max(1, model.num_experts)
        elif name.startswith("rope.") or ("embed_tokens" in name and not model.tied):
            continue
        elif name.endswith(".lower"):
            total += size * min(1.0, RESCORE * TILE / model.vocab_size)
        else:
            total += size
    return total


def cache_bytes(model: ModelInfo, kv: str, ops: str, tokens: float = 1) -> float:
    """Return the bytes of the KV cache of `tokens` tokens, of the type `kv`, in the operator set `ops`."""
    return 2 * model.num_layers * model.num_kv_heads * row_bytes(kv, model.head_dim, ops) * tokens


def bytes_per_token(tensors: Iterable[tuple[str, int]], model: ModelInfo, kv: str, ops: str, position: float) -> int:
    """Return the bytes that decoding one token at `position` reads: active weights and the KV cache so far.

    Args:
        tensors: as `weight_bytes_per_token`.
        model: the model's shapes.
        kv: type of the KV cache.
        ops: operator set.
        position: tokens in the cache; may be an average.
    """
    return round(weight_bytes_per_token(tensors, model) + cache_bytes(model, kv, ops, position))
