"""Memory and disk that a planned bundle takes, and whether a machine has them."""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.bundle.reads import cache_bytes
from edgelm.preflight.planned import Planned
from edgelm.runtimes.base import DEFAULT_CHUNK

MIB = 1 << 20
PROCESS = 100 * MIB
"""Python, numpy, ONNX Runtime and our operators before a bundle is loaded: 39 MB of it are counted as the process's own
by Linux, the rest are libraries."""
GPU_PROCESS = 400 * MIB
"""The same with a driver's context: assumed, no GPU was at hand."""
OTHER_FILES = 24 * MIB
"""Graphs, parity pack, manifest and tokenizer of a bundle: 11 to 19 MB in the bundles of both full-size models."""
COMFORT = 0.8
"""Share of the memory below which a bundle fits comfortably: other programs may want the rest."""


@dataclass(frozen=True)
class Memory:
    """Memory of a run in bytes.

    Attributes:
        weights: the mapped weights file.
        cache: the KV cache at `context`.
        activations: intermediate results of a chunk of the prompt.
        process: the rest of the process.
        context: tokens.
    """

    weights: int
    cache: int
    activations: int
    process: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.process

    def as_dict(self) -> dict[str, int]:
        """Return the fields for a JSON document."""
        return {
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "process": self.process,
            "context": self.context,
            "total": self.total,
        }


def memory(planned: Planned, context: int, kv: str | None = None) -> Memory:
    """Return the memory of a run with a context of `context` tokens and a cache of type `kv` (None: the bundle's)."""
    info = planned.info
    chunk = min(DEFAULT_CHUNK, context)
    width = planned.decoder.feed_forward_width * max(1, info.experts_per_token)
    heads = (2 * info.num_heads + 2 * info.num_kv_heads) * info.head_dim
    return Memory(
        weights=planned.weights_bytes,
        cache=round(cache_bytes(info, kv or planned.kv, planned.ops, context)),
        activations=4 * chunk * (4 * info.hidden_size + heads + 3 * width) + 4 * info.vocab_size,
        process=GPU_PROCESS if planned.target != "cpu" else PROCESS,
        context=context,
    )


def longest_context(planned: Planned, available: int, kv: str | None = None) -> int:
    """Return the longest context whose run fits into `available` bytes, at most the model's; 0 for none."""
    low, high = 0, planned.info.context_length
    while low < high:
        middle = (low + high + 1) // 2
        if memory(planned, middle, kv).total <= available:
            low = middle
        else:
            high = middle - 1
    return low


def disk_bytes(planned: Planned) -> int:
    """Return the bytes of the bundle's files."""
    return planned.weights_bytes + OTHER_FILES
