"""Build a graph of our own operators from a decoder's spec, for any device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from edgelm.bundle import ModelInfo
from edgelm.export.graph.base import LayerOps, WeightGraph
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE, Norm
from edgelm.quant.source import WeightSource


class OperatorDecoder(LayerOps, ABC):
    """Interface of our own operators. Each method adds one operator and returns the name of its result.

    Args:
        graph: Graph to add to.
        plan: Plan of the weights file.
        source: Weights, for their shapes and schemes.
        dtype: Type of unquantised matrices.
        info: Shapes of the model.
        decoder: Spec of the model.
    """

    def __init__(
        self,
        graph: WeightGraph,
        plan: WeightsPlan,
        source: WeightSource,
        dtype: str,
        info: ModelInfo,
        decoder: Decoder,
    ) -> None:
        super().__init__(graph, plan, source, dtype)
        self.info = info
        self.decoder = decoder

    def norm_weight(self, norm: Norm | None, layer: int | None) -> str:
        """Add the weight of a norm; return its name, or "" without a norm."""
        return "" if norm is None else self.vector(norm.name, layer)

    def epsilon(self, norm: Norm | None) -> float:
        """Return a norm's epsilon. Without a norm it is the model's, since operators require the attribute."""
        return self.decoder.norm.eps if norm is None else norm.eps

    @abstractmethod
    def embedding(self, table: Matrix) -> str:
        """Add the embedding, the start of the residual stream; its name is `hidden.0`."""

    @abstractmethod
    def linear(
        self,
        x: str,
        matrices: Sequence[Matrix],
        out: str,
        *,
        norm: Norm | None = None,
        residual: str = "",
        swiglu: bool = False,
    ) -> str:
        """Add a matmul of x, normed first, with stacked matrices. It may add a residual or compute silu(gate) * up."""

    @abstractmethod
    def attention(self, part: Attention, qkv: str, out: str, layer: int) -> str:
        """Add grouped-query attention with an in-place KV cache; `qkv` holds queries, keys and values side by side."""

    @abstractmethod
    def moe(self, part: MoE, x: str, out: str, layer: int, norm: Norm | None, *, residual: bool) -> str:
        """Add a MoE of x, normed first; with `residual` it adds x."""

    @abstractmethod
    def norm(self, x: str, norm: Norm, out: str, layer: int, residual: str) -> str:
        """Add residual + RMSNorm(x)."""

    @abstractmethod
    def head(self, x: str, norm: Norm, matrix: Matrix) -> None:
        """Add the final norm and the head, which computes the logits of the residual stream x."""

    @abstractmethod
    def hidden(self, index: int) -> str:
        """Return the name of the residual stream before layer `index`. The debug graph returns this value."""


def build(model: OperatorDecoder, decoder: Decoder) -> None:
    """Add the whole decoder to the graph of `model`."""
    x = model.embedding(decoder.embed)
    for layer, blocks in enumerate(decoder.layers):
        for block in blocks:
            last = block is blocks[-1]
            x = _block(model, block, x, model.hidden(layer + 1) if last else f"layers.{layer}.attn_sum")
    model.head(x, decoder.norm, decoder.head)


def _block(model: OperatorDecoder, block: Block, x: str, out: str) -> str:
    """Add the block x + after(part(before(x))), named `out`. Without `after` the part's last operator adds x."""
    if block.after is None:
        return _part(model, block, x, out, residual=x)
    made = _part(model, block, x, f"{out}.part", residual="")
    return model.norm(made, block.after, out, block.layer, residual=x)


def _part(model: OperatorDecoder, block: Block, x: str, out: str, residual: str) -> str:
    part, layer, norm = block.part, block.layer, block.before
    stem = f"layers.{layer}"
    if isinstance(part, Attention):
        qkv = model.linear(x, [part.q, part.k, part.v], f"{stem}.attn.qkv", norm=norm)
        mixed = model.attention(part, qkv, f"{stem}.attn.out", layer)
        return model.linear(mixed, [part.o], out, residual=residual)
    if isinstance(part, Dense):
        inner = model.linear(x, [part.gate, part.up], f"{stem}.mlp.gate_up", norm=norm, swiglu=True)
        return model.linear(inner, [part.down], out, residual=residual)
    return model.moe(part, x, out, layer, norm, residual=bool(residual))
