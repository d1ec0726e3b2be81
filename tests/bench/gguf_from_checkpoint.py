"""A checkpoint as llama.cpp reads it: a bfloat16 GGUF through the `gguf` package, then llama.cpp's own quantiser.

Its tokenizer is left out ("none"): the benchmark feeds token ids. Runs in the peer's environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from edgelm.checkpoint import Checkpoint

FILE_TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _parameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or 1e-5)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's "llama" rotates neighbouring pairs, so rotate-half heads are stored with their halves interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    """(GGUF name, shape, checkpoint tensors stacked in it), in an order that streams."""
    config = checkpoint.config
    yield "token_embd.weight", checkpoint.shape("model.embed_tokens.weight"), ["model.embed_tokens.weight"]
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in _LAYER_NAMES.items():
            name = f"model.layers.{i}.{theirs}.weight"
            if name in checkpoint.tensors:
                yield f"blk.{i}.{ours}.weight", checkpoint.shape(name), [name]
        for part in ("gate", "up", "down") if "num_experts" in config else ():
            names = [f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            yield f"blk.{i}.ffn_{part}_exps.weight", (len(names), *checkpoint.shape(names[0])), names
    yield "output_norm.weight", checkpoint.shape("model.norm.weight"), ["model.norm.weight"]
    if "lm_head.weight" in checkpoint.tensors:
        yield "output.weight", checkpoint.shape("lm_head.weight"), ["lm_head.weight"]


def _values(checkpoint: Checkpoint, name: str, names: list[str], as_float: bool) -> np.ndarray:
    if as_float:
        return checkpoint.read_float32(names[0])
    values = np.stack([checkpoint.read_raw(n) for n in names]) if len(names) > 1 else checkpoint.read_raw(names[0])
    config = checkpoint.config
    if "num_experts" not in config and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config["num_attention_heads" if name.endswith("attn_q.weight") else "num_key_value_heads"]
        values = _interleaved(values, heads)
    return values


def write_gguf(folder: Path, out: Path, file_type: str) -> None:
    """Write `out`, quantised to "Q4_0" or "Q8_0" as llama.cpp does by itself (head at Q6_K under Q4_0)."""
    whole = out.with_suffix(".bf16.gguf")
    with Checkpoint.open(folder) as checkpoint:
        architecture = "olmoe" if "num_experts" in checkpoint.config else "llama"
        writer = gguf.GGUFWriter(str(whole), architecture)
        _parameters(writer, checkpoint.config)
        for name, shape, _ in _tensors(checkpoint):
            # llama.cpp adds norms and routes in float32: it wants those tensors so.
            as_float = len(shape) == 1 or "gate_inp" in name
            count = int(np.prod(shape))
            kind = gguf.GGMLQuantizationType.F32 if as_float else gguf.GGMLQuantizationType.BF16
            dtype = np.dtype(np.float32) if as_float else np.dtype(np.uint16)
            writer.add_tensor_info(name, shape, dtype, count * dtype.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, names in _tensors(checkpoint):
            writer.write_tensor_data(_values(checkpoint, name, names, len(shape) == 1 or "gate_inp" in name))
        writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type]
    code = llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), parameters)
    whole.unlink()
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {whole} (code {code})")


def bytes_per_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads: of a mixture's experts those used, of tables the head."""
    reader = gguf.GGUFReader(path)
    fields = {field.split(".", 1)[1]: int(reader.fields[field].contents())
              for field in reader.fields if field.endswith(("expert_count", "expert_used_count"))}  # fmt: skip
    used = fields.get("expert_used_count", 1) / fields.get("expert_count", 1)
    names = {tensor.name for tensor in reader.tensors}
    total = 0.0
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue
        total += tensor.n_bytes * (used if "_exps" in tensor.name else 1)
    return round(total)
