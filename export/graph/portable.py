"""The layers that decoders are made of, in operators that every ONNX Runtime has (ai.onnx and com.microsoft).

Values have the type that the provider computes in (ort_providers.py), float32 on the CPU.
Facts these choices rest on, checked on the CPU with ONNX Runtime 1.31 (what is said of CUDA is in ort_providers.py):

- `MatMulNBits` takes scales in the activations' type: as float32, int4 with groups of 32 costs 5 bits.
- `FusedMatMul` with `transB` reads a weight in the checkpoint's own [out, in] layout, so nothing is transposed on the
  way and a tied embedding serves lookup and head from the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgelm.bundle.contents import Layout
from edgelm.errors import ExportError
from edgelm.export import activations
from edgelm.export.graph.base import STORAGE, LayerOps, stored_as
from edgelm.export.graph.onnx_builder import MICROSOFT, GraphBuilder, int64
from edgelm.export.graph.ort_providers import CPU, Provider
from edgelm.export.packing import ort
from edgelm.export.packing.contents import Held, array, portable
from edgelm.export.packing.ort import BlockFormat, block_of, codes_in, zeros_in
from edgelm.export.packing.weights_file import BLOCK_WEIGHTS, Slot, SlotWriter, WeightsPlan
from edgelm.models.spec import Matrix, Norm
from edgelm.progress import Advance
from edgelm.quant.scheme import Scheme
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor
from edgelm.slices import slices

FLOAT = TensorProto.FLOAT
ELEMENT = {"float32": FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# MatMulNBits' and QMoE's "4": activations are quantised to int8 per block on the fly, about 1 % of noise per matmul
# and the only mode whose kernels use the CPU's integer dot products.
# At "0" they stay float32. Kernels for x86 round by blocks of the weights' group, those for Arm (KleidiAI) by whole
# rows: parity allows for whole rows, the coarser of the two.
ACCURACY = {activations.INT8: 4, activations.FLOAT32: 0}
BITS = (4, 8)
# Stands for the format of matrices that are refused, until all reasons are known.
_REFUSED = BlockFormat(bits=8, block=32, zeros=False)


@dataclass(frozen=True)
class QuantizedSlots:
    """A quantised matrix [rows, columns] in the weights file."""

    rows: int
    columns: int
    fmt: BlockFormat
    codes: Slot
    scales: Slot
    zeros: Slot | None

    @property
    def all(self) -> list[Slot]:
        """The slots in the order that jobs fill them."""
        return [self.codes, self.scales] + ([self.zeros] if self.zeros else [])


class PortableOps(LayerOps):
    """Adds layers in portable operators to a graph; the arguments are those of `LayerOps`, and whom the graph is for.

    `compute` and `element` say in what type values are, as a name and as ONNX knows it.
    """

    graph: GraphBuilder

    def __init__(
        self, graph: GraphBuilder, plan: WeightsPlan, source: WeightSource, dtype: str, provider: Provider = CPU
    ) -> None:
        super().__init__(graph, plan, source, dtype)
        self.provider = provider
        self.compute = provider.compute_type(dtype)
        self.element = ELEMENT[self.compute]
        self.vectors = self.compute
        self._quantized: dict[str, QuantizedSlots] = {}
        self._refused: dict[str, list[str]] = {}
        self._float: dict[str, Slot] = {}

    # -- what these operators cannot do ------------------------------------------------------------------------------

    def refuse(self, name: str, reason: str) -> None:
        """Note why `name` cannot be exported, and go on: `check` tells all reasons at once."""
        named = self._refused.setdefault(reason, [])
        if name not in named:
            named.append(name)

    def check(self) -> None:
        """Refuse the graph that was built if anything was noted.

        Raises:
            ExportError: with every reason once, and the first tensor that it holds for.
        """
        reasons = [
            f"{names[0]} {reason}" + (f" (the same for {len(names) - 1} more)" if len(names) > 1 else "")
            for reason, names in self._refused.items()
        ]
        if reasons:
            raise ExportError("; ".join(reasons))

    # -- weights ---------------------------------------------------------------------------------------------------

    def float_matrix(self, name: str, layer: int | None, dtype: str) -> Slot:
        """Plan an unquantised matrix, stored as it stands in the checkpoint, [out, in]."""
        if name in self._float:
            return self._float[name]
        rows, columns = self.source.shape(name)
        shape, stored = (rows, columns), STORAGE[dtype]
        slot = self.plan.slot(name, shape, stored, layer, array(shape, stored, self.held(name)))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            for block in slices(rows, BLOCK_WEIGHTS // columns):
                writers[0].append(stored_as(source.float32(name, block), dtype, name))
                advance(source.nbytes(name) * (block.stop - block.start) / rows)

        self.plan.job([slot], fill)
        self._float[name] = slot
        return slot

    def quantized_matrix(self, names: Sequence[str], stem: str, layer: int | None) -> QuantizedSlots:
        """Plan quantised matrices of the same width, stacked along the rows as one."""
        if stem in self._quantized:
            return self._quantized[stem]
        shapes = [self.source.shape(name) for name in names]
        columns = shapes[0][1]
        rows = sum(shape[0] for shape in shapes)
        fmt = self.common_format(names)
        slots = self.quantized_slots(stem, (rows, columns), fmt, layer, self.held(*names))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            for name, (count, _) in zip(names, shapes, strict=True):
                for block in slices(count, BLOCK_WEIGHTS // columns):
                    tensor = source.quantized(name, block)
                    writers[0].append(codes_in(tensor, fmt))
                    writers[1].append(self.scales_in(tensor, fmt))
                    if fmt.zeros:
                        writers[2].append(zeros_in(tensor, fmt))
                    advance(source.nbytes(name) * (block.stop - block.start) / count)

        self.plan.job(slots.all, fill)
        self._quantized[stem] = slots
        return slots

    def quantized_slots(
        self,
        stem: str,
        shape: tuple[int, ...],
        fmt: BlockFormat,
        layer: int | None,
        held: Held,
        interleave: int | None = None,
    ) -> QuantizedSlots:
        """The slots of quantised matrices that are one of `shape` [..., rows, columns]."""
        *outer, rows, columns = shape

        def slot(layout: Layout, suffix: str, width: int, stored: np.dtype[Any]) -> Slot:
            values = columns if layout is Layout.CODES else fmt.blocks(columns)
            dtype = self.compute if layout is Layout.SCALES else f"int{fmt.bits}"
            contents = portable(layout, dtype, (*outer, rows, values), fmt.block, fmt.zeros, interleave, held)
            return self.plan.slot(f"{stem}.{suffix}", (*outer, rows, width), stored, layer, contents)

        byte = np.dtype(np.uint8)
        codes = slot(Layout.CODES, "qweight", fmt.code_bytes(columns), byte)
        scales = slot(Layout.SCALES, "scales", fmt.blocks(columns), STORAGE[self.compute])
        zeros = slot(Layout.ZEROS, "zeros", fmt.zero_bytes(columns), byte) if fmt.zeros else None
        return QuantizedSlots(rows, columns, fmt, codes, scales, zeros)

    def common_format(self, names: Sequence[str]) -> BlockFormat:
        """The one format of these matrices; that of any if one of them is refused."""
        schemes = []
        for name in names:
            scheme, columns = self.source.scheme(name), self.source.shape(name)[1]
            assert scheme is not None, name
            if not isinstance(scheme, Scheme) or scheme.bits not in BITS:
                self.refuse(
                    name,
                    f"is {scheme.name} in this recipe, which ONNX Runtime's own operators do not have (they have int4 "
                    f"and int8): {self.provider.instead}, or choose another recipe",
                )
                continue
            try:
                block_of(scheme, columns, name)
            except ExportError as error:
                self.refuse(name, str(error).removeprefix(f"{name} "))
                continue
            schemes.append((name, scheme, columns))
        return ort.common_format(schemes, self.provider.largest_block()) if schemes else _REFUSED

    def scales_in(self, tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.generic]:
        """A tensor's scales in the type of values."""
        return stored_as(ort.scales_in(tensor, fmt), self.compute, "a scale")

    def computed(self, name: str, value: NDArray[np.float32]) -> str:
        """A tensor that is computed here (the rotary tables) in the type of values."""
        slot = self.plan.slot(name, value.shape, STORAGE[self.compute], None)
        self.plan.job([slot], lambda source, writers, advance: writers[0].append(stored_as(value, self.compute, name)))
        return self.stored(slot)

    def cast(self, x: str, to: str, out: str) -> str:
        """`x`, which is in the type of values, as `to`; x itself where that is the same."""
        return x if to == self.compute else self.graph.node("Cast", [x], out, to=ELEMENT[to])

    def to_values(self, x: str, out: str) -> str:
        """`x`, which is float32, in the type of values; x itself where that is the same."""
        return x if self.compute == "float32" else self.graph.node("Cast", [x], out, to=self.element)

    # -- layers ----------------------------------------------------------------------------------------------------

    def linear(self, x: str, matrices: Sequence[Matrix], out: str) -> str:
        """x [..., in] times the rows of all matrices (each [out_i, in]), plus their biases: [..., sum of out_i]."""
        bias = self.bias(matrices, out)
        if not bias:
            return self._linear(x, [matrix.name for matrix in matrices], out, matrices[0].layer)
        result = self._linear(x, [matrix.name for matrix in matrices], f"{out}.product", matrices[0].layer)
        return self.graph.node("Add", [result, bias], out)

    def _linear(self, x: str, names: Sequence[str], out: str, layer: int | None) -> str:
        """x [..., in] times the rows of all `names` (each [out_i, in]): [..., sum of out_i]."""
        quantized = [self.source.scheme(name) is not None for name in names]
        if all(quantized):
            stem = out if len(names) > 1 else names[0].removesuffix(".weight")
            kind = activations.CPU.of_matmul(self.source, names)
            matrix = self.quantized_matrix(names, stem, layer)
            self.rounded |= activations.rounded(self.source, names, kind, matrix.columns)
            return self._quantized_linear(x, matrix, kind, out)
        if len(names) == 1:
            return self._float_linear(x, self.float_matrix(names[0], layer, self.dtype), out)
        parts = [self._linear(x, [name], f"{out}.{i}", layer) for i, name in enumerate(names)]
        return self.graph.node("Concat", parts, out, axis=-1)

    def _quantized_linear(self, x: str, matrix: QuantizedSlots, kind: str, out: str) -> str:
        fmt = matrix.fmt
        dims = (matrix.rows, fmt.blocks(matrix.columns), fmt.block * fmt.bits // 8)
        inputs = [
            x,
            self.graph.weight(matrix.codes, f"{out}.B", dims),
            self.stored(matrix.scales),
            *([self.graph.weight(matrix.zeros, f"{out}.zeros")] if matrix.zeros else []),
        ]
        return self.graph.node(
            "MatMulNBits", inputs, out, MICROSOFT, K=matrix.columns, N=matrix.rows, bits=fmt.bits, block_size=fmt.block,
            accuracy_level=self.accuracy(kind),
        )  # fmt: skip

    def _float_linear(self, x: str, slot: Slot, out: str) -> str:
        weight = self.as_computed(slot)
        return self.graph.node("FusedMatMul", [x, weight], out, MICROSOFT, transB=1)

    def stored(self, slot: Slot) -> str:
        """The initializer of a slot, as it is stored."""
        if self.graph.has(slot.name):
            return slot.name
        return self.graph.weight(slot)

    def as_computed(self, slot: Slot) -> str:
        """The initializer of a slot in the type of values."""
        weight = self.stored(slot)
        if slot.dtype == STORAGE[self.compute]:
            return weight
        return self.graph.node("Cast", [weight], f"{slot.name}.{self.compute}", to=self.element)

    def embedding(self, ids: str, name: str, out: str) -> str:
        """Rows `ids` [B, T] of the table `name` [V, D], [B, T, D]."""
        if self.source.scheme(name) is None:
            slot = self.float_matrix(name, None, self.dtype)
            if slot.dtype == STORAGE[self.compute]:
                return self.graph.node("Gather", [self.stored(slot), ids], out, axis=0)
            rows = self.graph.node("Gather", [self.stored(slot), ids], f"{out}.stored", axis=0)
            return self.graph.node("Cast", [rows], out, to=self.element)
        table = self.quantized_matrix([name], name.removesuffix(".weight"), None)
        if table.zeros and self.provider.whole_zero_rows and table.fmt.blocks(table.columns) * table.fmt.bits % 8:
            self.refuse(
                name,
                f"has {table.fmt.blocks(table.columns)} groups a row with zero points of {table.fmt.bits} bits, "
                f"which {self.provider.title} reads wrongly: give it a symmetric scheme in the recipe",
            )
        inputs = [
            self.graph.weight(table.codes, f"{table.codes.name}.table"),
            ids,
            self.stored(table.scales),
            *([self.graph.weight(table.zeros, f"{table.zeros.name}.table")] if table.zeros else []),
        ]
        return self.graph.node(
            "GatherBlockQuantized", inputs, out, MICROSOFT, bits=table.fmt.bits, block_size=table.fmt.block
        )

    def norm(self, x: str, norm: Norm, out: str, layer: int | None) -> str:
        """RMSNorm over the last axis, float32 inside."""
        inputs = [x, self.vector(norm.name, layer)]
        return self.graph.node("SimplifiedLayerNormalization", inputs, out, axis=-1, epsilon=norm.eps, stash_type=1)

    def norm_heads(self, x: str, norm: Norm, width: int, out: str, layer: int) -> str:
        """RMSNorm of each head of x [B, T, width] by itself."""
        split = self.graph.node("Reshape", [x, self._widths(0, 0, -1, norm.size)], f"{out}.heads")
        normed = self.norm(split, norm, f"{out}.heads_normed", layer)
        return self.graph.node("Reshape", [normed, self._widths(0, 0, width)], out)

    def _widths(self, *sizes: int) -> str:
        return self.graph.constant(f"shape_{'_'.join(map(str, sizes))}", int64(*sizes))

    def add_norm(self, x: str, y: str, norm: Norm, out: str, total: str, layer: int | None) -> str:
        """`total` = x + y and `out` = RMSNorm(total), in one pass over memory."""
        inputs = [x, y, self.vector(norm.name, layer)]
        outputs = [out, "", "", total]
        return self.graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, MICROSOFT, epsilon=norm.eps)

    def silu_gate(self, gate_up: str, width: int, out: str) -> str:
        """SwiGLU: silu(first `width` columns) * the others. `QuickGelu` with alpha 1 is SiLU."""
        gate, up = f"{out}.gate", f"{out}.up"
        self.graph.node(
            "Split", [gate_up, self.graph.constant("swiglu_split", int64(width, width))], [gate, up], axis=-1
        )
        activated = self.graph.node("QuickGelu", [gate], f"{out}.silu", MICROSOFT, alpha=1.0)
        return self.graph.node("Mul", [activated, up], out)

    def clipped(self, x: str, limit: float, out: str) -> str:
        """x within -limit..limit, in float32: not every provider has Clip in all types."""
        low = self.graph.constant("clip_low", np.asarray(-limit, np.float32))
        high = self.graph.constant("clip_high", np.asarray(limit, np.float32))
        upcast = self.graph.node("Clip", [self.cast(x, "float32", f"{out}.in"), low, high], f"{out}.float32")
        return self.to_values(upcast, out)

    def accuracy(self, kind: str) -> int:
        """The attribute `accuracy_level` of matmuls with these activations."""
        return ACCURACY[kind] if self.provider.rounds_activations else ACCURACY[activations.FLOAT32]
