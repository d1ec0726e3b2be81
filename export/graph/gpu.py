"""Build the program for GPUs: our operators, with weights in the order in which tensor cores read operands.

| name | type | shape |
|---|---|---|
| `input_ids` | int32 | [batch, tokens] |
| `past_lengths` | int32 | [batch]: tokens of each sequence that are cached already |
| `past_key_values.{i}.key`, `.value` | uint8 | [batch, kv_heads, capacity, row bytes] |
| `logits` | float32 | [batch, 1, vocabulary]: of the last token |
| `present.{i}.key`, `.value` | uint8 | like past: the same buffer, the cache is written in place |

The residual stream, routers, norms and logits are float32. Queries, keys, values, the result of attention and that of
SwiGLU have the activations' type A, bfloat16 or float16. A matmul sums in float32 and applies the scales to the sums,
so its only loss is that of rounding its input to A. The debug program has the same nodes with A = float32; parity
reads its values `hidden.{i}` and, for a MoE, `router_logits.{i}`. docs/reference/bundle.md describes the attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgelm.bundle import ModelInfo
from edgelm.bundle.activations import GPU
from edgelm.bundle.formats import GpuFormat, require_gpu_format
from edgelm.bundle.gpu_layout import ROWS, GpuMatrix
from edgelm.export.activations import static_scale
from edgelm.export.graph.base import stored_as
from edgelm.export.graph.decoder import OperatorDecoder
from edgelm.export.graph.program_builder import ProgramBuilder
from edgelm.export.packing.contents import gpu
from edgelm.export.packing.gpu import BlobWriter, Rows, interleaved, quantized_rows, stacked
from edgelm.export.packing.weights_file import BLOCK_WEIGHTS, SlotWriter, WeightsPlan
from edgelm.models.spec import Attention, Decoder, Matrix, MoE, Norm
from edgelm.progress import Advance
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.program import Attribute, matrix_attrs
from edgelm.slices import slices

ACTIVATIONS = {"bfloat16": "bf16", "float16": "f16"}
"""The activations' type A, by the type of unquantised matrices."""
_F32 = "f32"
EXACT: Mapping[str, Attribute] = {"activation": _F32, "output": _F32, "kv": "float32", "activations": "float"}
"""Attributes that the debug program replaces."""


