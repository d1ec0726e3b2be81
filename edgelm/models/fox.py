"""Fox-1: a dense decoder of the Llama kind with grouped-query attention (arXiv 2411.05281), in float32 arithmetic.

Shape letters: B batch, T new tokens, S all tokens so far, D hidden, H heads, K key/value heads, Dh head width,
F feed-forward width, V vocabulary, L layers.

Weights may be kept in bfloat16; they are widened where they are used, so the arithmetic is float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelm.models import config_fields as fields
from edgelm.reference.hooks import Cached, Inputs
from edgelm.reference.kv_cache import KVCache, Trace
from edgelm.reference.matmul import linear

Read = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True)
class FoxConfig:
    """The fields of config.json that Fox's arithmetic depends on, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> FoxConfig:
        """Read config.json; absent fields take the defaults of transformers' LlamaConfig where it has sensible ones.

        Raises:
            UnsupportedConfigError: a field changes the arithmetic and is not implemented, or is unknown.
            CheckpointError: a field is missing or impossible.
        """
        fields.check_fields(config_json, "Llama", cls.__dataclass_fields__.keys())
        heads = fields.positive_int(config_json, "num_attention_heads")
        config = cls(
            vocab_size=fields.positive_int(config_json, "vocab_size"),
            hidden_size=fields.positive_int(config_json, "hidden_size"),
            intermediate_size=fields.positive_int(config_json, "intermediate_size"),
            num_hidden_layers=fields.positive_int(config_json, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.positive_int(config_json, "num_key_value_heads", heads),
            head_dim=fields.head_dim(config_json),
            max_position_embeddings=fields.positive_int(config_json, "max_position_embeddings", 2048),
            rms_norm_eps=fields.positive_float(config_json, "rms_norm_eps", 1e-6),
            rope_theta=fields.read_rope_theta(config_json),
            tie_word_embeddings=fields.boolean(config_json, "tie_word_embeddings", False),
        )
        fields.check_heads(heads, config.num_key_value_heads, config.head_dim)
        return config


def tensor_shapes(config: FoxConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint, in the order of the forward pass."""
    hidden, width = config.hidden_size, config.intermediate_size
    queries, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (width, hidden),
            f"{layer}.mlp.up_proj.weight": (width, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, width),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm [..., size]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class Linear(nn.Module):
    """x @ weight.T, the weight widened to float32 if it is kept narrower."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.inputs: Inputs | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return linear(x if self.inputs is None else self.inputs(x), self.weight.float())


def rotary_table(start: int, length: int, config: FoxConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, Dh] of positions start..start+length-1 (both halves of a head hold the same angles)."""
    steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**steps  # [Dh/2]
    angles = torch.arange(start, start + length).float()[:, None] * frequencies  # [T, Dh/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + Dh/2]) of [B, heads, T, Dh] by its angle: the "rotate half" form of RoPE."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which H / K query heads share one key/value head.

    Projecting and attending are apart so that sequences of different lengths can share one projection.
    """

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.config = config
        self.cached: Cached | None = None
        queries, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, kv)
        self.v_proj = Linear(config.hidden_size, kv)
        self.o_proj = Linear(queries, config.hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H*Dh], keys and values [..., K*Dh] of [..., D], before RoPE."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """Attend from projections [B, T, ...] to everything in the cache and themselves; returns [B, T, H*Dh]."""
        c, (batch, new) = self.config, q.shape[:2]
        q = q.view(batch, new, c.num_attention_heads, c.head_dim).transpose(1, 2)  # [B, H, T, Dh]
        k = k.view(batch, new, c.num_key_value_heads, c.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        v = v.view(batch, new, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        start = 0 if cache is None else cache.layer_length(layer)
        cos, sin = rotary_table(start, new, c)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.cached is not None:
            k, v = self.cached(k, v)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B, K, S, Dh]
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, S, Dh]
        visible = None if start == 0 else torch.ones(new, start + new, dtype=torch.bool).tril(start)  # [T, S]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return mixed.transpose(1, 2).reshape(batch, new, c.num_attention_heads * c.head_dim)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """Attention's contribution [B, T, D] to the residual stream; `layer` is its place in the cache."""
        out: Tensor = self.o_proj(self.attend(*self.project(x), cache, layer))
        return out


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Map [..., D] token by token."""
        del trace  # nothing is chosen here
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x))."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, trace: Trace | None) -> Tensor:
        """Advance the residual stream [B, T, D] through layer number `layer`."""
        x = x + self.self_attn(self.input_layernorm(x), cache, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x), trace)
        return out


class Fox(nn.Module):
    """The whole model in memory."""

    def __init__(self, config: FoxConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.head_inputs: Inputs | None = None

    def forward(self, ids: Tensor, cache: KVCache | None = None, trace: Trace | None = None) -> Tensor:
        """Logits float32 [B, T, V] for int64 ids [B, T] that follow what the cache holds."""
        x = F.embedding(ids, self.embed_tokens).float()  # [B, T, D]
        if trace is not None:
            trace.hidden.append(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i, trace)
            if trace is not None:
                trace.hidden.append(x)
        x = self.norm(x)
        if self.head_inputs is not None:
            x = self.head_inputs(x)
        logits: Tensor = F.linear(x, self.embed_tokens.float()) if self.lm_head is None else self.lm_head(x)
        return logits

    def new_cache(self) -> KVCache:
        """An empty cache for decoding with this model."""
        return KVCache(self.config.num_hidden_layers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names on disk with views of the weights in memory."""
        yield "model.embed_tokens.weight", self.embed_tokens.data
        for i, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                yield f"model.layers.{i}.{name}", parameter.data
        yield "model.norm.weight", self.norm.weight.data
        if self.lm_head is not None:
            yield "lm_head.weight", self.lm_head.weight.data

    def load_weights(self, read: Read) -> None:
        """Fill every weight with `read(name)`, a float32 array of the shape in `tensor_shapes`."""
        for name, tensor in self.tensors():
            tensor.copy_(torch.from_numpy(read(name)))


def layer_from_disk(config: FoxConfig, index: int, read: Read) -> Layer:
    """One layer with its weights read now."""
    layer = Layer(config)
    for name, parameter in layer.named_parameters():
        # Taken over, not copied: a sweep over a big model is bound by memory.
        parameter.data = torch.from_numpy(read(f"model.layers.{index}.{name}"))
    return layer
