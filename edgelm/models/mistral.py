"""Mistral: Llama with sliding-window attention (arXiv 2310.06825).

The window of the first version is 4096 positions, which is also transformers' default. In later versions it is null,
which means no window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.models import parts
from edgelm.models.config_fields import positive_int
from edgelm.models.rope import read_rope
from edgelm.models.spec import Decoder

KEYS = parts.KEYS | {"sliding_window"}


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' MistralConfig.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=1 << 17, eps=1e-6, kv_heads=8)
    rope, context = read_rope(config, shape.head_dim, shape.context)
    width = positive_int(config, "intermediate_size")
    window = parts.window(config, context, default=4096)

    def layer(i: int) -> parts.Blocks:
        attended = parts.attention(shape, i, rope, window=window)
        return parts.pre_norm(shape, i, attended, parts.dense(shape, i, f"model.layers.{i}.mlp", width))

    return parts.decoder("mistral", shape, layer, context)
