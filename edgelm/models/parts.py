"""Helpers for model files: the usual parts of a decoder, with their usual tensor names, from a config.json.

These are functions, not a base class: a model that needs something else defines it in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.models import config_fields as fields
from edgelm.models.spec import EMBEDDING, HEAD, Attention, Block, Decoder, Dense, Matrix, MoE, Norm, Rope

Config = Mapping[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"

KEYS = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    max_position_embeddings rms_norm_eps tie_word_embeddings
    """.split()  # noqa: SIM905 - names read better as prose
)
"""Fields of config.json that `Shape` and the parts below read. `edgelm.models.rope` reads those of RoPE."""

WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
"""Fields of config.json that `layer_windows` reads."""

Blocks = tuple[Block, Block]
"""The two blocks of a layer: attention and feed-forward."""

GATED = ("gate_proj", "up_proj", "down_proj")
"""The usual names of gate, up and down."""


@dataclass(frozen=True)
class Shape:
    """Sizes that the parts need: D, H, K, Dh, L, V, the context length and the norms' epsilon."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    context: int
    eps: float
    tied: bool

    @classmethod
    def read(
        cls,
        config: Config,
        *,
        context: int,
        eps: float,
        kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> Shape:
        """Read config.json; the other arguments are defaults (None: as many KV heads as heads; head size D / H).

        Raises:
            CheckpointError: a field is missing or invalid.
        """
        heads, hidden = fields.positive_int(config, "num_attention_heads"), fields.positive_int(config, "hidden_size")
        if config.get("head_dim") is None and head_dim is None and hidden % heads:
            raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
        shape = cls(
            hidden=hidden,
            heads=heads,
            kv_heads=fields.positive_int(config, "num_key_value_heads", kv_heads or heads),
            head_dim=fields.positive_int(config, "head_dim", head_dim or hidden // heads),
            layers=fields.positive_int(config, "num_hidden_layers"),
            vocabulary=fields.positive_int(config, "vocab_size"),
            context=fields.positive_int(config, "max_position_embeddings", context),
            eps=fields.positive_float(config, "rms_norm_eps", eps),
            tied=fields.boolean(config, "tie_word_embeddings", False),
        )
        fields.check_heads(heads, shape.kv_heads, shape.head_dim)
        return shape

    def norm(self, name: str, size: int | None = None) -> Norm:
        """Return an RMSNorm over `size` values, by default the hidden size."""
        return Norm(f"{name}.weight", size or self.hidden, self.eps)


def attention(
    shape: Shape,
    layer: int,
    rope: Rope | None,
    *,
    bias: bool = False,
    qk_norm: str | None = None,
    clip: float | None = None,
    window: int | None = None,
) -> Attention:
    """Return the attention of a layer.

    Args:
        shape: sizes of the model.
        layer: the layer's index.
        rope: RoPE; None for none.
        bias: whether q, k and v have biases.
        qk_norm: norms of queries and keys over the "whole" width or each "head"; None for none.
        clip: clamp q, k and v to +-clip; None for no clamping.
        window: size of the sliding window; None for none.
    """
    stem, size = f"model.layers.{layer}.self_attn", shape.head_dim
    q, k, v = (
        Matrix(
            f"{stem}.{which}_proj.weight", heads * size, shape.hidden, which, layer,
            bias=f"{stem}.{which}_proj.bias" if bias else None,
        )
        for which, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
    )  # fmt: skip
    o = Matrix(f"{stem}.o_proj.weight", shape.hidden, q.rows, "o", layer)
    q_norm = k_norm = None
    if qk_norm is not None:
        q_norm, k_norm = (
            shape.norm(f"{stem}.{which}_norm", size if qk_norm == "head" else matrix.rows)
            for which, matrix in (("q", q), ("k", k))
        )
    return Attention(q, k, v, o, size, rope, q_norm, k_norm, clip, window)


def dense(
    shape: Shape, layer: int, stem: str, width: int, expert: int | None = None, names: tuple[str, str, str] = GATED
) -> Dense:
    """Return a SwiGLU network of `width`; `names` are the tensor names of gate, up and down."""
    gate, up, down = names
    return Dense(
        Matrix(f"{stem}.{gate}.weight", width, shape.hidden, "gate", layer, expert),
        Matrix(f"{stem}.{up}.weight", width, shape.hidden, "up", layer, expert),
        Matrix(f"{stem}.{down}.weight", shape.hidden, width, "down", layer, expert),
    )


def moe(
    shape: Shape,
    layer: int,
    stem: str,
    width: int,
    experts: int,
    active: int,
    *,
    normalize: bool,
    names: tuple[str, str, str] = GATED,
) -> MoE:
    """Return an MoE of `experts` experts of `width`, of which `active` are selected per token."""
    router = Matrix(f"{stem}.gate.weight", experts, shape.hidden, "router", layer)
    stacked = tuple(dense(shape, layer, f"{stem}.experts.{e}", width, e, names) for e in range(experts))
    return MoE(router, stacked, active, normalize)


def expert_counts(config: Config, *experts: str) -> tuple[int, int]:
    """Return the number of experts in a layer, from the first of the fields `experts` that exists, and per token.

    Raises:
        CheckpointError: a field is missing or invalid, or more experts are active than there are.
    """
    field = next((field for field in experts if config.get(field) is not None), experts[0])
    count, active = fields.positive_int(config, field), fields.positive_int(config, "num_experts_per_tok")
    if active > count:
        raise CheckpointError(f"config.json: num_experts_per_tok {active} is above {field} {count}")
    return count, active


def window(config: Config, context: int, default: int | None = None) -> int | None:
    """Return the size of the sliding window; None where `sliding_window` is null or not below the context length.

    Raises:
        CheckpointError: `sliding_window` is not an integer above zero.
    """
    if "sliding_window" not in config and default is None:
        return None
    if config.get("sliding_window", default) is None:
        return None
    size = fields.positive_int(config, "sliding_window", default)
    return size if size < context else None


def layer_windows(config: Config, layers: int, context: int) -> list[int | None]:
    """Return the sliding window of each layer of a Qwen model, from `layer_types` or `max_window_layers`.

    Raises:
        CheckpointError: a field is invalid.
    """
    if not fields.boolean(config, "use_sliding_window", False):
        return [None] * layers
    size, first = window(config, context, 4096), fields.non_negative_int(config, "max_window_layers", 28)
    kinds = config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise CheckpointError(
            f"config.json: layer_types is {fields.shortened(kinds)}; expected {layers} of {FULL} and {SLIDING}"
        )
    return [size if kind == SLIDING else None for kind in kinds]


def pre_norm(shape: Shape, layer: int, attended: Attention, feed_forward: Dense | MoE) -> Blocks:
    """Return the blocks of a pre-norm layer, as in Llama: x += attention(norm(x)); x += feed_forward(norm(x))."""
    stem = f"model.layers.{layer}"
    return (
        Block(layer, attended, before=shape.norm(f"{stem}.input_layernorm")),
        Block(layer, feed_forward, before=shape.norm(f"{stem}.post_attention_layernorm")),
    )


def decoder(family: str, shape: Shape, layer: Callable[[int], Iterable[Block]], context: int | None = None) -> Decoder:
    """Return the whole model from a function that gives the blocks of a layer; `context`: its limit by RoPE."""
    embed = Matrix("model.embed_tokens.weight", shape.vocabulary, shape.hidden, EMBEDDING)
    head = embed if shape.tied else Matrix("lm_head.weight", shape.vocabulary, shape.hidden, HEAD)
    blocks = tuple(block for index in range(shape.layers) for block in layer(index))
    return Decoder(family, embed, blocks, shape.norm("model.norm"), head, context or shape.context)
