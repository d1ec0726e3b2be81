"""Llama: pre-norm blocks of grouped-query attention and SwiGLU (arXiv 2307.09288, 2407.21783).

Llama 2 and 3.x, TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama and Fox-1 (arXiv 2411.05281) are this model. They differ
in sizes and in their RoPE frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.models import parts
from edgelm.models.config_fields import positive_int
from edgelm.models.rope import read_rope
from edgelm.models.spec import Decoder

KEYS = parts.KEYS


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' LlamaConfig.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read(config, context=2048, eps=1e-6)
    rope, context = read_rope(config, shape.head_dim, shape.context)
    width = positive_int(config, "intermediate_size")
    return parts.decoder(
        "llama",
        shape,
        lambda i: parts.pre_norm(
            shape, i, parts.attention(shape, i, rope), parts.dense(shape, i, f"model.layers.{i}.mlp", width)
        ),
        context,
    )
