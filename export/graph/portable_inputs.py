"""What the portable graphs of both families share: documented inputs and outputs, positions, the KV cache, the head.

Names and shapes are those ONNX Runtime GenAI expects, so that it runs the same folder:

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [batch, tokens] |
| `attention_mask` | int64 | [batch, total]: ones for every token so far, the new ones included |
| `past_key_values.{i}.key`, `.value` | float32; float16 or bfloat16 for CUDA | [batch, kv_heads, past, head_dim] |
| `logits_start` (optional, default -1) | int64 | [1]: logits are computed from this position of the input on |
| `logits` | float32 | [batch, 1, vocabulary]: of the last token; [batch, positions, ...] where `logits_start` is fed |
| `present.{i}.key`, `.value` | float32 | like past; may be the same buffer, then of the context's full length |

The debug graph returns in addition `hidden.{i}` [batch, tokens, hidden] (the residual stream: 0 is the embedding's
output, i + 1 what layer i leaves) and, for a mixture, `router_logits.{i}` [batch * tokens, experts], all float32.

A graph for CUDA is captured once and replayed for every token: nothing on the host may depend on a length. So the mask
may be as long as the cache, with zeros at the end: its sum says how many tokens there are, its length only bounds them.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgelm.bundle import ModelInfo
from edgelm.export.graph.onnx_builder import MICROSOFT, Dims, int64
from edgelm.export.graph.portable import FLOAT, PortableOps

_END = np.iinfo(np.int64).max
_HEAD_SIZES = 16
"""GroupQueryAttention with rotary positions takes multiples of this alone (tried: 1.18 to 1.32, sizes 1 to 1024)."""


class DecoderFrame:
    """Declares inputs and outputs, and builds embedding, attention and head around a family's own layers."""

    def __init__(self, ops: PortableOps, info: ModelInfo, rope_theta: float) -> None:
        self.ops = ops
        self.graph = ops.graph
        self.info = info
        self.debug_outputs: list[tuple[str, Dims]] = []
        graph = self.graph
        if info.head_dim % _HEAD_SIZES:
            ops.refuse(
                "config.json",
                f"has heads of {info.head_dim} (head_dim, or hidden_size / num_attention_heads), ONNX Runtime's "
                f"GroupQueryAttention takes multiples of {_HEAD_SIZES}: "
                "export with --target cpu --ops native, which takes all even sizes",
            )
        self.ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        cache: Dims = ["batch_size", info.num_kv_heads, "past_sequence_length", info.head_dim]
        for i in range(info.num_layers):
            graph.input(f"past_key_values.{i}.key", ops.element, cache)
            graph.input(f"past_key_values.{i}.value", ops.element, cache)
        self.logits_start = graph.overridable("logits_start", int64(-1))
        self._lengths(mask)
        self.cos, self.sin = ops.rotary(info.context_length, info.head_dim, rope_theta)
        # The declared 1 tells GenAI not to allocate logits for every position of a prompt; whoever feeds `logits_start`
        # gets as many as asked for (ONNX Runtime only logs that the declaration differs).
        graph.output("logits", FLOAT, ["batch_size", 1, info.vocab_size])
        present: Dims = ["batch_size", info.num_kv_heads, "total_sequence_length", info.head_dim]
        for i in range(info.num_layers):
            graph.output(f"present.{i}.key", ops.element, present)
            graph.output(f"present.{i}.value", ops.element, present)

    def _lengths(self, mask: str) -> None:
        """GroupQueryAttention's lengths, from the mask alone, as GenAI's graphs do it."""
        node, constant = self.graph.node, self.graph.constant
        counted = node("ReduceSum", [mask, constant("axis_1", int64(1))], "tokens_so_far", keepdims=0)
        last = node("Sub", [counted, constant("one", int64(1))], "last_position")
        self.seqlens_k = node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        total = node(
            "Gather", [node("Shape", [mask], "mask_shape"), constant("index_1", np.asarray(1, np.int64))], "total"
        )
        self.total = node("Cast", [total], "total_sequence_length_int32", to=TensorProto.INT32)

    def embedding(self, name: str) -> str:
        """The residual stream's start, `hidden.0`."""
        return self.ops.embedding(self.ids, name, self._record("hidden.0"))

    def attention(self, qkv: tuple[str, str, str], layer: int, out: str) -> str:
        """Rotary grouped-query attention over the in-place cache. q [B, T, H * Dh]; k and v [B, T, KVH * Dh]."""
        inputs = [
            *qkv, f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", self.seqlens_k, self.total,
            self.cos, self.sin,
        ]  # fmt: skip
        outputs = [out, f"present.{layer}.key", f"present.{layer}.value"]
        return self.graph.node(
            "GroupQueryAttention", inputs, outputs, MICROSOFT, num_heads=self.info.num_heads,
            kv_num_heads=self.info.num_kv_heads, do_rotary=1,
        )  # fmt: skip

    def record_hidden(self, index: int) -> str:
        """The name of the residual stream after layer `index - 1`; the debug graph returns it."""
        return self._record(f"hidden.{index}")

    def record_router(self, layer: int) -> str:
        """The name of a layer's router logits; the debug graph returns them."""
        name = f"router_logits.{layer}"
        self.debug_outputs.append((name, ["tokens", self.info.num_experts]))
        return name

    def head(self, normed: str, name: str) -> None:
        """Logits of the positions from `logits_start` on."""
        constant = self.graph.constant
        ends, axes = constant("slice_end", int64(_END)), constant("axis_1", int64(1))
        last = self.graph.node("Slice", [normed, self.logits_start, ends, axes], "head_input")
        if self.ops.compute == "float32":
            self.ops.linear(last, [name], "logits", None)
        else:
            narrow = self.ops.linear(last, [name], f"logits.{self.ops.compute}", None)
            self.ops.cast(narrow, "float32", "logits")

    def _record(self, name: str) -> str:
        """Let the debug graph return `name`, in float32; the name under which the graph itself has the value."""
        self.debug_outputs.append((name, ["batch_size", "sequence_length", self.info.hidden_size]))
        if self.ops.compute == "float32":
            return name
        value = f"{name}.{self.ops.compute}"
        self.graph.debug_node("Cast", [value], name, to=FLOAT)
        return value
