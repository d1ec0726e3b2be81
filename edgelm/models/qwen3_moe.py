"""Qwen3-MoE: Qwen3's attention and a sparse mixture of experts (arXiv 2505.09388).

The default of `norm_topk_prob` is false; published configs set it to true. Some layers may be dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.models import parts
from edgelm.models.config_fields import boolean, positive_int, shortened
from edgelm.models.rope import read_rope
from edgelm.models.spec import Decoder

KEYS = (
    parts.KEYS
    | (parts.WINDOW_KEYS - {"layer_types", "max_window_layers"})
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"}
    | {"decoder_sparse_step", "mlp_only_layers"}
)


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' Qwen3MoeConfig.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=32768, eps=1e-6, kv_heads=4)
    rope, context = read_rope(config, shape.head_dim, shape.context)
    experts, active = parts.expert_counts(config, "num_experts", "num_local_experts")
    expert_width = positive_int(config, "moe_intermediate_size", 768)
    normalize = boolean(config, "norm_topk_prob", False)
    step, dense_layers = positive_int(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list):
        raise CheckpointError(f"config.json: mlp_only_layers is {shortened(dense_layers)}; expected a list of layers")
    window = parts.window(config, context) if boolean(config, "use_sliding_window", False) else None

    def layer(i: int) -> parts.Blocks:
        stem = f"model.layers.{i}.mlp"
        attended = parts.attention(shape, i, rope, qk_norm="head", window=window)
        if i in dense_layers or (i + 1) % step:
            width = positive_int(config, "intermediate_size", 6144)
            return parts.pre_norm(shape, i, attended, parts.dense(shape, i, stem, width))
        mixed = parts.moe(shape, i, stem, expert_width, experts, active, normalize=normalize)
        return parts.pre_norm(shape, i, attended, mixed)

    return parts.decoder("qwen3_moe", shape, layer, context)
