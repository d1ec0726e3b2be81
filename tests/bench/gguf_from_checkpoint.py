"""Convert a checkpoint to GGUF for llama.cpp: write a float GGUF, quantise it with llama.cpp, and read it back.

The tokenizer is omitted ("none"), since the benchmarks use token ids. Only llama.cpp's server needs one: it gets a
vocabulary of made-up words, one for each token. Runs in the environment of llama.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from edgelm.checkpoint import Checkpoint

FLOAT_TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, np.dtype(np.float32)),
    # NumPy has no bfloat16: write its bits.
    "BF16": (gguf.GGMLQuantizationType.BF16, np.dtype(np.uint16)),
}
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


def _words(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Add a SentencePiece vocabulary in which token N is the word " wN"; the bytes follow as its first words."""
    size, end = config["vocab_size"], config["eos_token_id"]
    # llama.cpp looks for the bytes' names, for example to find the line break.
    words = [f"<0x{i - 3:02X}>" if 3 <= i < 259 else f"\u2581w{i}" for i in range(size)]
    kinds = [gguf.TokenType.NORMAL] * size
    for token in end if isinstance(end, list) else [end]:
        kinds[token] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
    writer.add_add_bos_token(False)


def _parameters(writer: gguf.GGUFWriter, config: dict[str, Any], words: bool) -> None:
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
    if words:
        _words(writer, config)
    else:
        writer.add_tokenizer_model("none")
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head: llama.cpp's "llama" rotates neighbouring pairs instead of halves."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    """Yield (GGUF name, shape, checkpoint tensors stacked in it), in the order of writing."""
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


def _rotated(config: Mapping[str, Any], name: str) -> int:
    """Return the number of heads of a tensor whose rows llama.cpp reorders; 0 for other tensors."""
    if "num_experts" in config or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return 0
    heads: int = config["num_attention_heads" if name.endswith("attn_q.weight") else "num_key_value_heads"]
    return heads


def _values(checkpoint: Checkpoint, name: str, names: list[str], as_float: bool) -> np.ndarray:
    read = checkpoint.read_float32 if as_float else checkpoint.read_raw
    values = np.stack([read(n) for n in names]) if len(names) > 1 else read(names[0])
    heads = _rotated(checkpoint.config, name)
    return _interleaved(values, heads) if heads else values


def write_float(folder: Path, out: Path, kind: str, *, words: bool = False) -> None:
    """Write `out` with the weights in "F32" or "BF16"; the latter needs a checkpoint of that type.

    With `words` the file has a vocabulary of made-up words.
    """
    with Checkpoint.open(folder) as checkpoint:
        writer = gguf.GGUFWriter(str(out), "olmoe" if "num_experts" in checkpoint.config else "llama")
        _parameters(writer, checkpoint.config, words)
        # llama.cpp expects norms and routers in float32.
        kinds = {
            name: "F32" if len(shape) == 1 or "gate_inp" in name else kind for name, shape, _ in _tensors(checkpoint)
        }
        for name, shape, _ in _tensors(checkpoint):
            raw, dtype = FLOAT_TYPES[kinds[name]]
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, names in _tensors(checkpoint):
            writer.write_tensor_data(_values(checkpoint, name, names, kinds[name] == "F32"))
        writer.close()


def quantize(whole: Path, out: Path, file_type: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantise a float GGUF to "Q4_0", "Q4_K_M", ... with the types that llama.cpp chooses for each tensor.

    Args:
        importance: mean square of each input of a matrix, float32 [columns] or [experts, columns] under the tensor's
            GGUF name: llama.cpp's importance matrix.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    parameters.nthread = 1
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    # An entry without a name ends the list.
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if kept:
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    code = llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), parameters)
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {whole} (code {code})")


def write_gguf(folder: Path, out: Path, file_type: str, *, words: bool = False) -> None:
    """Write `out`, quantised to "Q4_0" or "Q8_0" with llama.cpp's own choice of types (for Q4_0 the head is Q6_K).

    With `words` the file has a vocabulary of made-up words, which llama.cpp's server needs.
    """
    whole = out.with_suffix(".bf16.gguf")
    write_float(folder, whole, "BF16", words=words)
    quantize(whole, out, file_type)
    whole.unlink()


def importance_of(folder: Path, squares: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert mean squares by checkpoint names to the form of llama.cpp's tool: matrices of layers, experts stacked.

    An expert without tokens has no entry in `squares`; it gets ones, as in that tool.
    """
    found = {}
    with Checkpoint.open(folder) as checkpoint:
        for name, shape, names in _tensors(checkpoint):
            if name.startswith("blk.") and len(shape) > 1 and "gate_inp" not in name:
                rows = [squares.get(n, np.ones(shape[-1], np.float32)) for n in names]
                found[name] = np.stack(rows) if len(rows) > 1 else rows[0]
    return found


def dequantized(folder: Path, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of a GGUF made from the checkpoint `folder` in float32, with the GGUF's names and order."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with Checkpoint.open(folder) as checkpoint:
        for name, shape, names in _tensors(checkpoint):
            values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(shape)
            heads = _rotated(checkpoint.config, name)
            if heads:
                values = values.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
            yield from zip(names, values if len(names) > 1 else [values], strict=True)


def stored_types(path: Path) -> dict[str, dict[str, int]]:
    """Return the numbers of tensors, weights and bytes of a GGUF by type."""
    found: dict[str, dict[str, int]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        entry = found.setdefault(tensor.tensor_type.name, {"tensors": 0, "weights": 0, "bytes": 0})
        for key, value in (("tensors", 1), ("weights", int(tensor.n_elements)), ("bytes", int(tensor.n_bytes))):
            entry[key] += value
    return found


def bytes_per_token(path: Path) -> int:
    """Return the bytes of weights read per decoded token. They exclude inactive experts and the embedding."""
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
