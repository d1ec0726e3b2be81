"""The graph that TensorRT's parser reads, made of a bundle's program.

- Every node is a plugin: the operator's name with a prefix (the parser keeps names such as GroupQueryAttention to
  itself), absent inputs left out (it takes no empty ones), and one attribute, the text of a `PluginSpec`.
- Weights and caches are int8: TensorRT upcasts constants of uint8, and gives a plugin int8 as it is.
- Batch, tokens and the caches' positions stay open; a cache's bytes a position are fixed, since its type is.

`edgelm.export.tensorrt.linear` puts matmuls that the engine computes itself in the place of some of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from edgelm.bundle import ModelInfo
from edgelm.errors import ExportError
from edgelm.export.graph.onnx_builder import Dims, GraphBuilder
from edgelm.runtimes.cuda.kernels.attention import row_bytes
from edgelm.runtimes.cuda.operators import KV_CODES
from edgelm.runtimes.cuda.program import Node, Program, Value
from edgelm.runtimes.tensorrt.plugin_spec import NAMESPACE, OPERATORS, PREFIX, PluginSpec
from edgelm.runtimes.tensorrt.plugins import FIELD

OPSET = 24
IR_VERSION = 11
_TYPES = {"f32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.INT8}
CACHES = ("key", "value")


class ParserGraph(GraphBuilder):
    """A graph for TensorRT's parser, made of a program's nodes and of operators of ai.onnx."""

    def __init__(self, program: Program, weights_file: str) -> None:
        super().__init__(weights_file, OPSET, IR_VERSION)
        self.program = program

    def stored(self, name: str) -> str:
        """Use a weight of the program as it is stored."""
        if not self.has(name):
            weight = self.program.weights[name]
            self.external(name, _TYPES[weight.type], weight.dims, weight.offset, weight.size)
        return name

    def plugin(self, node: Node) -> None:
        """Add a node as a plugin."""
        self.add(plugin_node(node, self.program.values))
        for name in node.inputs:
            if name in self.program.weights:
                self.stored(name)

    def declare(self, info: ModelInfo, cache_type: int, row: int, capacity: int | str = "capacity") -> None:
        """Declare inputs and outputs; a cache has `row` elements of `cache_type` for one head and position."""
        cache: Dims = ["batch", info.num_kv_heads, capacity, row]
        self.input("input_ids", TensorProto.INT32, ["batch", "tokens"])
        self.input("past_lengths", TensorProto.INT32, ["batch"])
        self.output("logits", TensorProto.FLOAT, ["batch", 1, info.vocab_size])
        for i in range(info.num_layers):
            for which in CACHES:
                self.input(f"past_key_values.{i}.{which}", cache_type, cache)
                self.output(f"present.{i}.{which}", cache_type, cache)


def plugin_node(node: Node, values: Mapping[str, Value]) -> onnx.NodeProto:
    """The plugin of one node, as the parser reads it. Raises as `plugin_spec`."""
    return helper.make_node(
        f"{PREFIX}{node.op}",
        [name for name in node.inputs if name],
        list(node.outputs),
        name=node.name,
        domain=NAMESPACE,
        **{FIELD: plugin_spec(node, values).to_text()},
    )


def plugin_spec(node: Node, values: Mapping[str, Value]) -> PluginSpec:
    """What the plugin of a node is told.

    Raises:
        ExportError: it is no operator of ours, or has more or fewer inputs than one.
    """
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise ExportError(f"{node.name}: the TensorRT plugins have no operator {node.op}; they have {list(OPERATORS)}")
    present = operator.present(node.inputs)
    if len(node.inputs) > len(operator.inputs) or not all(present[: operator.required]):
        raise ExportError(
            f"{node.name}: {node.op} takes {', '.join(operator.inputs)}, of which the first {operator.required} must "
            f"be there; the node has {list(node.inputs)}"
        )
    own = len(node.outputs) - len(operator.aliases)
    results = tuple((values[name].type, values[name].width) for name in node.outputs[:own])
    return PluginSpec(node.name, node.op, node.attrs, present, results)


def cache_kind(program: Program) -> str:
    """The type of the caches that the program's attention has, e.g. "bfloat16".

    Raises:
        ExportError: it has several, or there is no attention.
    """
    found = {node.text("kv") for node in program.nodes if node.op == "GroupQueryAttention"}
    if len(found) != 1:
        raise ExportError(f"the program's caches are of {len(found)} types ({', '.join(sorted(found))}), expected one")
    return found.pop()


def cache_row_bytes(program: Program) -> int:
    """Bytes of a cache for one head and position.

    Raises:
        ExportError: the GPU kernels have no such cache.
    """
    kind = cache_kind(program)
    if kind not in KV_CODES:
        raise ExportError(f"the cache is {kind!r}: on a GPU it can be {', '.join(KV_CODES)}")
    width = next(node.integer("head_size") for node in program.nodes if node.op == "GroupQueryAttention")
    return row_bytes(KV_CODES[kind], width)
