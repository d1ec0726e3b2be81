"""Build layers from portable operators: those that every ONNX Runtime has (ai.onnx and com.microsoft).

Activations have the type that the execution provider computes in (ort_providers.py), float32 on the CPU.
Two facts behind the design, checked on the CPU with ONNX Runtime 1.31 (for CUDA see ort_providers.py):

- `MatMulNBits` takes scales in the activations' type. With float32 scales, int4 in groups of 32 has 5 bits per weight.
- `FusedMatMul` with `transB` reads a weight in the checkpoint's own layout [out, in]. So no weight is transposed, and a
  tied embedding and head share their bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edgelm.bundle.activations import CPU as CPU_ACTIVATIONS
from edgelm.bundle.activations import FLOAT32, INT8
from edgelm.bundle.contents import Layout
from edgelm.bundle.ort_providers import CPU, Provider
from edgelm.errors import ExportError
from edgelm.export.activations import rounded
from edgelm.export.graph.base import STORAGE, LayerOps, stored_as
from edgelm.export.graph.onnx_builder import MICROSOFT, GraphBuilder, int64
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
# The attribute accuracy_level of MatMulNBits and QMoE. At 4, activations are quantised to int8 per block at run time:
# about 1 % of noise per matmul, and the only mode whose kernels use the CPU's integer dot products. At 0 they stay
# float32. Kernels for x86 round in blocks of the weights' group size, those for Arm (KleidiAI) whole rows. Parity
# allows for whole rows, the coarser of the two.
ACCURACY = {INT8: 4, FLOAT32: 0}
# Format of refused matrices, so that building can go on until all reasons are known.
_REFUSED = BlockFormat(bits=8, block=32, zeros=False)


@dataclass(frozen=True)
class QuantizedSlots:
    """The slots of a quantised matrix [rows, columns] in the weights file."""

    rows: int
    columns: int
    fmt: BlockFormat
    codes: Slot
    scales: Slot
    zeros: Slot | None

    @property
    def all(self) -> list[Slot]:
        """The slots, in the order in which jobs fill them."""
        return [self.codes, self.scales] + ([self.zeros] if self.zeros else [])


class PortableOps(LayerOps):
    """Adds layers of portable operators to an ONNX graph.

    Args:
        graph, plan, source, dtype: As for `LayerOps`.
        provider: Execution provider that the graph is for.

    Attributes:
        compute: Type of activations, as a name.
        element: The same type, as ONNX's number.
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

    # -- refusals ----------------------------------------------------------------------------------------------------

    def refuse(self, name: str, reason: str) -> None:
        """Record why `name` cannot be exported; `check` raises with all reasons at once."""
        named = self._refused.setdefault(reason, [])
        if name not in named:
            named.append(name)

    @contextlib.contextmanager
    def refusing(self, name: str) -> Iterator[None]:
        """Record an `ExportError` about `name`, with which its message begins."""
        try:
            yield
        except ExportError as error:
            self.refuse(name, str(error).removeprefix(f"{name} "))

    def check(self) -> None:
        """Raise if anything was refused.

        Raises:
            ExportError: States every reason once, with the first tensor that it applies to.
        """
        reasons = [
            f"{names[0]} {reason}" + (f" (the same for {len(names) - 1} more)" if len(names) > 1 else "")
            for reason, names in self._refused.items()
        ]
        if reasons:
            raise ExportError("; ".join(reasons))

    # -- weights ---------------------------------------------------------------------------------------------------

    def float_matrix(self, name: str, layer: int | None, dtype: str) -> Slot:
        """Plan an unquantised matrix [out, in], the checkpoint's own layout; return its slot."""
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
        """Plan quantised matrices of equal width, stacked along the rows; return their slots."""
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
        """Plan the slots of stacked quantised matrices; `shape` is [..., rows, columns] of all together."""
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
        """Return the common format of these matrices. If one is refused, the format may be any."""
        schemes = []
        for name in names:
            scheme, columns = self.source.scheme(name), self.source.shape(name)[1]
            problem = self.provider.scheme_problem(scheme)
            if problem is not None:
                self.refuse(name, problem)
                continue
            assert isinstance(scheme, Scheme), name
            with self.refusing(name):
                block_of(scheme, columns, name)
                schemes.append((name, scheme, columns))
        return ort.common_format(schemes, self.provider.largest_block()) if schemes else _REFUSED

    def scales_in(self, tensor: QuantTensor, fmt: BlockFormat) -> NDArray[np.generic]:
        """Return a tensor's scales in the activations' type."""
        return stored_as(ort.scales_in(tensor, fmt), self.compute, "a scale")

    def computed(self, name: str, value: NDArray[np.float32]) -> str:
        """Add a tensor that the exporter computes, such as a RoPE table, in the activations' type; return its name."""
        slot = self.plan.slot(name, value.shape, STORAGE[self.compute], None)
        self.plan.job([slot], lambda source, writers, advance: writers[0].append(stored_as(value, self.compute, name)))
        return self.stored(slot)

    def cast(self, x: str, to: str, out: str) -> str:
        """Cast x from the activations' type to `to`; return x itself if they are the same."""
        return x if to == self.compute else self.graph.node("Cast", [x], out, to=ELEMENT[to])

    def to_values(self, x: str, out: str) -> str:
        """Cast x from float32 to the activations' type; return x itself if that is float32."""
        return x if self.compute == "float32" else self.graph.node("Cast", [x], out, to=self.element)

    # -- layers ----------------------------------------------------------------------------------------------------

    def linear(self, x: str, matrices: Sequence[Matrix], out: str) -> str:
        """Add a matmul of x [..., in] with stacked matrices [out_i, in], plus their biases: [..., sum of out_i]."""
        bias = self.bias(matrices, out)
        if not bias:
            return self._linear(x, [matrix.name for matrix in matrices], out, matrices[0].layer)
        result = self._linear(x, [matrix.name for matrix in matrices], f"{out}.product", matrices[0].layer)
        return self.graph.node("Add", [result, bias], out)

    def _linear(self, x: str, names: Sequence[str], out: str, layer: int | None) -> str:
        """Add a matmul of x [..., in] with stacked matrices [out_i, in]: [..., sum of out_i]."""
        quantized = [self.source.scheme(name) is not None for name in names]
        if all(quantized):
            stem = out if len(names) > 1 else names[0].removesuffix(".weight")
            kind = CPU_ACTIVATIONS.of_matmul(self.source, names)
            matrix = self.quantized_matrix(names, stem, layer)
            self.rounded |= rounded(self.source, names, kind, matrix.columns)
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
        """Add the initializer of a slot, unless it is there; return its name."""
        if self.graph.has(slot.name):
            return slot.name
        return self.graph.weight(slot)

    def as_computed(self, slot: Slot) -> str:
        """Add the initializer of a slot, cast to the activations' type; return the name of the result."""
        weight = self.stored(slot)
        if slot.dtype == STORAGE[self.compute]:
            return weight
        return self.graph.node("Cast", [weight], f"{slot.name}.{self.compute}", to=self.element)

    def embedding(self, ids: str, name: str, out: str) -> str:
        """Add a lookup of the rows `ids` [B, T] in the table `name` [V, D]: [B, T, D]."""
        if self.source.scheme(name) is None:
            slot = self.float_matrix(name, None, self.dtype)
            if slot.dtype == STORAGE[self.compute]:
                return self.graph.node("Gather", [self.stored(slot), ids], out, axis=0)
            rows = self.graph.node("Gather", [self.stored(slot), ids], f"{out}.stored", axis=0)
            return self.graph.node("Cast", [rows], out, to=self.element)
        table = self.quantized_matrix([name], name.removesuffix(".weight"), None)
        problem = self.provider.table_problem(table.fmt.blocks(table.columns), table.fmt.bits)
        if table.zeros and problem is not None:
            self.refuse(name, problem)
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
        """Add RMSNorm over the last axis, computed in float32."""
        inputs = [x, self.vector(norm.name, layer)]
        return self.graph.node("SimplifiedLayerNormalization", inputs, out, axis=-1, epsilon=norm.eps, stash_type=1)

    def norm_heads(self, x: str, norm: Norm, width: int, out: str, layer: int) -> str:
        """Add RMSNorm of each head of x [B, T, width] separately."""
        split = self.graph.node("Reshape", [x, self._widths(0, 0, -1, norm.size)], f"{out}.heads")
        normed = self.norm(split, norm, f"{out}.heads_normed", layer)
        return self.graph.node("Reshape", [normed, self._widths(0, 0, width)], out)

    def _widths(self, *sizes: int) -> str:
        return self.graph.constant(f"shape_{'_'.join(map(str, sizes))}", int64(*sizes))

    def add_norm(self, x: str, y: str, norm: Norm, out: str, total: str, layer: int | None) -> str:
        """Add `total` = x + y and `out` = RMSNorm(total), one operator that reads memory once; return `out`."""
        inputs = [x, y, self.vector(norm.name, layer)]
        outputs = [out, "", "", total]
        return self.graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, MICROSOFT, epsilon=norm.eps)

    def silu_gate(self, gate_up: str, width: int, out: str) -> str:
        """Add SwiGLU: silu(first `width` columns) * the other columns. `QuickGelu` with alpha 1 is SiLU."""
        gate, up = f"{out}.gate", f"{out}.up"
        self.graph.node(
            "Split", [gate_up, self.graph.constant("swiglu_split", int64(width, width))], [gate, up], axis=-1
        )
        activated = self.graph.node("QuickGelu", [gate], f"{out}.silu", MICROSOFT, alpha=1.0)
        return self.graph.node("Mul", [activated, up], out)

    def clipped(self, x: str, limit: float, out: str) -> str:
        """Add a clip of x to -limit..limit. It is computed in float32, as not every provider has Clip in all types."""
        low = self.graph.constant("clip_low", np.asarray(-limit, np.float32))
        high = self.graph.constant("clip_high", np.asarray(limit, np.float32))
        upcast = self.graph.node("Clip", [self.cast(x, "float32", f"{out}.in"), low, high], f"{out}.float32")
        return self.to_values(upcast, out)

    def accuracy(self, kind: str) -> int:
        """Return the attribute `accuracy_level` of matmuls with activations `kind`."""
        return ACCURACY[kind] if self.provider.rounds_activations else ACCURACY[FLOAT32]
