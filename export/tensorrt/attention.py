"""Add attention that TensorRT computes itself, in place of our plugin (`--attention engine`).

It is RoPE in float32, TensorScatter into the cache in place, and Attention over the whole cache with a mask of the
positions in use. The mask is needed because TensorRT's parser silently drops the operator's own input for lengths. The
work of a decode step therefore grows with the cache's capacity, not with its length, and TensorRT fixes the capacity
when it builds an engine (here at most 4096 positions). So our plugin is the default. The cache is float16 or bfloat16;
int8 and fp8 need the plugin.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from edgelm.errors import ExportError
from edgelm.export.graph.onnx_builder import int64
from edgelm.export.tensorrt.graph import ParserGraph
from edgelm.runtimes.cuda.program import Node

CACHE_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_TYPES = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_POSITIONS, _MASK, _STARTS = "attention.positions", "attention.mask", "attention.starts"


class EngineAttention:
    """Adds TensorRT's own attention to a graph.

    Args:
        graph: Graph to add to.
        kv: Type of the KV cache.

    Raises:
        ExportError: TensorRT's attention does not support this cache type.
    """

    def __init__(self, graph: ParserGraph, kv: str) -> None:
        if kv not in CACHE_TYPES:
            raise ExportError(
                f"TensorRT's own attention does not support {kv} caches: leave --attention out to use our plugin, or "
                f'set kv = "float16" in the recipe'
            )
        self._graph = graph
        self._cache = CACHE_TYPES[kv]
        self._shared = False

    def add(self, node: Node) -> None:
        """Add the attention node of one layer."""
        qkv, keys, values, lengths, cos, sin = node.inputs[:6]
        if not self._shared:
            self._add_shared(lengths, keys)
            self._shared = True
        graph, out = self._graph, node.outputs[0]
        heads, groups, size = (node.integer(key) for key in ("num_heads", "kv_num_heads", "head_size"))
        if node.number("clip") > 0:
            qkv = self._clipped(qkv, node, f"{out}.clipped")
        widths = self._ints("widths", f"{heads}.{groups}.{size}", heads * size, groups * size, groups * size)
        parts = [f"{out}.{which}" for which in "qkv"]
        graph.node("Split", [qkv, widths], parts, axis=-1)
        q, k, v = parts
        q = self._rotated(self._split_heads(q, node.input(6), heads, node), cos, sin)
        k = self._rotated(self._split_heads(k, node.input(7), groups, node), cos, sin)
        v = self._heads(self._cast(v, self._cache, f"{v}.cached"), groups, size)
        filled = [
            graph.node("TensorScatter", [cache, new, _STARTS], present, axis=2, mode="linear")
            for cache, new, present in ((keys, k, node.outputs[1]), (values, v, node.outputs[2]))
        ]
        attended = graph.node("Attention", [q, *filled, _MASK], f"{out}.attended")
        turned = graph.node("Transpose", [attended], f"{out}.turned", perm=[0, 2, 1, 3])
        flat = graph.node("Reshape", [turned, self._ints("flat", str(heads * size), 0, 0, heads * size)], f"{out}.flat")
        self._cast(flat, _TYPES[node.text("activation")], out)

    def _add_shared(self, lengths: str, cache: str) -> None:
        """Add the new tokens' positions [B, T] and the mask [B, 1, T, C] of cache positions that each may attend to."""
        graph = self._graph
        zero, one, two = (graph.constant(f"attention.{i}", np.asarray(i, np.int64)) for i in range(3))
        axis = self._ints("axis", "1", 1)
        starts = graph.node("Cast", [lengths], _STARTS, to=TensorProto.INT64)
        tokens = graph.node("Gather", [graph.node("Shape", ["input_ids"], "attention.shape"), one], "attention.tokens")
        new = graph.node("Range", [zero, tokens, one], "attention.new")
        begin = graph.node("Unsqueeze", [starts, axis], "attention.begin")
        positions = graph.node("Add", [begin, new], _POSITIONS)
        capacity = graph.node("Gather", [graph.node("Shape", [cache], "attention.cache"), two], "attention.capacity")
        places = graph.node("Range", [zero, capacity, one], "attention.places")
        rows = graph.node("Unsqueeze", [positions, self._ints("axes", "1.3", 1, 3)], "attention.rows")
        graph.node("LessOrEqual", [places, rows], _MASK)

    def _clipped(self, x: str, node: Node, out: str) -> str:
        limit, kind = node.number("clip"), _TYPES[node.text("activation")]
        bounds = [
            self._graph.constant(f"attention.clip.{name}", helper.make_tensor("", kind, [], [value]))
            for name, value in (("low", -limit), ("high", limit))
        ]
        return self._graph.node("Clip", [x, *bounds], out)

    def _split_heads(self, x: str, weight: str, heads: int, node: Node) -> str:
        """Add a cast to float32, a norm if there is one, and a split into heads: [B, heads, T, size].

        The size of the norm's weight says whether it norms each head separately or all heads together.
        """
        size = node.integer("head_size")
        x = self._cast(x, TensorProto.FLOAT, f"{x}.f32")
        if not weight:
            return self._heads(x, heads, size)
        if self._graph.program.weights[weight].elements == size and heads > 1:
            return self._normed(self._heads(x, heads, size), weight, node)
        return self._heads(self._normed(x, weight, node), heads, size)

    def _normed(self, x: str, weight: str, node: Node) -> str:
        return self._graph.node(
            "RMSNormalization", [x, self._graph.stored(weight)], f"{x}.normed", epsilon=node.number("epsilon"), axis=-1
        )

    def _rotated(self, x: str, cos: str, sin: str) -> str:
        stem = x.removesuffix(".heads")
        tables = [self._graph.stored(table) for table in (cos, sin)]
        rotated = self._graph.node("RotaryEmbedding", [x, *tables, _POSITIONS], f"{stem}.rotated")
        return self._cast(rotated, self._cache, f"{stem}.cached")

    def _heads(self, x: str, heads: int, size: int) -> str:
        """Add a reshape from [B, T, heads * size] to [B, heads, T, size]."""
        shape = self._ints("heads", f"{heads}.{size}", 0, 0, heads, size)
        split = self._graph.node("Reshape", [x, shape], f"{x}.split")
        return self._graph.node("Transpose", [split], f"{x}.heads", perm=[0, 2, 1, 3])

    def _cast(self, x: str, kind: int, out: str) -> str:
        return self._graph.node("Cast", [x], out, to=kind)

    def _ints(self, what: str, which: str, *values: int) -> str:
        return self._graph.constant(f"attention.{what}.{which}", int64(*values))
