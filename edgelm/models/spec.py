"""The spec of a model: frozen dataclasses that describe what it computes.

A decoder is an embedding, a list of residual blocks, a norm and a head. A block is `x + after(part(before(x)))`; its
part is attention, a dense feed-forward network, or a mixture of experts. A model file converts a config.json to a spec.
The PyTorch reference, the graph builders, calibration, smoothing and mixed precision interpret it, and none of them
knows a model's name. A new kind of part is a new dataclass here and one method in each interpreter.

Shape letters: D hidden size, H heads, K key/value heads, Dh head size, F feed-forward width, E experts, V vocabulary.
Importing this needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

EMBEDDING, HEAD = "embedding", "head"
ROLES = (EMBEDDING, "q", "k", "v", "o", "router", "gate", "up", "down", HEAD)
"""Roles of matrices. Recipes and passes select matrices by role, never by name."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] of the checkpoint, applied as x @ weight.T (+ bias).

    Attributes:
        name: tensor name in the checkpoint.
        rows: number of outputs.
        columns: number of inputs.
        role: one of `ROLES`.
        layer: its layer; None for the embedding and the head.
        expert: its expert; None outside experts.
        bias: tensor name of the bias [rows]; None for none.
    """

    name: str
    rows: int
    columns: int
    role: str
    layer: int | None = None
    expert: int | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over `size` values. `name` is the tensor name of the weight."""

    name: str
    size: int
    eps: float


@dataclass(frozen=True)
class Rope:
    """RoPE as a table: at position p, pair i of a head is rotated by p * inv_freq[i] ("rotate half").

    Attributes:
        inv_freq: Dh / 2 inverse frequencies, as float32 numbers.
        scale: factor of cosines and sines (the attention factor of YaRN and LongRoPE).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention.

    Attributes:
        q, k, v, o: the projections: [H*Dh, D], [K*Dh, D], [K*Dh, D], [D, H*Dh].
        head_dim: Dh.
        rope: RoPE; None for a layer without.
        q_norm, k_norm: norms of queries and keys before RoPE. Their size tells whether they cover one head or all.
        clip: queries, keys and values are clamped to +-clip after the norms; None for no clamping.
        window: size of the sliding window, with the token's own position; None for none.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    head_dim: int
    rope: Rope | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    clip: float | None = None
    window: int | None = None

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return self.q.rows // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.k.rows // self.head_dim

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices in the order of a checkpoint."""
        return (self.q, self.k, self.v, self.o)


@dataclass(frozen=True)
class Dense:
    """SwiGLU: down(silu(gate x) * up x); gate and up are [F, D], down is [D, F]."""

    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices in the order of a checkpoint."""
        return (self.gate, self.up, self.down)


@dataclass(frozen=True)
class MoE:
    """Mixture of experts: the sum of the k most likely experts, weighted by their probabilities.

    The softmax is over all experts.

    Attributes:
        router: [E, D].
        experts: E networks of one shape.
        k: experts per token.
        normalize: divide the k weights by their sum.
    """

    router: Matrix
    experts: tuple[Dense, ...]
    k: int
    normalize: bool

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices in the order of a checkpoint."""
        return (self.router, *(matrix for expert in self.experts for matrix in expert.matrices))


Part = Attention | Dense | MoE


@dataclass(frozen=True)
class Block:
    """x + after(part(before(x))); a norm that is None is the identity."""

    layer: int
    part: Part
    before: Norm | None = None
    after: Norm | None = None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield tensor names and shapes in the order of the forward pass."""
        if self.before is not None:
            yield self.before.name, (self.before.size,)
        for matrix in self.part.matrices:
            yield from _tensors(matrix)
        if isinstance(self.part, Attention):
            for norm in (self.part.q_norm, self.part.k_norm):
                if norm is not None:
                    yield norm.name, (norm.size,)
        if self.after is not None:
            yield self.after.name, (self.after.size,)


@dataclass(frozen=True)
class Decoder:
    """A whole model.

    Attributes:
        family: name of the model file; bundles record it.
        embed: the embedding table [V, D].
        blocks: the blocks in order; those of a layer are consecutive.
        norm: norm of the residual stream before the head.
        head: [V, D]; of a tied model the same matrix as `embed`.
        context_length: largest number of positions.
    """

    family: str
    embed: Matrix
    blocks: tuple[Block, ...]
    norm: Norm
    head: Matrix
    context_length: int

    @property
    def hidden_size(self) -> int:
        """Hidden size, D."""
        return self.embed.columns

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, V."""
        return self.embed.rows

    @property
    def tied(self) -> bool:
        """Whether the head is tied to the embedding."""
        return self.head is self.embed or self.head.name == self.embed.name

    @cached_property
    def layers(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each layer."""
        found: list[list[Block]] = [[] for _ in range(self.blocks[-1].layer + 1)]
        for block in self.blocks:
            found[block.layer].append(block)
        return tuple(map(tuple, found))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def attention(self) -> tuple[Attention, ...]:
        """The attention of each layer."""
        return tuple(block.part for block in self.blocks if isinstance(block.part, Attention))

    def moe(self, layer: int) -> MoE | None:
        """Return the MoE of a layer; None where it has none."""
        return next((block.part for block in self.layers[layer] if isinstance(block.part, MoE)), None)

    @cached_property
    def first_moe(self) -> MoE | None:
        """The first MoE of the model; None for a dense model."""
        return next((block.part for block in self.blocks if isinstance(block.part, MoE)), None)

    @property
    def active_experts(self) -> int:
        """Experts per token; 0 for a dense model."""
        return 0 if self.first_moe is None else self.first_moe.k

    @property
    def num_experts(self) -> int:
        """Experts of an MoE layer; 0 for a dense model."""
        return 0 if self.first_moe is None else len(self.first_moe.experts)

    @cached_property
    def feed_forward_width(self) -> int:
        """The largest F of a dense network or an expert."""
        dense = (part for part in (block.part for block in self.blocks) if not isinstance(part, Attention))
        return max((part.experts[0] if isinstance(part, MoE) else part).gate.rows for part in dense)

    @cached_property
    def matrices(self) -> Mapping[str, Matrix]:
        """All matrices by tensor name, in the order of the forward pass."""
        found = [self.embed, *(matrix for block in self.blocks for matrix in block.part.matrices), self.head]
        return {matrix.name: matrix for matrix in found}

    @cached_property
    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the checkpoint's tensors, in the order of the forward pass."""
        found = dict(_tensors(self.embed))
        for block in self.blocks:
            found.update(block.tensors())
        found[self.norm.name] = (self.norm.size,)
        found.update(_tensors(self.head))
        return found


def _tensors(matrix: Matrix) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield matrix.name, (matrix.rows, matrix.columns)
    if matrix.bias is not None:
        yield matrix.bias, (matrix.rows,)
