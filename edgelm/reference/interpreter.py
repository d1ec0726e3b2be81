"""Interpreter of a spec in PyTorch, in float32: the reference that all runtimes are compared with.

The interpreter holds no weights: `read(name)` returns a tensor, from memory or from disk. So one interpreter serves
for a model in memory and for a run layer by layer. Weights may be kept in bfloat16; they are converted when they are
used, so the arithmetic is float32 in any case.

Shape letters: B batch, T new tokens, S all tokens so far, N = B*T, D hidden, H heads, K key/value heads, Dh head size,
E experts, A active experts per token, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatchmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE, Norm, Rope
from edgelm.reference.hooks import Hooks
from edgelm.reference.kv_cache import KVCache, Trace
from edgelm.reference.matmul import linear

ReadTensor = Callable[[str], Tensor]


class Interpreter:
    """Computes a model, or parts of it.

    Args:
        decoder: the model's spec.
        read: returns a weight by its tensor name.
        hooks: observe or replace the inputs of matmuls, and the keys and values that are cached; None for none.
    """

    def __init__(self, decoder: Decoder, read: ReadTensor, hooks: Hooks | None = None) -> None:
        self.decoder = decoder
        self.read = read
        self.hooks = hooks

    # -- operators -----------------------------------------------------------------------------------------------------

    def matmul(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Apply a matrix and its bias: [..., columns] to [..., rows]."""
        if self.hooks is not None:
            x = self.hooks.inputs(matrix, x)
        y = linear(x, self.read(matrix.name).float())
        if self.hooks is not None:
            self.hooks.outputs(matrix, x, y)
        return y if matrix.bias is None else y + self.read(matrix.bias).float()

    def norm(self, norm: Norm | None, x: Tensor) -> Tensor:
        """Return the RMSNorm of [..., size]; None is the identity."""
        if norm is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * self.read(norm.name).float()

    # -- attention: `project` and `attend` are separate, so that sequences of different lengths share a projection -----

    def project(self, part: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [..., H*Dh], keys and values [..., K*Dh] of [..., D], normed and clipped, before RoPE."""
        q, k, v = (self.matmul(matrix, x) for matrix in (part.q, part.k, part.v))
        q, k = self._qk_norm(part.q_norm, q), self._qk_norm(part.k_norm, k)
        clip = part.clip
        return (q, k, v) if clip is None else (q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip))

    def _qk_norm(self, norm: Norm | None, x: Tensor) -> Tensor:
        """Apply a norm to [..., width] in groups of the norm's size: one head, or all heads."""
        if norm is None or norm.size == x.shape[-1]:
            return self.norm(norm, x)
        return self.norm(norm, x.view(*x.shape[:-1], -1, norm.size)).flatten(-2)

    def attend(self, part: Attention, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """Return attention [B, T, H*Dh] of projections [B, T, ...] over the cache and the new tokens, before `o`."""
        batch, new = q.shape[:2]
        q = q.view(batch, new, part.heads, part.head_dim).transpose(1, 2)  # [B, H, T, Dh]
        k = k.view(batch, new, part.kv_heads, part.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        v = v.view(batch, new, part.kv_heads, part.head_dim).transpose(1, 2)
        start = 0 if cache is None else cache.layer_length(layer)
        if part.rope is not None:
            cos, sin = rotary_table(part.rope, start, new)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.hooks is not None:
            k, v = self.hooks.cached(layer, k, v)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # [B, K, S, Dh]
        group = part.heads // part.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, S, Dh]
        visible = _visible(start, new, part.window)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return mixed.transpose(1, 2).reshape(batch, new, part.heads * part.head_dim)

    # -- feed-forward --------------------------------------------------------------------------------------------------

    def gated(self, part: Dense, x: Tensor) -> Tensor:
        """Return silu(gate x) * up x, [..., F], the input of `down`."""
        return F.silu(self.matmul(part.gate, x)) * self.matmul(part.up, x)

    def dense(self, part: Dense, x: Tensor) -> Tensor:
        """Return the SwiGLU of [..., D]."""
        return self.matmul(part.down, self.gated(part, x))

    def route(self, part: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return router logits [..., E], selected experts [..., A] by descending weight, and their weights [..., A]."""
        logits = self.matmul(part.router, x)
        weights, chosen = torch.topk(logits.softmax(-1), part.k, dim=-1)
        if part.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, chosen, weights

    def moe(self, part: MoE, x: Tensor, trace: Trace | None = None) -> Tensor:
        """Return the MoE of [..., D].

        Rows are sorted by expert. So each selected expert does one matmul over one contiguous slice, and the weights of
        the other experts are not read.
        """
        logits, chosen, weights = self.route(part, x)
        if trace is not None:
            trace.router_logits.append(logits)
            trace.experts.append(chosen)
            trace.expert_weights.append(weights)
        if self.hooks is not None:
            assert part.router.layer is not None
            self.hooks.routed(part.router.layer, chosen)
        flat = x.reshape(-1, x.shape[-1])  # [N, D]
        picks = chosen.reshape(-1)  # [N*A], token-major
        order = picks.argsort(stable=True)
        counts: list[int] = torch.bincount(picks, minlength=len(part.experts)).tolist()
        tokens = order // part.k  # [N*A], token of each row
        outputs = [
            self.dense(part.experts[expert], rows)
            for expert, rows in enumerate(torch.split(flat[tokens], counts))
            if counts[expert]
        ]
        weighted = torch.cat(outputs) * weights.reshape(-1)[order, None]  # [N*A, D]
        return torch.zeros_like(flat).index_add(0, tokens, weighted).view_as(x)

    # -- blocks --------------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def part(self, part: object, x: Tensor, layer: int, cache: KVCache | None, trace: Trace | None) -> Tensor:
        """Return the output of a part for its input [B, T, D]."""
        raise TypeError(f"the PyTorch reference has no {type(part).__name__}")

    @part.register
    def _(self, part: Attention, x: Tensor, layer: int, cache: KVCache | None, trace: Trace | None) -> Tensor:
        return self.matmul(part.o, self.attend(part, *self.project(part, x), cache, layer))

    @part.register
    def _(self, part: Dense, x: Tensor, layer: int, cache: KVCache | None, trace: Trace | None) -> Tensor:
        return self.dense(part, x)

    @part.register
    def _(self, part: MoE, x: Tensor, layer: int, cache: KVCache | None, trace: Trace | None) -> Tensor:
        return self.moe(part, x, trace)

    def block(self, block: Block, x: Tensor, cache: KVCache | None = None, trace: Trace | None = None) -> Tensor:
        """Return the residual stream [B, T, D] after a block."""
        y = self.part(block.part, self.norm(block.before, x), block.layer, cache, trace)
        return x + self.norm(block.after, y)

    def layer(self, index: int, x: Tensor, cache: KVCache | None = None, trace: Trace | None = None) -> Tensor:
        """Return the residual stream [B, T, D] after the blocks of layer `index`."""
        for block in self.decoder.layers[index]:
            x = self.block(block, x, cache, trace)
        return x

    def attend_sequences(self, block: Block, x: Tensor, caches: Sequence[KVCache], lengths: Sequence[int]) -> Tensor:
        """Return the residual stream [N, D] of several sequences of these lengths after a block of attention."""
        assert isinstance(block.part, Attention)
        projected = self.project(block.part, self.norm(block.before, x))
        mixed = [
            self.attend(block.part, q[None], k[None], v[None], cache, block.layer)[0]
            for q, k, v, cache in zip(*(torch.split(p, list(lengths)) for p in projected), caches, strict=True)
        ]
        return x + self.norm(block.after, self.matmul(block.part.o, torch.cat(mixed)))


def rotary_table(rope: Rope, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, Dh] of positions start..start+length-1; both halves of a head have equal angles."""
    cos, sin = half_rotary_table(rope, start, length)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def half_rotary_table(rope: Rope, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [T, Dh/2], as operators read them.

    An angle is the float32 product of a float32 position and an inverse frequency, so that a graph's table equals the
    reference's to the last bit.
    """
    positions = torch.arange(start, start + length).float()
    angles = torch.outer(positions, torch.tensor(rope.inv_freq, dtype=torch.float32))
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if rope.scale == 1 else (cos * rope.scale, sin * rope.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + Dh/2]) of [B, heads, T, Dh] by its angle: the "rotate half" form of RoPE."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _visible(start: int, new: int, window: int | None) -> Tensor | None:
    """Return the attention mask of T new tokens over S positions, bool [T, S]; None for plain causal attention."""
    total = start + new
    if start == 0 and (window is None or window >= total):
        return None
    visible = torch.ones(new, total, dtype=torch.bool).tril(start)
    return visible if window is None else visible.triu(start - window + 1)
