"""OLMoE: a sparse mixture-of-experts decoder (arXiv 2409.02060), in float32 arithmetic.

Shape letters: B batch, T new tokens, S all tokens so far, N = B*T, D hidden, H heads, K key/value heads, Dh head width,
E experts, A active experts per token, F expert width, V vocabulary, L layers.

Weights may be kept in bfloat16; they are widened where they are used, so the arithmetic is float32 either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import config_fields as fields
from edgelm.reference.hooks import Cached, ExpertInputs, Inputs, Routed
from edgelm.reference.kv_cache import KVCache, Trace
from edgelm.reference.matmul import linear

Read = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True)
class OlmoeConfig:
    """The fields of config.json that OLMoE's arithmetic depends on, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    clip_qkv: float | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one head, Dh = D / H."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> OlmoeConfig:
        """Read config.json; absent fields take the defaults of transformers' OlmoeConfig where it has sensible ones.

        Raises:
            UnsupportedConfigError: a field changes the arithmetic and is not implemented, or is unknown.
            CheckpointError: a field is missing or impossible.
        """
        fields.check_fields(config_json, "OLMoE", {*cls.__dataclass_fields__, "head_dim"})
        heads = fields.positive_int(config_json, "num_attention_heads")
        clip = config_json.get("clip_qkv")
        config = cls(
            vocab_size=fields.positive_int(config_json, "vocab_size"),
            hidden_size=fields.positive_int(config_json, "hidden_size"),
            intermediate_size=fields.positive_int(config_json, "intermediate_size"),
            num_hidden_layers=fields.positive_int(config_json, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.positive_int(config_json, "num_key_value_heads", heads),
            num_experts=fields.positive_int(config_json, "num_experts"),
            num_experts_per_tok=fields.positive_int(config_json, "num_experts_per_tok"),
            norm_topk_prob=fields.boolean(config_json, "norm_topk_prob", False),
            clip_qkv=None if clip is None else fields.positive_float(config_json, "clip_qkv"),
            max_position_embeddings=fields.positive_int(config_json, "max_position_embeddings", 4096),
            rms_norm_eps=fields.positive_float(config_json, "rms_norm_eps", 1e-5),  # absent in the published configs
            rope_theta=fields.read_rope_theta(config_json),
            tie_word_embeddings=fields.boolean(config_json, "tie_word_embeddings", False),
        )
        if config.hidden_size % heads:
            raise CheckpointError(f"config.json: hidden_size {config.hidden_size} is not a multiple of {heads} heads")
        if config_json.get("head_dim") not in (None, config.head_dim):
            # transformers sizes q_norm by hidden_size, so OLMoE with another head width does not exist.
            raise UnsupportedConfigError(
                f"config.json: head_dim is {fields.shortened(config_json['head_dim'])}; OLMoE has "
                f"hidden_size / num_attention_heads = {config.head_dim}"
            )
        fields.check_heads(heads, config.num_key_value_heads, config.head_dim)
        if config.num_experts_per_tok > config.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {config.num_experts_per_tok} is above num_experts "
                f"{config.num_experts}"
            )
        return config


