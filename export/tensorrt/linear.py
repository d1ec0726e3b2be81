"""Add matmuls that TensorRT computes itself, in place of our plugin (`--matmul engine`).

- Unquantised matrices: RMSNorm in float32, rounding to the activations' type A, MatMul in A. The engine rounds the
  result to A, as PyTorch does, before a bias and a residual are added in float32. Our plugin adds them to its float32
  sums.
- int8 and FP8 matrices with one scale per row, if the input has a calibrated static scale: QuantizeLinear,
  DequantizeLinear and MatMul, which TensorRT fuses into one GEMM of 8-bit operands.

All other matmuls stay plugins: int4, scales per group, and the head, whose logits must not be rounded.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.export.tensorrt.graph import ParserGraph
from edgelm.runtimes.cuda.program import Node, matrix_of
from edgelm.runtimes.tensorrt.build import ROWS_FILE
from edgelm.runtimes.tensorrt.rowmajor import ALIGNMENT, Rows, parts_of

_FLOATS = {GpuKind.FLOAT16: TensorProto.FLOAT16, GpuKind.BFLOAT16: TensorProto.BFLOAT16}
_CODES = {GpuKind.INT8: TensorProto.INT8, GpuKind.FP8: TensorProto.FLOAT8E4M3FN}
_TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


class EngineMatmuls:
    """Adds TensorRT's own matmuls to a graph.

    Args:
        graph: Graph to add to.
        fp8: Whether the engine may compute FP8 matmuls, which it supports from SM 89 on.

    Attributes:
        rows: Matrices that `edgelm build` must unpack for these matmuls.
        has_fp8: Whether one of them is FP8.
    """

    def __init__(self, graph: ParserGraph, *, fp8: bool) -> None:
        self.rows: list[Rows] = []
        self.has_fp8 = False
        self._graph = graph
        self._fp8 = fp8
        self._size = 0

    def takes(self, node: Node) -> bool:
        """Return whether the engine computes this node."""
        if node.op != "QuantLinear" or node.outputs[0] == "logits":
            return False
        matrix = matrix_of(node)
        if matrix.kind in _FLOATS:
            return str(matrix.kind) == node.text("activation")
        scaled = float(node.attrs.get("input_scale", 0.0)) > 0 and matrix.groups == 1 and not matrix.zeros
        return scaled and (matrix.kind is GpuKind.INT8 or (matrix.kind is GpuKind.FP8 and self._fp8))

    def add(self, node: Node) -> None:
        """Add one matmul node."""
        graph, out = self._graph, node.outputs[0]
        x, norm, residual, bias = (node.input(i) for i in (0, 2, 3, 4))
        kind = graph.program.values[x].type
        if norm:
            x = graph.node(
                "RMSNormalization", [x, graph.stored(norm)], f"{out}.normed", epsilon=node.number("epsilon"), axis=-1
            )
            kind = "f32"
        matrix = matrix_of(node)
        self.has_fp8 |= matrix.kind is GpuKind.FP8
        results = self._float(node, matrix, x, kind) if matrix.kind in _FLOATS else self._scaled(node, matrix, x, kind)
        upcast = [self._cast(result, "f32", f"{out}.{i}.f32") for i, result in enumerate(results)]
        if matrix.swiglu:
            gate, up = upcast
            silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{out}.sigmoid")], f"{out}.silu")
            self._cast(graph.node("Mul", [silu, up], f"{out}.product"), node.text("output"), out)
            return
        if bias:
            results = upcast = [graph.node("Add", [upcast[0], graph.stored(bias)], f"{out}.biased")]
        if residual:
            graph.node("Add", [upcast[0], residual], out)
        else:
            self._cast(results[0], node.text("output"), out)

    def _float(self, node: Node, matrix: GpuMatrix, x: str, kind: str) -> list[str]:
        out, activation = node.outputs[0], node.text("activation")
        if kind != activation:
            x = self._cast(x, activation, f"{out}.input")
        return [self._matmul(x, self._values(node, matrix, part), f"{out}.{part}") for part in parts_of(matrix)]

    def _scaled(self, node: Node, matrix: GpuMatrix, x: str, kind: str) -> list[str]:
        graph, out, codes = self._graph, node.outputs[0], _CODES[matrix.kind]
        if kind != "f32":
            x = self._cast(x, "f32", f"{out}.input")
        scale = graph.constant(f"{out}.input_scale", np.asarray(node.number("input_scale"), np.float32))
        zero = graph.constant(f"{out}.input_zero", TensorProto(data_type=codes, raw_data=b"\0"))
        coded = graph.node("QuantizeLinear", [x, scale, zero], f"{out}.coded")
        x = graph.node("DequantizeLinear", [coded, scale, zero], f"{out}.decoded")
        results = []
        for part in parts_of(matrix):
            values, scales = self._values(node, matrix, part), self._stored(node, matrix, part, "scales")
            weights = graph.node("DequantizeLinear", [values, scales], f"{out}.{part}.weights", axis=0)
            results.append(self._matmul(x, weights, f"{out}.{part}"))
        return results

    def _matmul(self, x: str, weights: str, out: str) -> str:
        turned = self._graph.node("Transpose", [weights], f"{out}.turned", perm=[1, 0])
        return self._graph.node("MatMul", [x, turned], out)

    def _values(self, node: Node, matrix: GpuMatrix, part: str) -> str:
        return self._stored(node, matrix, part, "values")

    def _stored(self, node: Node, matrix: GpuMatrix, part: str, what: str) -> str:
        blob = node.input(1)
        entry = Rows(f"{blob}.{part}.{what}", matrix, self._graph.program.weights[blob].offset, part, what, self._size)
        if not self._graph.has(entry.name):
            kind = TensorProto.FLOAT if what == "scales" else {**_FLOATS, **_CODES}[matrix.kind]
            self._graph.external(entry.name, kind, entry.dims, entry.offset, entry.nbytes, ROWS_FILE)
            self.rows.append(entry)
            self._size = -(-(self._size + entry.nbytes) // ALIGNMENT) * ALIGNMENT
        return entry.name

    def _cast(self, x: str, kind: str, out: str) -> str:
        return self._graph.node("Cast", [x], out, to=_TYPES[kind])