class GpuDecoder(OperatorDecoder):
    """Adds GPU operators to a program.

    Args:
        graph: Program to add to.
        plan: Plan of the weights file.
        source: Weights, quantised by the recipe.
        dtype: Type of unquantised matrices and of activations: "bfloat16" or "float16".
        info: Shapes of the model.
        decoder: Spec of the model.
        kv: Type of the KV cache that a runtime allocates by default.
    """

    graph: ProgramBuilder

    def __init__(
        self,
        graph: ProgramBuilder,
        plan: WeightsPlan,
        source: WeightSource,
        dtype: str,
        info: ModelInfo,
        decoder: Decoder,
        kv: str,
    ) -> None:
        super().__init__(graph, plan, source, dtype, info, decoder)
        self.activation = ACTIVATIONS[dtype]
        self._kv = kv
        self._matrices: dict[str, GpuMatrix] = {}
        # A cache holds a multiple of 64 tokens, and every token in it needs a row of the RoPE tables.
        self._positions = -(-info.context_length // 64) * 64

    # -- layers ----------------------------------------------------------------------------------------------------

    def embedding(self, table: Matrix) -> str:
        """Add the embedding, the start of the residual stream; its name is `hidden.0`."""
        # The RoPE table goes before the layers' weights, since layers share it. Further tables follow with their layer.
        self.rotary(self.decoder.attention[0].rope, self._positions, self.info.head_dim)
        name = table.name
        matrix = self._matrix([name], name, None)
        out = self.graph.value(self.hidden(0), _F32, matrix.columns)
        return self.graph.native_node("QuantEmbedding", ["input_ids", name], out, name, **matrix_attrs(matrix))

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
        """Add a matmul of x with stacked matrices.

        Args:
            x: Activations [..., K]: float32 if `norm` is given, otherwise of type A.
            matrices: Each [rows, K]; for SwiGLU gate and up, of equal size.
            out: Name of the result, [..., sum of rows] or, with SwiGLU, [..., rows of one]. It is float32 if a residual
                is added or if it is the logits, otherwise of type A.
            norm: RMSNorm applied to x first.
            residual: Value of the result's shape to add.
            swiglu: Compute silu(gate) * up.
        """
        names, layer = [matrix.name for matrix in matrices], matrices[0].layer
        stem = names[0] if len(names) == 1 else f"{out}.weight"
        matrix = self._matrix(names, stem, layer, swiglu=swiglu)
        output = _F32 if residual or out == "logits" else self.activation
        return self.graph.native_node(
            "QuantLinear",
            [x, stem, self.norm_weight(norm, layer), residual, self.bias(matrices, out)],
            self.graph.value(out, output, matrix.outputs), stem, **matrix_attrs(matrix), activation=self.activation,
            activations=GPU.of_matmul(self.source, names), output=output, epsilon=self.epsilon(norm),
            **static_scale(self.source, names),
        )  # fmt: skip

    def attention(self, part: Attention, qkv: str, out: str, layer: int) -> str:
        """Add grouped-query attention with RoPE and an in-place KV cache."""
        info, norms = self.info, (part.q_norm, part.k_norm)
        inputs = [
            qkv, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "past_lengths",
            *self.rotary(part.rope, self._positions, info.head_dim),
            *(self.norm_weight(norm, layer) for norm in norms),
        ]  # fmt: skip
        value = self.graph.value(out, self.activation, info.num_heads * info.head_dim)
        return self.graph.native_node(
            "GroupQueryAttention", inputs, [value, f"present.{layer}.key", f"present.{layer}.value"],
            f"layers.{layer}.attn", num_heads=info.num_heads, kv_num_heads=info.num_kv_heads, head_size=info.head_dim,
            activation=self.activation, kv=self._kv, epsilon=self.epsilon(part.q_norm),
            clip=0.0 if part.clip is None else part.clip,
        )  # fmt: skip

    def moe(self, part: MoE, x: str, out: str, layer: int, norm: Norm | None, *, residual: bool) -> str:
        """Add x + MoE(RMSNorm(x))."""
        # Every supported model has a norm before its experts, so the operator has no other form.
        assert norm is not None and residual
        logits = f"router_logits.{layer}"
        stem = f"layers.{layer}.moe"
        # The router is float32 whatever the recipe says: it is small, and a wrong choice of expert is a large error.
        router = part.router.name
        gate = self.vector(router, layer)
        gate_up = self._experts(
            [(expert.gate, expert.up) for expert in part.experts], f"{stem}.gate_up", layer, swiglu=True
        )
        down = self._experts([(expert.down,) for expert in part.experts], f"{stem}.down", layer, swiglu=False)
        names = [matrix.name for expert in part.experts for matrix in expert.matrices]
        outputs = [self.graph.value(out, _F32, down.outputs), self.graph.value(logits, _F32, len(part.experts))]
        return self.graph.native_node(
            "SparseMoE", [x, gate, f"{stem}.gate_up", f"{stem}.down", self.norm_weight(norm, layer)], outputs, stem,
            **matrix_attrs(gate_up, "gate_up_"), **matrix_attrs(down, "down_"), k=part.k,
            normalize=int(part.normalize), activation=self.activation,
            activations=GPU.of_experts(self.source, names, layer), epsilon=self.epsilon(norm),
        )  # fmt: skip

    def norm(self, x: str, norm: Norm, out: str, layer: int, residual: str) -> str:
        """Add residual + RMSNorm(x), in float32."""
        inputs = [x, self.norm_weight(norm, layer), residual]
        value = self.graph.value(out, _F32, norm.size)
        return self.graph.native_node("RMSNorm", inputs, value, norm.name, epsilon=norm.eps)

    def head(self, x: str, norm: Norm, matrix: Matrix) -> None:
        """Add the final norm and the head: logits of the residual stream x for the last position."""
        value = self.graph.value("head_input", _F32, norm.size)
        last = self.graph.native_node("LastToken", [x], value, "head_input")
        self.linear(last, [matrix], "logits", norm=norm)

    def hidden(self, index: int) -> str:
        """Return the name of the residual stream before layer `index`."""
        return f"hidden.{index}"

    # -- weights ---------------------------------------------------------------------------------------------------

    def _format(self, names: Sequence[str], stem: str) -> GpuFormat:
        """Return the common format of stacked matrices.

        Raises:
            ExportError: The recipe gives them types that one matmul cannot have.
        """
        schemes = [self.source.scheme(name) for name in names]
        return require_gpu_format(schemes, self.dtype, self.source.shape(names[0])[1], stem, names)

    def _matrix(self, names: Sequence[str], stem: str, layer: int | None, *, swiglu: bool = False) -> GpuMatrix:
        """Add the weight `stem` of matrices stacked along the rows, unless it is there; return its description."""
        if stem not in self._matrices:
            self._blob([names], stem, layer, swiglu=swiglu)
        return self._matrices[stem]

    def _experts(self, experts: Sequence[Sequence[Matrix]], stem: str, layer: int, *, swiglu: bool) -> GpuMatrix:
        """Add the weight of one kind of matrix of all experts in a layer, which share a format."""
        names = [[matrix.name for matrix in matrices] for matrices in experts]
        self._blob(names, stem, layer, swiglu=swiglu)
        return self._matrices[stem]

    def _blob(self, matrices: Sequence[Sequence[str]], stem: str, layer: int | None, *, swiglu: bool) -> None:
        fmt = self._format([name for names in matrices for name in names], stem)
        shapes = [self.source.shape(name) for name in matrices[0]]
        matrix = fmt.matrix(sum(rows for rows, _ in shapes), shapes[0][1], swiglu=swiglu, count=len(matrices))
        held = self.held(*(name for names in matrices for name in names))
        slot = self.plan.slot(stem, (matrix.nbytes,), np.uint8, layer, gpu(matrix, held))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            writer = BlobWriter(matrix, writers[0].append)
            for names in matrices:
                for rows in self._rows(source, names, fmt, matrix, advance):
                    writer.add(rows)
            writer.finish()

        self.plan.job([slot], fill)
        self.graph.weight(slot)
        self._matrices[stem] = matrix

    def _rows(
        self, source: WeightSource, names: Sequence[str], fmt: GpuFormat, matrix: GpuMatrix, advance: Advance
    ) -> Iterator[Rows]:
        """Yield a matrix in blocks of whole tiles."""
        parts = [[name] for name in names] if matrix.swiglu else [list(names)]
        step = max(ROWS, BLOCK_WEIGHTS // (matrix.columns * len(parts)) // ROWS * ROWS)
        total = sum(source.nbytes(name) for name in names)
        for block in slices(matrix.outputs, step):
            rows = [self._stacked(source, part, block, fmt) for part in parts]
            advance(total * (block.stop - block.start) / matrix.outputs)
            yield interleaved(*rows) if matrix.swiglu else rows[0]

    def _stacked(self, source: WeightSource, names: Sequence[str], rows: slice, fmt: GpuFormat) -> Rows:
        found = []
        for name, part in self.row_ranges(names, rows):
            if source.scheme(name) is None:
                found.append(Rows(stored_as(source.float32(name, part), self.dtype, name)))
            else:
                found.append(quantized_rows(source.quantized(name, part), fmt))
        return stacked(found)
