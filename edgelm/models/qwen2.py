"""Qwen2, Qwen2.5 and Qwen1.5: Llama with biases in the q, k and v projections (arXiv 2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.models import parts
from edgelm.models.config_fields import positive_int
from edgelm.models.rope import read_rope
from edgelm.models.spec import Decoder

KEYS = parts.KEYS | parts.WINDOW_KEYS


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' Qwen2Config.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=32768, eps=1e-6, kv_heads=32)
    rope, context = read_rope(config, shape.head_dim, shape.context)
    width = positive_int(config, "intermediate_size")
    windows = parts.layer_windows(config, shape.layers, context)

    def layer(i: int) -> parts.Blocks:
        attended = parts.attention(shape, i, rope, bias=True, window=windows[i])
        return parts.pre_norm(shape, i, attended, parts.dense(shape, i, f"model.layers.{i}.mlp", width))

    return parts.decoder("qwen2", shape, layer, context)
