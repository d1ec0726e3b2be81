"""Write genai_config.json, with which ONNX Runtime GenAI (C, C++, C#, Java, Python) runs a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.bundle import ModelInfo, TokenIds

# GenAI's model types stand for sets of inputs; this type has exactly those of a portable graph.
_TYPE = "llama"
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(
    info: ModelInfo,
    tokens: TokenIds,
    graph_file: str,
    generation_config: Mapping[str, Any],
    session: tuple[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Return the contents of genai_config.json.

    Args:
        info: Shapes of the model.
        tokens: Special token ids.
        graph_file: Name of the graph's file.
        generation_config: The checkpoint's generation_config.json, for the sampling defaults.
        session: Name and options of the execution provider; None for the CPU's.
    """
    providers = [] if session is None else [{session[0]: dict(session[1])}]
    search: dict[str, Any] = {"max_length": info.context_length, "min_length": 0, "past_present_share_buffer": True}
    search |= {key: generation_config[key] for key in _SEARCH if generation_config.get(key) is not None}
    eos = list(tokens.eos_ids)
    first_eos = eos[0] if eos else 0
    return {
        "model": {
            "bos_token_id": first_eos if tokens.bos_id is None else tokens.bos_id,
            "eos_token_id": first_eos if len(eos) == 1 else eos,
            "pad_token_id": first_eos if tokens.pad_id is None else tokens.pad_id,
            "context_length": info.context_length,
            "type": _TYPE,
            "vocab_size": info.vocab_size,
            "decoder": {
                # Level 3 (errors): at level 2 ONNX Runtime warns at every load that `logits_start` has a default.
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "log_severity_level": 3,
                    "provider_options": providers,
                },
                "filename": graph_file,
                "head_size": info.head_dim,
                "hidden_size": info.hidden_size,
                "num_attention_heads": info.num_heads,
                "num_key_value_heads": info.num_kv_heads,
                "num_hidden_layers": info.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": search,
    }
