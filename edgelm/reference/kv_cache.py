"""KV cache of the reference model, and the trace of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trace:
    """Intermediate results, filled by a model's forward pass. Pass a new one to each call. Gradients are kept.

    Attributes:
        hidden: L + 1 tensors [B, T, D]; [0] is the embedding output, [i + 1] the residual stream after layer i.
        router_logits: one [B, T, E] per MoE layer.
        experts: one int64 [B, T, A] per MoE layer: the selected experts by descending weight.
        expert_weights: one [B, T, A] per MoE layer: their weights, as used.
    """

    hidden: list[Tensor] = field(default_factory=list)
    router_logits: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    expert_weights: list[Tensor] = field(default_factory=list)


class KVCache:
    """Keys and values of all positions so far: a pair of buffers [B, K, S, Dh] per layer, which grow by doubling."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Number of positions, S."""
        return min(self._lengths)

    def layer_length(self, layer: int) -> int:
        """Return the number of positions of a layer, which is T more than `length` during a forward pass."""
        return self._lengths[layer]

    def truncate(self, length: int) -> None:
        """Remove all positions from `length` on.

        Raises:
            ValueError: there are fewer positions, or `length` is negative.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self._lengths = [length] * len(self._lengths)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, T, Dh] to a layer, and return all of them, [B, K, S + T, Dh]."""
        start, end = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        self._keys[layer] = _store(self._keys[layer], keys, start)
        self._values[layer] = _store(self._values[layer], values, start)
        self._lengths[layer] = end
        all_keys, all_values = self._keys[layer], self._values[layer]
        assert all_keys is not None
        assert all_values is not None
        return all_keys[:, :, :end], all_values[:, :, :end]


def _store(buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
    end = start + new.shape[2]
    if buffer is None:
        buffer = new.new_empty((*new.shape[:2], end, new.shape[3]))
    elif buffer.shape[2] < end:
        grown = buffer.new_empty((*buffer.shape[:2], max(end, 2 * buffer.shape[2]), buffer.shape[3]))
        grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    with torch.no_grad():
        buffer[:, :, start:end] = new
    return buffer
