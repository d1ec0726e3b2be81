"""OLMo-2: norms after attention and MLP instead of before; QK-norm over the whole width (arXiv 2501.00656)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.models import parts
from edgelm.models.config_fields import positive_int
from edgelm.models.rope import read_rope
from edgelm.models.spec import Block, Decoder

KEYS = parts.KEYS


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' Olmo2Config.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=2048, eps=1e-5)
    rope, context = read_rope(config, shape.head_dim, shape.context)
    width = positive_int(config, "intermediate_size")

    def layer(i: int) -> parts.Blocks:
        stem = f"model.layers.{i}"
        attended = parts.attention(shape, i, rope, qk_norm="whole")
        network = parts.dense(shape, i, f"{stem}.mlp", width)
        return (
            Block(i, attended, after=shape.norm(f"{stem}.post_attention_layernorm")),
            Block(i, network, after=shape.norm(f"{stem}.post_feedforward_layernorm")),
        )

    return parts.decoder("olmo2", shape, layer, context)
