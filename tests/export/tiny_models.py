"""Configurations of every model, small enough to export quickly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgelm.runtimes.onnxruntime.native_library import library_path

OPERATOR_SETS = ("native", "portable") if library_path() is not None else ("portable",)
"""The operators that bundles can be run with here."""

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
FOX = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
WIDE_HEADS = {**FOX, "head_dim": 64, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 64, "tie_word_embeddings": False}
CONFIGS = {
    "olmoe": OLMOE,
    "fox": FOX,
    "llama3": {
        **FOX,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {**FOX, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "mixtral": {
        **FOX, **EXPERTS, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
    },
    "qwen2": {**FOX, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {**WIDE_HEADS, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": {
        **WIDE_HEADS, **EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_experts": 8, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
    "olmo2": {**FOX, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "num_key_value_heads": 4},
}  # fmt: skip
LATER = tuple(CONFIGS)[2:]
"""The models that came after the first two."""

MakeCheckpoint = Callable[..., Path]
