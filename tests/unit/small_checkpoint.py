"""Write small random checkpoints of two families, with outlier channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.checkpoint import Checkpoint
from edgelm.checkpoint.writer import ShardedWriter, TensorSpec, float32_to_bf16
from edgelm.models import decoder as decoder_of

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FOX: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
CONFIGS = {"olmoe": OLMOE, "fox": FOX}


def write_small(folder: Path, name: str, *, bf16: bool = True, **changes: Any) -> Checkpoint:
    """Write and open a checkpoint in which three channels of every norm are eight times the others."""
    config = CONFIGS[name] | changes
    shapes = decoder_of(config).tensor_shapes
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with ShardedWriter(folder, {n: TensorSpec("BF16" if bf16 else "F32", s) for n, s in shapes.items()}) as writer:
        for tensor, shape in shapes.items():
            if len(shape) == 1:
                values = 1 + 0.1 * generator.standard_normal(shape, dtype=np.float32)
                values[[3, 17, 24]] *= 8
            else:
                values = generator.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
            writer.write(tensor, float32_to_bf16(values) if bf16 else values)
    return Checkpoint.open(folder)


def tokens(count: int = 8, length: int = 24, seed: int = 0) -> np.ndarray:
    """Return random windows int64 [count, length]."""
    return np.random.default_rng(seed).integers(0, 96, (count, length))
