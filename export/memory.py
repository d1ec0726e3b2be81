"""What an export needs in memory, said before it starts."""

from __future__ import annotations

from edgelm.bundle import ModelInfo
from edgelm.devices import resident_memory
from edgelm.errors import MemoryLimitError
from edgelm.export.packing.weights_file import BLOCK_WEIGHTS
from edgelm.sizes import format_size

MIB = 1 << 20
# Allocators keep freed blocks and torch its kernels: measured peaks of full-size exports lie within this of the sum.
SLACK = 160 * MIB
# What Python, torch and onnx take where the system does not say how much is resident now.
ASSUMED_BASE = 700 * MIB


def fitting_threads(info: ModelInfo, expert_width: int, golden_tokens: int, threads: int, limit: int | None) -> int:
    """With how many threads, `threads` at most, an export stays below `limit` bytes.

    Two phases never overlap: writing the weights (a few blocks per thread) and the reference's golden values (one
    layer's dense weights, one expert, the sequences' activations and caches).

    Raises:
        MemoryLimitError: not even one thread fits; says what it would take.
    """
    base = resident_memory()[0] or ASSUMED_BASE
    dense = (2 * info.num_heads + 2 * info.num_kv_heads) * info.head_dim * info.hidden_size
    mlp = 3 * expert_width * info.hidden_size  # of one expert, or of the whole layer where there are none
    per_token = 4 * info.hidden_size * (3 * (info.num_layers + 1) + 16) + 8 * info.num_layers * (
        info.num_kv_heads * info.head_dim
    )
    # bf16 as read plus float32 as computed: six bytes a weight; heads and embeddings go by blocks like everything else.
    reference = 6 * (dense + mlp) + 6 * 2 * BLOCK_WEIGHTS + golden_tokens * (per_token + 64 * info.num_experts)
    for count in range(threads, 0, -1):
        # A thread holds one block as read, as float32 and as codes, and the kernels' or numpy's scratch.
        writing = count * 24 * min(max(BLOCK_WEIGHTS, mlp), 2 * BLOCK_WEIGHTS)
        needed = base + max(writing, reference) + SLACK
        if limit is None or needed <= limit:
            return count
    assert limit is not None
    raise MemoryLimitError(
        f"--max-ram {format_size(limit)} is too little: this export takes about {format_size(needed)} "
        f"({format_size(base)} of it Python and its libraries)"
    )
