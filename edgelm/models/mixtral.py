"""Mixtral: Mistral's attention and a sparse mixture of experts (arXiv 2401.04088).

The weights of the selected experts are divided by their sum, which equals a softmax over the selected experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.models import parts
from edgelm.models.config_fields import positive_int
from edgelm.models.rope import read_rope
from edgelm.models.spec import Decoder

KEYS = parts.KEYS | {"sliding_window", "num_local_experts", "num_experts_per_tok"}


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' MixtralConfig.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=1 << 17, eps=1e-5, kv_heads=8)
    rope, context = read_rope(config, shape.head_dim, shape.context, theta=1e6)
    width = positive_int(config, "intermediate_size")
    experts, active = parts.expert_counts(config, "num_local_experts")
    window = parts.window(config, context)
    names = ("w1", "w3", "w2")

    def layer(i: int) -> parts.Blocks:
        stem = f"model.layers.{i}.block_sparse_moe"
        mixed = parts.moe(shape, i, stem, width, experts, active, normalize=True, names=names)
        return parts.pre_norm(shape, i, parts.attention(shape, i, rope, window=window), mixed)

    return parts.decoder("mixtral", shape, layer, context)
