"""Build the ONNX graph of native operators: our compiled operators of the domain `edgelm`, with packed weights.

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [batch, tokens] |
| `past_lengths` | int64 | [batch]: tokens of each sequence that are cached already |
| `past_key_values.{i}.key`, `.value` | uint8 | [batch, kv_heads, capacity, row bytes]: float32, float16 or int8 |
| `logits_start` (optional, default -1) | int64 | [1]: logits are computed from this position of the input on |
| `logits` | float32 | [batch, 1, vocabulary]: of the last token; [batch, positions, ...] where `logits_start` is fed |
| `present.{i}.key`, `.value` | uint8 | like past; the same buffer where the cache is to grow in place |

The debug graph also returns `hidden.{i}` [batch, tokens, hidden] and, for a MoE, `router_logits.{i}`
[batch * tokens, experts], as the portable graph does. docs/reference/operators.md describes the operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgelm.bundle import ModelInfo
from edgelm.bundle.activations import CPU, INT8
from edgelm.bundle.contents import Layout
from edgelm.bundle.cpu_layout import HEADER_BYTES, RESCORE, TILE, Kind, PackedMatrix, Scales, aligned, experts_header
from edgelm.bundle.formats import require_gate_and_up, splits_head
from edgelm.export.activations import rounded
from edgelm.export.graph.base import stored_as
from edgelm.export.graph.decoder import OperatorDecoder
from edgelm.export.graph.onnx_builder import Dims, GraphBuilder, int64
from edgelm.export.packing.contents import packed, packed_experts
from edgelm.export.packing.cpu import Format, common_format, float_format, pack_codes, pack_floats, stacked
from edgelm.export.packing.weights_file import BLOCK_WEIGHTS, PAGE, SlotWriter, WeightsPlan
from edgelm.models.spec import Attention, Decoder, Dense, Matrix, MoE, Norm
from edgelm.progress import Advance
from edgelm.quant.source import WeightSource
from edgelm.slices import slices

_END = np.iinfo(np.int64).max
ACTIVATION_BLOCK = 32
"""Columns that share a scale in int8 activations (QuantBlock in math_impl.h)."""


class NativeDecoder(OperatorDecoder):
    """Adds native operators to an ONNX graph; declares the graph's inputs and outputs.

    Args:
        graph: Graph to add to.
        plan: Plan of the weights file.
        source: Weights, quantised by the recipe.
        dtype: Type of unquantised matrices.
        info: Shapes of the model.
        decoder: Spec of the model.
    """

    graph: GraphBuilder

    def __init__(
        self,
        graph: GraphBuilder,
        plan: WeightsPlan,
        source: WeightSource,
        dtype: str,
        info: ModelInfo,
        decoder: Decoder,
    ) -> None:
        super().__init__(graph, plan, source, dtype, info, decoder)
        self.debug_outputs: list[tuple[str, Dims]] = []
        self._matrices: dict[str, PackedMatrix] = {}
        graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        graph.input("past_lengths", TensorProto.INT64, ["batch_size"])
        cache: Dims = ["batch_size", info.num_kv_heads, "capacity", "row_bytes"]
        for i in range(info.num_layers):
            graph.input(f"past_key_values.{i}.key", TensorProto.UINT8, cache)
            graph.input(f"past_key_values.{i}.value", TensorProto.UINT8, cache)
        self._logits_start = graph.overridable("logits_start", int64(-1))
        graph.output("logits", TensorProto.FLOAT, ["batch_size", 1, info.vocab_size])
        for i in range(info.num_layers):
            graph.output(f"present.{i}.key", TensorProto.UINT8, cache)
            graph.output(f"present.{i}.value", TensorProto.UINT8, cache)

    # -- layers ----------------------------------------------------------------------------------------------------

    def embedding(self, table: Matrix) -> str:
        """Add the embedding, the start of the residual stream; its name is `hidden.0`."""
        # The RoPE table goes before the layers' weights, since layers share it. Further tables follow with their layer.
        self.rotary(self.decoder.attention[0].rope, self.info.context_length, self.info.head_dim)
        split = self.decoder.tied and self._splits_head()
        name = table.name
        packed = self._require([name], name, None, split=split)
        return self.graph.native_node("QuantEmbedding", ["input_ids", packed], self.hidden(0), name)

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
            x: Activations [..., K].
            matrices: Each [rows, K]; for SwiGLU gate and up, of equal size.
            out: Name of the result, [..., sum of rows] or, with SwiGLU, [..., rows of one].
            norm: RMSNorm applied to x first.
            residual: Value of the result's shape to add.
            swiglu: Compute silu(gate) * up.
        """
        names, layer = [matrix.name for matrix in matrices], matrices[0].layer
        stem = names[0] if len(names) == 1 else f"{out}.weight"
        weights = self._matrix(names, stem, layer, swiglu=swiglu)
        if weights is not None:
            return self._matmul(x, weights, names, out, norm, layer, residual, bias=self.bias(matrices, out))
        # Formats that cannot be stacked (float beside integers, say): each matrix is a matmul of its own.
        self.norm_weight(norm, layer)
        parts = [
            self._matmul(
                x, self._require([name], name, layer), [name], f"{out}.{i}", norm, layer,
                bias=self.bias([matrix], f"{out}.{i}"),
            )
            for i, (name, matrix) in enumerate(zip(names, matrices, strict=True))
        ]  # fmt: skip
        node = self.graph.node
        if not swiglu:
            return node("Concat", parts, out, axis=-1)
        silu = node("Mul", [parts[0], node("Sigmoid", [parts[0]], f"{out}.sigmoid")], f"{out}.silu")
        return node("Mul", [silu, parts[1]], out)

    def attention(self, part: Attention, qkv: str, out: str, layer: int) -> str:
        """Add grouped-query attention with RoPE and an in-place KV cache."""
        info, norms = self.info, (part.q_norm, part.k_norm)
        inputs = [
            qkv, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "past_lengths",
            *self.rotary(part.rope, info.context_length, info.head_dim),
            *(self.norm_weight(norm, layer) for norm in norms),
        ]  # fmt: skip
        outputs = [out, f"present.{layer}.key", f"present.{layer}.value"]
        return self.graph.native_node(
            "GroupQueryAttention", inputs, outputs, f"layers.{layer}.attn", num_heads=info.num_heads,
            kv_num_heads=info.num_kv_heads, epsilon=self.epsilon(part.q_norm),
            clip=0.0 if part.clip is None else part.clip,
        )  # fmt: skip

    def moe(self, part: MoE, x: str, out: str, layer: int, norm: Norm | None, *, residual: bool) -> str:
        """Add a MoE of x, normed first; with `residual` it adds x."""
        name = f"router_logits.{layer}"
        self.debug_outputs.append((name, ["tokens", len(part.experts)]))
        # The router is float32 whatever the recipe says: it is small, and a wrong choice of expert is a large error.
        router = part.router.name
        gate = self._require([router], router, layer, dtype="float32")
        packed = self._experts(part.experts, f"layers.{layer}.moe.experts", layer)
        inputs = [x, gate, packed, self.norm_weight(norm, layer), x if residual else ""]
        matrices = [matrix.name for expert in part.experts for matrix in expert.matrices]
        kind = CPU.of_experts(self.source, matrices, layer)
        self.rounded |= rounded(self.source, matrices, kind, ACTIVATION_BLOCK)
        return self.graph.native_node(
            "SparseMoE", inputs, [out, name], f"layers.{layer}.moe", k=part.k,
            normalize=int(part.normalize), activations=kind, epsilon=self.epsilon(norm),
        )  # fmt: skip

    def norm(self, x: str, norm: Norm, out: str, layer: int, residual: str) -> str:
        """Add residual + RMSNorm(x)."""
        inputs = [x, self.norm_weight(norm, layer), residual]
        return self.graph.native_node("RMSNorm", inputs, out, norm.name, epsilon=norm.eps)

    def head(self, x: str, norm: Norm, matrix: Matrix) -> None:
        """Add the final norm and the head: logits of the residual stream x for the positions from `logits_start` on."""
        constant = self.graph.constant
        name = matrix.name
        ends, axes = constant("slice_end", int64(_END)), constant("axis_1", int64(1))
        last = self.graph.node("Slice", [x, self._logits_start, ends, axes], "head_input")
        weights = self._require([name], name, None, split=self._splits_head())
        rescore = RESCORE if self._matrices[name].kind is Kind.INT8_SPLIT else 0
        self._matmul(last, weights, [name], "logits", norm, None, rescore=rescore)

    def hidden(self, index: int) -> str:
        """Return the name of the residual stream before layer `index`. The debug graph returns this value."""
        name = f"hidden.{index}"
        self.debug_outputs.append((name, ["batch_size", "sequence_length", self.info.hidden_size]))
        return name

    def _splits_head(self) -> bool:
        """Return whether an int8 head is stored as split nibbles; the kernel for them needs int8 activations."""
        if CPU.of_matmul(self.source, [self.decoder.head.name]) != INT8:
            return False
        names = (name for name, matrix in self.decoder.matrices.items() if matrix.layer is not None)
        return splits_head(map(self.source.scheme, names))

    def _matmul(
        self,
        x: str,
        weights: str,
        names: Sequence[str],
        out: str,
        norm: Norm | None,
        layer: int | None,
        residual: str = "",
        *,
        bias: str = "",
        rescore: int = 0,
    ) -> str:
        kind = CPU.of_matmul(self.source, names)
        self.rounded |= rounded(self.source, names, kind, ACTIVATION_BLOCK)
        normed = self.norm_weight(norm, layer)
        return self.graph.native_node(
            "QuantLinear", [x, weights, normed, residual, bias], out, weights, activations=kind,
            epsilon=self.epsilon(norm), refine=rescore,
        )  # fmt: skip

    # -- weights ---------------------------------------------------------------------------------------------------

    def _require(
        self, names: Sequence[str], stem: str, layer: int | None, *, dtype: str | None = None, split: bool = False
    ) -> str:
        found = self._matrix(names, stem, layer, dtype=dtype, split=split)
        assert found is not None, f"{names} of one format"
        return found

    def _format(self, names: Sequence[str], stem: str, dtype: str | None = None) -> Format | None:
        schemes = [None if dtype else self.source.scheme(name) for name in names]
        columns = self.source.shape(names[0])[1]
        quantized = [scheme for scheme in schemes if scheme is not None]
        if not quantized:
            return float_format(dtype or self.dtype, columns)
        return common_format(quantized, columns, stem) if len(quantized) == len(schemes) else None

    def _matrix(
        self,
        names: Sequence[str],
        stem: str,
        layer: int | None,
        *,
        dtype: str | None = None,
        swiglu: bool = False,
        split: bool = False,
    ) -> str | None:
        """Add the initializer of matrices stacked along the rows; return its name, or None if no format holds all."""
        if self.graph.has(stem):
            return stem
        fmt = self._format(names, stem, dtype)
        if fmt is None:
            return None
        if split:
            fmt = fmt.split
        shapes = [self.source.shape(name) for name in names]
        matrix = fmt.matrix(sum(rows for rows, _ in shapes), shapes[0][1], swiglu=swiglu)
        held = self.held(*names)
        first = self.plan.slot(stem, (matrix.first_bytes,), np.uint8, layer, packed(matrix, held))
        slots = [first]
        if fmt.kind is Kind.INT8_SPLIT:
            # The low nibbles are a tensor of their own, right after the high ones, so that one initializer has both.
            lower = packed(matrix, held, Layout.LOW_NIBBLES)
            slots.append(self.plan.slot(f"{stem}.lower", (matrix.low_bytes,), np.uint8, layer, lower))
            matrix = matrix.with_low_offset(slots[1].offset - first.offset)
            assert matrix.low_offset - first.size < PAGE
        self._matrices[stem] = matrix

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            writers[0].append(np.frombuffer(matrix.header(), np.uint8))
            for upper, lower in self._packed(source, names, fmt, matrix, dtype or self.dtype, advance):
                writers[0].append(upper)
                if lower is not None:
                    writers[1].append(lower)

        self.plan.job(slots, fill)
        return self.graph.weight(first, size=matrix.nbytes)

    def _experts(self, experts: Sequence[Dense], stem: str, layer: int) -> str:
        """Add the initializer of a layer's packed experts, each of which may have its own format; return its name."""
        parts: list[tuple[Sequence[str], Format, PackedMatrix, int]] = []
        place = HEADER_BYTES + 16 * len(experts)
        for expert in experts:
            gate, up, down = (matrix.name for matrix in expert.matrices)
            for names, swiglu in (((gate, up), True), ((down,), False)):
                found = self._format(names, f"{stem}: {gate} and {up}" if swiglu else down)
                fmt = require_gate_and_up(found, gate, up)
                shapes = [self.source.shape(name) for name in names]
                matrix = fmt.matrix(sum(rows for rows, _ in shapes), shapes[0][1], swiglu=swiglu)
                place = aligned(place)
                parts.append((names, fmt, matrix, place))
                place += matrix.nbytes
        held = self.held(*(matrix.name for expert in experts for matrix in expert.matrices))
        contents = packed_experts([matrix for _, _, matrix, _ in parts], held)
        slot = self.plan.slot(stem, (place,), np.uint8, layer, contents)
        offsets = [(parts[i][3], parts[i + 1][3]) for i in range(0, len(parts), 2)]

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            writer = writers[0]
            writer.append(np.frombuffer(experts_header(offsets, slot.size), np.uint8))
            for names, fmt, matrix, offset in parts:
                writer.append(np.zeros(offset - writer.written, np.uint8))
                writer.append(np.frombuffer(matrix.header(), np.uint8))
                for block, _ in self._packed(source, names, fmt, matrix, self.dtype, advance):
                    writer.append(block)

        self.plan.job([slot], fill)
        return self.graph.weight(slot)

    def _packed(
        self,
        source: WeightSource,
        names: Sequence[str],
        fmt: Format,
        matrix: PackedMatrix,
        dtype: str,
        advance: Advance,
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]:
        """Yield the packed records of a matrix (and their low nibbles, if split) in blocks of whole tiles, in order."""
        parts = [[names[0]], [names[1]]] if matrix.swiglu else [list(names)]
        rows = matrix.outputs
        step = max(TILE, BLOCK_WEIGHTS // (matrix.columns * len(parts)) // TILE * TILE)
        total = sum(source.nbytes(name) for name in names)
        for block in slices(rows, step):
            count = -(-(block.stop - block.start) // TILE) * len(parts)
            upper = np.zeros((count, matrix.records, matrix.record_bytes), np.uint8)
            lower = np.zeros((count, matrix.low_bytes // matrix.tiles), np.uint8) if matrix.low_bytes else None
            for i, part in enumerate(parts):
                mine = slice(i, None, len(parts))
                self._pack_rows(source, part, block, fmt, dtype, upper[mine], None if lower is None else lower[mine])
            advance(total * (block.stop - block.start) / rows)
            yield upper, lower

    def _pack_rows(
        self,
        source: WeightSource,
        names: Sequence[str],
        rows: slice,
        fmt: Format,
        dtype: str,
        upper: NDArray[np.uint8],
        lower: NDArray[np.uint8] | None,
    ) -> None:
        ranges = list(self.row_ranges(names, rows))
        if fmt.scales is Scales.NONE:
            values = [stored_as(source.float32(name, part), dtype, name) for name, part in ranges]
            pack_floats(np.concatenate(values), upper)
        else:
            pack_codes(stacked([source.quantized(name, part) for name, part in ranges], fmt), fmt, upper, lower)
