"""Build the graph for TensorRT's parser from a bundle's program.

- Every node is a plugin. Its name is the operator's with a prefix, because the parser reserves names such as
  GroupQueryAttention. Absent inputs are dropped, because the parser does not take empty ones. Its one attribute is the
  text that `plugin_text` returns.
- Weights and caches are declared as int8, because TensorRT upcasts uint8 constants but not int8 ones.
- Batch, tokens and the positions of a cache are dynamic. The bytes per position are fixed, as the cache's type is.

`edgelm.export.tensorrt.linear` replaces some of the nodes with matmuls that the engine computes itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from edgelm.bundle import ModelInfo
from edgelm.bundle.kv_cache import GPU_KV_TYPES, row_bytes
from edgelm.errors import ExportError
from edgelm.export.graph.onnx_builder import Dims, GraphBuilder
from edgelm.runtimes.cuda.program import Node, Program, Value
from edgelm.runtimes.tensorrt.plugin_spec import FIELD, NAMESPACE, PREFIX, plugin_text

OPSET = 24
IR_VERSION = 11
_TYPES = {"f32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.INT8}
CACHES = ("key", "value")


class ParserGraph(GraphBuilder):
    """Graph for TensorRT's parser, made of a program's nodes and of operators of ai.onnx."""

    def __init__(self, program: Program, weights_file: str) -> None:
        super().__init__(weights_file, OPSET, IR_VERSION)
        self.program = program

    def stored(self, name: str) -> str:
        """Add a weight of the program as an initializer, unless it is there; return its name."""
        if not self.has(name):
            weight = self.program.weights[name]
            self.external(name, _TYPES[weight.type], weight.dims, weight.offset, weight.size)
        return name

    def plugin(self, node: Node) -> None:
        """Add a node of the program as a plugin."""
        self.add(plugin_node(node, self.program.values))
        for name in node.inputs:
            if name in self.program.weights:
                self.stored(name)

    def declare(self, info: ModelInfo, cache_type: int, row: int, capacity: int | str = "capacity") -> None:
        """Declare inputs and outputs; a cache has `row` elements of `cache_type` per head and position."""
        cache: Dims = ["batch", info.num_kv_heads, capacity, row]
        self.input("input_ids", TensorProto.INT32, ["batch", "tokens"])
        self.input("past_lengths", TensorProto.INT32, ["batch"])
        self.output("logits", TensorProto.FLOAT, ["batch", 1, info.vocab_size])
        for i in range(info.num_layers):
            for which in CACHES:
                self.input(f"past_key_values.{i}.{which}", cache_type, cache)
                self.output(f"present.{i}.{which}", cache_type, cache)


def plugin_node(node: Node, values: Mapping[str, Value]) -> onnx.NodeProto:
    """Return the plugin node of a program's node.

    Raises:
        BundleError: the node is not one of our operators, or lacks an input.
    """
    return helper.make_node(
        f"{PREFIX}{node.op}",
        [name for name in node.inputs if name],
        list(node.outputs),
        name=node.name,
        domain=NAMESPACE,
        **{FIELD: plugin_field(node, values)},
    )


def plugin_field(node: Node, values: Mapping[str, Value]) -> str:
    """Return the field of a node's plugin. Raises as `plugin_node`."""
    results = [values[name] for name in node.outputs if name in values]
    return plugin_text(
        {
            **node.attrs,
            "op": node.op,
            "name": node.name,
            "present": "".join("1" if name else "0" for name in node.inputs),
            "results": ",".join(f"{result.type}:{result.width}" for result in results),
        }
    )


def cache_kind(program: Program) -> str:
    """Return the type of the program's KV cache, such as "bfloat16".

    Raises:
        ExportError: The layers have caches of different types, or there is no attention.
    """
    found = {node.text("kv") for node in program.nodes if node.op == "GroupQueryAttention"}
    if len(found) != 1:
        raise ExportError(f"the program has {len(found)} cache types ({', '.join(sorted(found))}), expected one")
    return found.pop()


def cache_row_bytes(program: Program) -> int:
    """Return the bytes of a cache per head and position.

    Raises:
        ExportError: The GPU kernels do not support this cache type.
    """
    kind = cache_kind(program)
    if kind not in GPU_KV_TYPES:
        raise ExportError(f"the cache type is {kind!r}: on a GPU it can be {', '.join(GPU_KV_TYPES)}")
    width = next(node.integer("head_size") for node in program.nodes if node.op == "GroupQueryAttention")
    return row_bytes(kind, width, "gpu")
