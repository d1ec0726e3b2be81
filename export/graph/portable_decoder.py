"""Build the ONNX graph of portable operators from a decoder's spec.

Inputs and outputs have the names and shapes that ONNX Runtime GenAI expects, so it runs the same folder:

| name | type | shape |
|---|---|---|
| `input_ids` | int64 | [batch, tokens] |
| `attention_mask` | int64 | [batch, total]: ones for every token so far, the new ones included |
| `past_key_values.{i}.key`, `.value` | float32; float16 or bfloat16 for CUDA | [batch, kv_heads, past, head_dim] |
| `logits_start` (optional, default -1) | int64 | [1]: logits are computed from this position of the input on |
| `logits` | float32 | [batch, 1, vocabulary]: of the last token; [batch, positions, ...] where `logits_start` is fed |
| `present.{i}.key`, `.value` | float32 | like past; may be the same buffer, then of the context's full length |

The debug graph also returns `hidden.{i}` [batch, tokens, hidden] (the residual stream: 0 is the output of the
embedding, i + 1 that of layer i) and, for a MoE layer, `router_logits.{i}` [batch * tokens, experts], all float32.

On CUDA the graph is captured once and replayed for every token, so nothing on the host may depend on a length. The
mask may therefore be as long as the cache, with zeros at the end: its sum is the number of tokens.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgelm.bundle import ModelInfo
from edgelm.export.graph.onnx_builder import MICROSOFT, Dims, int64
from edgelm.export.graph.portable import FLOAT, PortableOps
from edgelm.export.graph.portable_moe import PortableMoE
from edgelm.models.spec import Attention, Block, Decoder, Dense, Matrix, MoE, Norm

_END = np.iinfo(np.int64).max


class PortableDecoder:
    """Declares the graph's inputs and outputs, and adds embedding, layers and head."""

    def __init__(self, ops: PortableOps, info: ModelInfo, decoder: Decoder) -> None:
        self.ops = ops
        self.graph = ops.graph
        self.info = info
        self.decoder = decoder
        self.debug_outputs: list[tuple[str, Dims]] = []
        graph = self.graph
        self.ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        cache: Dims = ["batch_size", info.num_kv_heads, "past_sequence_length", info.head_dim]
        for i in range(info.num_layers):
            graph.input(f"past_key_values.{i}.key", ops.element, cache)
            graph.input(f"past_key_values.{i}.value", ops.element, cache)
        self.logits_start = graph.overridable("logits_start", int64(-1))
        self._lengths(mask)
        # The RoPE table goes before the layers' weights, since layers share it. Further tables follow with their layer.
        self._rotary(decoder.attention[0])
        # The 1 keeps GenAI from allocating logits for every position of a prompt. A caller that feeds `logits_start`
        # gets all positions that it asks for; ONNX Runtime only logs that the shape differs from the declaration.
        graph.output("logits", FLOAT, ["batch_size", 1, info.vocab_size])
        present: Dims = ["batch_size", info.num_kv_heads, "total_sequence_length", info.head_dim]
        for i in range(info.num_layers):
            graph.output(f"present.{i}.key", ops.element, present)
            graph.output(f"present.{i}.value", ops.element, present)

    def _lengths(self, mask: str) -> None:
        """Add the lengths that GroupQueryAttention takes, computed from the mask alone, as in GenAI's own graphs."""
        node, constant = self.graph.node, self.graph.constant
        counted = node("ReduceSum", [mask, constant("axis_1", int64(1))], "tokens_so_far", keepdims=0)
        last = node("Sub", [counted, constant("one", int64(1))], "last_position")
        self.seqlens_k = node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        total = node(
            "Gather", [node("Shape", [mask], "mask_shape"), constant("index_1", np.asarray(1, np.int64))], "total"
        )
        self.total = node("Cast", [total], "total_sequence_length_int32", to=TensorProto.INT32)

    def _rotary(self, part: Attention) -> tuple[str, str]:
        return self.ops.rotary(part.rope, self.info.context_length, self.info.head_dim)

    def build(self) -> None:
        """Add the whole decoder.

        If the next block starts with a norm, one operator adds the residual and norms the sum.
        """
        decoder, ops = self.decoder, self.ops
        x = self.ops.embedding(self.ids, decoder.embed.name, self._record("hidden.0"))
        first = decoder.blocks[0]
        normed = x if first.before is None else ops.norm(x, first.before, _input_name(first), first.layer)
        followers = [*decoder.blocks[1:], None]
        for block, follower in zip(decoder.blocks, followers, strict=True):
            y = self._part(block, normed)
            if block.after is not None:
                y = ops.norm(y, block.after, f"{y}.normed", block.layer)
            ends_layer = follower is None or follower.layer != block.layer
            total = self._record(f"hidden.{block.layer + 1}") if ends_layer else f"layers.{block.layer}.attn_sum"
            norm = decoder.norm if follower is None else follower.before
            if norm is None:
                x = normed = self.graph.node("Add", [x, y], total)
            elif follower is None:
                normed = ops.add_norm(x, y, norm, "final_norm", total, None)
            else:
                normed = ops.add_norm(x, y, norm, _input_name(follower), total, follower.layer)
            x = total
        self._head(normed, decoder.head)

    def _part(self, block: Block, normed: str) -> str:
        part, i = block.part, block.layer
        stem = f"layers.{i}"
        if isinstance(part, Attention):
            return self._attention(part, normed, i)
        if isinstance(part, Dense):
            gate_up = self.ops.linear(normed, [part.gate, part.up], f"{stem}.mlp.gate_up")
            activated = self.ops.silu_gate(gate_up, part.gate.rows, f"{stem}.mlp.product")
            return self.ops.linear(activated, [part.down], f"{stem}.mlp.down")
        return self._moe(part, normed, i)

    def _attention(self, part: Attention, normed: str, i: int) -> str:
        """Add grouped-query attention with RoPE and a KV cache, which may be updated in place."""
        graph, stem = self.graph, f"layers.{i}.attn"
        fused = self.ops.linear(normed, [part.q, part.k, part.v], f"{stem}.qkv")
        widths = int64(part.q.rows, part.k.rows, part.v.rows)
        q, k, v = (f"{stem}.{which}" for which in "qkv")
        graph.node("Split", [fused, graph.constant("qkv_split", widths)], [q, k, v], axis=-1)
        q, k = self._qk_norm(q, part.q_norm, part.q, i), self._qk_norm(k, part.k_norm, part.k, i)
        if part.clip is not None:
            q, k, v = (self.ops.clipped(name, part.clip, f"{name}.clipped") for name in (q, k, v))
        inputs = [
            q, k, v, f"past_key_values.{i}.key", f"past_key_values.{i}.value", self.seqlens_k, self.total,
            *self._rotary(part),
        ]  # fmt: skip
        outputs = [f"{stem}.out", f"present.{i}.key", f"present.{i}.value"]
        window = {} if part.window is None else {"local_window_size": part.window}
        mixed = graph.node(
            "GroupQueryAttention", inputs, outputs, MICROSOFT, num_heads=part.heads, kv_num_heads=part.kv_heads,
            do_rotary=1, **window,
        )  # fmt: skip
        return self.ops.linear(mixed, [part.o], f"{stem}.o")

    def _qk_norm(self, x: str, norm: Norm | None, matrix: Matrix, layer: int) -> str:
        """Add the norm of queries or keys [B, T, width], over each head or over all heads together."""
        if norm is None:
            return x
        if norm.size == matrix.rows:
            return self.ops.norm(x, norm, f"{x}_normed", layer)
        return self.ops.norm_heads(x, norm, matrix.rows, f"{x}_normed", layer)

    def _moe(self, part: MoE, normed: str, i: int) -> str:
        stem, name = f"layers.{i}", f"router_logits.{i}"
        self.debug_outputs.append((name, ["tokens", len(part.experts)]))
        moe = PortableMoE(self.ops)
        logits = moe.router(normed, part.router.name, len(part.experts), f"{stem}.router", name, i)
        return moe.experts(normed, logits, part, f"{stem}.moe", i)

    def _head(self, normed: str, matrix: Matrix) -> None:
        """Add the head: logits of the positions from `logits_start` on."""
        constant = self.graph.constant
        ends, axes = constant("slice_end", int64(_END)), constant("axis_1", int64(1))
        last = self.graph.node("Slice", [normed, self.logits_start, ends, axes], "head_input")
        if self.ops.compute == "float32":
            self.ops.linear(last, [matrix], "logits")
        else:
            low = self.ops.linear(last, [matrix], f"logits.{self.ops.compute}")
            self.ops.cast(low, "float32", "logits")

    def _record(self, name: str) -> str:
        """Make the debug graph return `name` in float32; return the name of the value in the activations' type."""
        self.debug_outputs.append((name, ["batch_size", "sequence_length", self.info.hidden_size]))
        if self.ops.compute == "float32":
            return name
        value = f"{name}.{self.ops.compute}"
        self.graph.debug_node("Cast", [value], name, to=FLOAT)
        return value


def _input_name(block: Block) -> str:
    """Return the name of a block's normed input."""
    kind = {Attention: "attn_in", Dense: "mlp_in", MoE: "moe_in"}[type(block.part)]
    return f"layers.{block.layer}.{kind}"
