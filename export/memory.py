"""Estimate the memory that an export needs, before it starts."""

from __future__ import annotations

from edgelm.bundle import ModelInfo
from edgelm.devices import resident_memory
from edgelm.errors import MemoryLimitError
from edgelm.export.packing.weights_file import BLOCK_WEIGHTS
from edgelm.sizes import format_size

MIB = 1 << 20
# Allocators keep freed blocks, and torch keeps its kernels. Measured peaks of full-size exports stay below the estimate
# plus this.
SLACK = 160 * MIB
# Python, torch and onnx, on systems that do not report the resident memory.
ASSUMED_BASE = 700 * MIB


def needed_memory(info: ModelInfo, expert_width: int, golden_tokens: int, threads: int, base: int) -> int:
    """Return the bytes of resident memory of an export with `threads` threads; other arguments as `fitting_threads`.

    Args:
        info, expert_width, golden_tokens, threads: As for `fitting_threads`.
        base: Memory of the process before.
    """
    dense = (2 * info.num_heads + 2 * info.num_kv_heads) * info.head_dim * info.hidden_size
    mlp = 3 * expert_width * info.hidden_size  # one expert, or the feed-forward of a dense layer
    per_token = 4 * info.hidden_size * (3 * (info.num_layers + 1) + 16) + 8 * info.num_layers * (
        info.num_kv_heads * info.head_dim
    )
    # Six bytes per weight: bfloat16 as read, float32 as computed. Head and embedding are read in blocks.
    reference = 6 * (dense + mlp) + 6 * 2 * BLOCK_WEIGHTS + golden_tokens * (per_token + 64 * info.num_experts)
    # A thread holds one block as read, as float32 and as quantised values, plus scratch memory.
    writing = threads * 24 * min(max(BLOCK_WEIGHTS, mlp), 2 * BLOCK_WEIGHTS)
    return base + max(writing, reference) + SLACK


def fitting_threads(info: ModelInfo, expert_width: int, golden_tokens: int, threads: int, limit: int | None) -> int:
    """Return the largest number of threads with which an export stays below a memory limit.

    The estimate is the larger of two phases, which never overlap: writing the weights (a few blocks per thread), and
    computing the reference of the parity pack (the dense weights of one layer, one expert, and the activations and
    caches of all prompts).

    Args:
        info: Shapes of the model.
        expert_width: Feed-forward width of an expert, or of a layer in a dense model.
        golden_tokens: Tokens of all prompts of the parity pack.
        threads: Upper limit of the result.
        limit: Bytes of resident memory; None for no limit.

    Raises:
        MemoryLimitError: One thread needs more than `limit`; the message says how much.
    """
    base = resident_memory()[0] or ASSUMED_BASE
    for count in range(threads, 0, -1):
        needed = needed_memory(info, expert_width, golden_tokens, count, base)
        if limit is None or needed <= limit:
            return count
    assert limit is not None
    raise MemoryLimitError(
        f"--max-ram {format_size(limit)} is too little: this export takes about {format_size(needed)} "
        f"({format_size(base)} of it Python and its libraries). Raise the limit, or use a machine with more memory"
    )
