"""OLMoE: a sparse mixture-of-experts decoder (arXiv 2409.02060).

QK-norm covers the whole projected width, before the split into heads and before RoPE; it is not a norm per head.
`clip_qkv` clamps after the norm, as in transformers. The training code clamped before it, but no published checkpoint
sets it. The router's softmax is over all experts. The probabilities of the selected experts, which sum to well under
one, are used unchanged unless `norm_topk_prob` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.errors import UnsupportedConfigError
from edgelm.models import parts
from edgelm.models.config_fields import boolean, positive_float, positive_int, shortened
from edgelm.models.rope import read_rope
from edgelm.models.spec import Block, Decoder

KEYS = parts.KEYS | {"num_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv"}


def spec(config: Mapping[str, Any]) -> Decoder:
    """Read config.json; absent fields have the defaults of transformers' OlmoeConfig where it has sensible ones.

    Raises:
        CheckpointError, UnsupportedConfigError: a field is missing, invalid or not implemented.
    """
    shape = parts.Shape.read({**config, "head_dim": None}, context=4096, eps=1e-5)  # eps: absent in published configs
    if config.get("head_dim") not in (None, shape.head_dim):
        # transformers sizes q_norm by hidden_size, so OLMoE cannot have another head size.
        raise UnsupportedConfigError(
            f"config.json: head_dim is {shortened(config['head_dim'])}; OLMoE has hidden_size / num_attention_heads = "
            f"{shape.head_dim}"
        )
    rope, context = read_rope(config, shape.head_dim, shape.context)
    width = positive_int(config, "intermediate_size")
    experts, active = parts.expert_counts(config, "num_experts")
    normalize = boolean(config, "norm_topk_prob", False)
    clip = None if config.get("clip_qkv") is None else positive_float(config, "clip_qkv")

    def layer(i: int) -> tuple[Block, Block]:
        attended = parts.attention(shape, i, rope, qk_norm="whole", clip=clip)
        mixed = parts.moe(shape, i, f"model.layers.{i}.mlp", width, experts, active, normalize=normalize)
        return parts.pre_norm(shape, i, attended, mixed)

    return parts.decoder("olmoe", shape, layer, context)