def tensor_shapes(config: OlmoeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a checkpoint, in the order of the forward pass."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.q_norm.weight": (hidden,),
            f"{layer}.self_attn.k_norm.weight": (kv,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate.weight": (config.num_experts, hidden),
        }
        for e in range(config.num_experts):
            for matrix in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.experts.{e}.{matrix}.weight"] = (config.intermediate_size, hidden)
            shapes[f"{layer}.mlp.experts.{e}.down_proj.weight"] = (hidden, config.intermediate_size)
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


def rotary_table(start: int, length: int, config: OlmoeConfig) -> tuple[Tensor, Tensor]:
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
    """Causal attention with QK-norm.

    OLMoE norms queries and keys over their whole projected width, before the split into heads and before RoPE: a norm
    a head would be another model. `clip_qkv` clamps after the norm, as transformers does (the training code clamped
    before it; no published checkpoint sets it). Projecting and attending are apart so that sequences of different
    lengths can share one projection.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.cached: Cached | None = None
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv)
        self.v_proj = Linear(config.hidden_size, kv)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)
        self.q_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., H*Dh], keys and values [..., K*Dh] of [..., D], before RoPE."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        clip = self.config.clip_qkv
        return (q, k, v) if clip is None else (q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip))

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
        return mixed.transpose(1, 2).reshape(batch, new, c.hidden_size)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """Attention's contribution [B, T, D] to the residual stream; `layer` is its place in the cache."""
        out: Tensor = self.o_proj(self.attend(*self.project(x), cache, layer))
        return out


ExpertWeights = tuple[Tensor, Tensor, Tensor]  # gate [F, D], up [F, D], down [D, F]


class ExpertSource(Protocol):
    """Where an expert's weights come from: memory, or the checkpoint on demand."""

    def __getitem__(self, expert: int, /) -> ExpertWeights:
        """Weights of one expert."""


class ExpertStack(nn.Module):
    """All experts of a layer in memory, stacked so that an optimiser sees three tensors and not 3 E."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.intermediate_size, config.hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(shape))  # [E, F, D]
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))  # [E, D, F]

    def source(self) -> list[ExpertWeights]:
        """The E experts."""
        # unbind, not indexing: the gradient is then stacked once instead of E times added into zeros.
        return list(zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True))


class SparseMoE(nn.Module):
    """y = sum over the A most probable experts of p_e * down_e(silu(gate_e x) * up_e x).

    The softmax runs over all E experts and the A chosen probabilities are used as they are unless `norm_topk_prob`:
    they sum to well under one, and renormalising them is a different model. Rows are sorted by expert so that each
    expert that was chosen does one matrix product over one contiguous slice, and no other expert is touched.
    """

    def __init__(self, config: OlmoeConfig, experts: ExpertSource | None = None) -> None:
        """With `experts` the expert weights are taken from there and no memory is set aside for them."""
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = ExpertStack(config) if experts is None else None
        self.outside_experts = experts
        self.expert_inputs: ExpertInputs | None = None
        self.routed: Routed | None = None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [..., E], chosen experts [..., A] by falling weight, and their weights [..., A]."""
        logits: Tensor = self.gate(x)
        weights, chosen = torch.topk(logits.softmax(-1), self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, chosen, weights

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Mix [..., D] token by token."""
        logits, chosen, weights = self.route(x)
        if trace is not None:
            trace.router_logits.append(logits)
            trace.experts.append(chosen)
            trace.expert_weights.append(weights)
        if self.routed is not None:
            self.routed(chosen)
        source: ExpertSource | None = self.outside_experts if self.experts is None else self.experts.source()
        assert source is not None
        flat = x.reshape(-1, x.shape[-1])  # [N, D]
        picks = chosen.reshape(-1)  # [N*A], token-major
        order = picks.argsort(stable=True)
        counts: list[int] = torch.bincount(picks, minlength=self.config.num_experts).tolist()
        tokens = order // self.config.num_experts_per_tok  # [N*A], token of each row
        outputs = []
        for expert, rows in enumerate(torch.split(flat[tokens], counts)):
            if counts[expert]:
                outputs.append(self._expert(rows, expert, source[expert]))
        weighted = torch.cat(outputs) * weights.reshape(-1)[order, None]  # [N*A, D]
        return torch.zeros_like(flat).index_add(0, tokens, weighted).view_as(x)

    def _expert(self, x: Tensor, expert: int, weights: ExpertWeights) -> Tensor:
        """One expert's output [n, D] for rows [n, D]."""
        gate, up, down = (w.float() for w in weights)
        hook = self.expert_inputs
        if hook is None:
            return linear(F.silu(linear(x, gate)) * linear(x, up), down)
        inner = F.silu(linear(hook(x, expert, "gate_proj"), gate)) * linear(hook(x, expert, "up_proj"), up)
        return linear(hook(inner, expert, "down_proj"), down)


class Layer(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += experts(norm(x))."""

    def __init__(self, config: OlmoeConfig, experts: ExpertSource | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoE(config, experts)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, trace: Trace | None) -> Tensor:
        """Advance the residual stream [B, T, D] through layer number `layer`."""
        x = x + self.self_attn(self.input_layernorm(x), cache, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x), trace)
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names within the layer, as on disk, with views of the weights in memory."""
        for name, parameter in self.named_parameters():
            if not name.startswith("mlp.experts."):
                yield name, parameter.data
        if self.mlp.experts is not None:
            for e, weights in enumerate(self.mlp.experts.source()):
                for matrix, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
                    yield f"mlp.experts.{e}.{matrix}.weight", weight.data


class Olmoe(nn.Module):
    """The whole model in memory."""

    def __init__(self, config: OlmoeConfig) -> None:
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
            assert isinstance(layer, Layer)
            for name, tensor in layer.tensors():
                yield f"model.layers.{i}.{name}", tensor
        yield "model.norm.weight", self.norm.weight.data
        if self.lm_head is not None:
            yield "lm_head.weight", self.lm_head.weight.data

    def load_weights(self, read: Read) -> None:
        """Fill every weight with `read(name)`, a float32 array of the shape in `tensor_shapes`."""
        for name, tensor in self.tensors():
            tensor.copy_(torch.from_numpy(read(name)))


def load_balancing_loss(router_logits: Sequence[Tensor], active: int, *, pooled: bool = False) -> Tensor:
    """E * sum over experts of (share of tokens that chose it) * (mean probability of it): A when balanced, more if not.

    That is transformers' scale. A form that is 1 when balanced divides by A, and a coefficient for it is A times the
    one for this.

    Args:
        router_logits: one [..., E] a layer.
        active: A, experts chosen per token.
        pooled: average both factors over all layers before multiplying, as transformers does. The default multiplies
            layer by layer and averages then (equations 4-6 of arXiv 2101.03961, as OLMoE was trained): pooled, a layer
            may collapse as long as another one makes up for it.
    """
    shares, means = [], []
    for logits in router_logits:
        probabilities = logits.reshape(-1, logits.shape[-1]).softmax(-1)  # [N, E]
        chosen = probabilities.topk(active, dim=-1).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=probabilities.shape[1])
        shares.append(counts / len(probabilities))
        means.append(probabilities.mean(0))
    share, mean = torch.stack(shares), torch.stack(means)  # [L, E]
    if pooled:
        share, mean = share.mean(0, keepdim=True), mean.mean(0, keepdim=True)
    return share.shape[1] * (share * mean).sum(-1).mean()


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """Mean over tokens and layers of logsumexp(router logits)^2 (equation 5 of arXiv 2202.08906): keeps them small."""
    return torch.stack([logits.logsumexp(-1).square().mean() for logits in router_logits]).mean()


class _ExpertsOnDisk:
    """Reads an expert when it is asked for, and keeps none."""

    def __init__(self, prefix: str, read: Read) -> None:
        self.prefix = prefix
        self.read = read

    def __getitem__(self, expert: int) -> ExpertWeights:
        gate, up, down = (
            torch.from_numpy(self.read(f"{self.prefix}.{expert}.{matrix}.weight"))
            for matrix in ("gate_proj", "up_proj", "down_proj")
        )
        return gate, up, down


def layer_from_disk(config: OlmoeConfig, index: int, read: Read) -> Layer:
    """One layer with its weights read now, except the experts, which are read whenever some token chooses them."""
    prefix = f"model.layers.{index}"
    layer = Layer(config, _ExpertsOnDisk(f"{prefix}.mlp.experts", read))
    for name, parameter in layer.named_parameters():
        # Taken over, not copied: a sweep over a big model is bound by memory.
        parameter.data = torch.from_numpy(read(f"{prefix}.{name}"))
    return layer
