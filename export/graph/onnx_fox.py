"""Fox-1's graph: a dense pre-norm decoder with grouped-query attention, SwiGLU and a tied 256K vocabulary."""

from __future__ import annotations

from edgelm.bundle import ModelInfo
from edgelm.export.graph.onnx_builder import int64
from edgelm.export.graph.operators import OperatorDecoder
from edgelm.export.graph.portable import PortableOps
from edgelm.export.graph.portable_inputs import DecoderFrame
from edgelm.models.fox import FoxConfig


def build_native(model: OperatorDecoder, config: FoxConfig) -> None:
    """Add the whole model in native operators."""
    del config
    x = model.embedding("model.embed_tokens.weight")
    for i in range(model.info.num_layers):
        key, stem = f"model.layers.{i}", f"layers.{i}"
        qkv = [f"{key}.self_attn.{p}_proj.weight" for p in "qkv"]
        fused = model.linear(x, qkv, f"{stem}.attn.qkv", i, norm=f"{key}.input_layernorm.weight")
        out = model.attention(fused, f"{stem}.attn.out", i)
        x = model.linear(out, [f"{key}.self_attn.o_proj.weight"], f"{stem}.attn_sum", i, residual=x)
        names = [f"{key}.mlp.gate_proj.weight", f"{key}.mlp.up_proj.weight"]
        norm = f"{key}.post_attention_layernorm.weight"
        product = model.linear(x, names, f"{stem}.mlp.gate_up", i, norm=norm, swiglu=True)
        x = model.linear(product, [f"{key}.mlp.down_proj.weight"], model.hidden(i + 1), i, residual=x)
    model.head(x, "model.norm.weight")


def build_portable(ops: PortableOps, info: ModelInfo, config: FoxConfig) -> DecoderFrame:
    """Add the whole model in portable operators to the graph of `ops`."""
    frame = DecoderFrame(ops, info, config.rope_theta)
    graph, eps = frame.graph, config.rms_norm_eps
    widths = int64(info.num_heads * info.head_dim, *[info.num_kv_heads * info.head_dim] * 2)
    x = frame.embedding("model.embed_tokens.weight")
    normed = ops.norm(x, "model.layers.0.input_layernorm.weight", "layers.0.attn_in", 0, eps)
    for i in range(info.num_layers):
        key, stem = f"model.layers.{i}", f"layers.{i}"
        qkv = ops.linear(normed, [f"{key}.self_attn.{p}_proj.weight" for p in "qkv"], f"{stem}.attn.qkv", i)
        q, k, v = (f"{stem}.attn.{p}" for p in "qkv")
        graph.node("Split", [qkv, graph.constant("qkv_split", widths)], [q, k, v], axis=-1)
        out = frame.attention((q, k, v), i, f"{stem}.attn.out")
        attended = ops.linear(out, [f"{key}.self_attn.o_proj.weight"], f"{stem}.attn.o", i)
        normed = ops.add_norm(
            x, attended, f"{key}.post_attention_layernorm.weight", f"{stem}.mlp_in", f"{stem}.attn_sum", i, eps
        )
        names = [f"{key}.mlp.gate_proj.weight", f"{key}.mlp.up_proj.weight"]
        gate_up = ops.linear(normed, names, f"{stem}.mlp.gate_up", i)
        product = ops.silu_gate(gate_up, config.intermediate_size, f"{stem}.mlp.product")
        down = ops.linear(product, [f"{key}.mlp.down_proj.weight"], f"{stem}.mlp.down", i)
        x = frame.record_hidden(i + 1)
        last = i + 1 == info.num_layers
        weight = "model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"
        out = "final_norm" if last else f"layers.{i + 1}.attn_in"
        normed = ops.add_norm(f"{stem}.attn_sum", down, weight, out, x, None if last else i + 1, eps)
    frame.head(normed, "model.embed_tokens.weight" if info.tied else "lm_head.weight")
    return frame
