"""OLMoE's graph: pre-norm blocks of attention with QK-norm over the whole width, and an unrenormalised mixture."""

from __future__ import annotations

from edgelm.bundle import ModelInfo
from edgelm.export.graph.onnx_builder import int64
from edgelm.export.graph.operators import OperatorDecoder
from edgelm.export.graph.portable import PortableOps, RouterSpec
from edgelm.export.graph.portable_inputs import DecoderFrame
from edgelm.models.olmoe import OlmoeConfig


def build_native(model: OperatorDecoder, config: OlmoeConfig) -> None:
    """Add the whole model in native operators."""
    x = model.embedding("model.embed_tokens.weight")
    for i in range(model.info.num_layers):
        key, stem = f"model.layers.{i}", f"layers.{i}"
        qkv = [f"{key}.self_attn.{p}_proj.weight" for p in "qkv"]
        fused = model.linear(x, qkv, f"{stem}.attn.qkv", i, norm=f"{key}.input_layernorm.weight")
        norms = {f"{p}_norm": f"{key}.self_attn.{p}_norm.weight" for p in "qk"}
        out = model.attention(fused, f"{stem}.attn.out", i, clip=config.clip_qkv, **norms)
        x = model.linear(out, [f"{key}.self_attn.o_proj.weight"], f"{stem}.attn_sum", i, residual=x)
        norm = f"{key}.post_attention_layernorm.weight"
        router, experts = f"{key}.mlp.gate.weight", _experts(config, i)
        x = model.mixture(x, router, experts, model.hidden(i + 1), i, norm=norm)
    model.head(x, "model.norm.weight")


def _experts(config: OlmoeConfig, layer: int) -> list[tuple[str, str, str]]:
    """Each expert's gate, up and down."""
    stems = [f"model.layers.{layer}.mlp.experts.{e}" for e in range(config.num_experts)]
    return [(f"{s}.gate_proj.weight", f"{s}.up_proj.weight", f"{s}.down_proj.weight") for s in stems]


def build_portable(ops: PortableOps, info: ModelInfo, config: OlmoeConfig) -> DecoderFrame:
    """Add the whole model in portable operators to the graph of `ops`."""
    frame = DecoderFrame(ops, info, config.rope_theta)
    eps = config.rms_norm_eps
    x = frame.embedding("model.embed_tokens.weight")
    normed = ops.norm(x, "model.layers.0.input_layernorm.weight", "layers.0.attn_in", 0, eps)
    for i in range(info.num_layers):
        key, stem = f"model.layers.{i}", f"layers.{i}"
        attended = _attention(frame, config, normed, i)
        normed = ops.add_norm(
            x, attended, f"{key}.post_attention_layernorm.weight", f"{stem}.moe_in", f"{stem}.attn_sum", i, eps
        )
        mixed = _mixture(frame, config, normed, i)
        x = frame.record_hidden(i + 1)
        last = i + 1 == info.num_layers
        weight = "model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"
        out = "final_norm" if last else f"layers.{i + 1}.attn_in"
        normed = ops.add_norm(f"{stem}.attn_sum", mixed, weight, out, x, None if last else i + 1, eps)
    frame.head(normed, "model.embed_tokens.weight" if info.tied else "lm_head.weight")
    return frame


def _attention(frame: DecoderFrame, config: OlmoeConfig, normed: str, i: int) -> str:
    ops, graph, info = frame.ops, frame.graph, frame.info
    key, stem = f"model.layers.{i}.self_attn", f"layers.{i}.attn"
    fused = ops.linear(normed, [f"{key}.{p}_proj.weight" for p in "qkv"], f"{stem}.qkv", i)
    widths = int64(info.num_heads * info.head_dim, *[info.num_kv_heads * info.head_dim] * 2)
    names = [f"{stem}.{p}" for p in "qkv"]
    graph.node("Split", [fused, graph.constant("qkv_split", widths)], names, axis=-1)
    q = ops.norm(names[0], f"{key}.q_norm.weight", f"{stem}.q_normed", i, config.rms_norm_eps)
    k = ops.norm(names[1], f"{key}.k_norm.weight", f"{stem}.k_normed", i, config.rms_norm_eps)
    q, k, v = (_clipped(frame, config, name) for name in (q, k, names[2]))
    out = frame.attention((q, k, v), i, f"{stem}.out")
    return ops.linear(out, [f"{key}.o_proj.weight"], f"{stem}.o", i)


def _clipped(frame: DecoderFrame, config: OlmoeConfig, name: str) -> str:
    return name if config.clip_qkv is None else frame.ops.clipped(name, config.clip_qkv, f"{name}.clipped")


def _mixture(frame: DecoderFrame, config: OlmoeConfig, normed: str, i: int) -> str:
    ops, key, stem = frame.ops, f"model.layers.{i}.mlp", f"layers.{i}"
    experts = config.num_experts
    logits = ops.router(normed, f"{key}.gate.weight", experts, f"{stem}.router", frame.record_router(i), i)
    spec = RouterSpec(experts, config.num_experts_per_tok, config.norm_topk_prob)
    return ops.experts(normed, logits, _experts(config, i), spec, f"{stem}.moe", i)
