"""Check of a config.json: every field that could change the arithmetic must be implemented, unused or known."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgelm.errors import UnsupportedConfigError
from edgelm.models import rope
from edgelm.models.config_fields import shortened
from edgelm.models.parts import FULL

# Fields without influence on the logits: metadata, training, storage, generation defaults, and fields that
# transformers 4 wrote into every config. Special token ids are resolved by the tokenizer, since published configs get
# them wrong. Dropout applies to training only. Code named by auto_map is never run: `architectures` counts.
IGNORED_FIELDS = frozenset(
    """
    architectures model_type _name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype use_cache
    initializer_range initializer_factor initializer_cutoff_factor init_std pad_token_id bos_token_id eos_token_id
    sep_token_id unk_token_id cls_token_id mask_token_id decoder_start_token_id tokenizer_class tokenizer_padding_side
    pad_token bos_token eos_token unk_token bad_words_ids auto_map custom_pipelines
    attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob mlp_dropout resid_dropout
    resid_pdrop embd_pdrop attn_pdrop classifier_dropout summary_first_dropout dropout
    output_attentions output_hidden_states output_router_logits tie_last_hidden_states return_dict torchscript
    return_dict_in_generate router_aux_loss_coef router_z_loss_coef router_jitter_noise z_loss ep_size aux_loss_alpha
    seq_aux loss_type neftune_noise_alpha label_smoothing keys_to_ignore_at_inference
    _attn_implementation_autoset _attn_implementation _attn_implementation_internal attn_implementation
    _experts_implementation experts_implementation _flash_attn_2_enabled use_flash_attention use_flash_attn
    use_flash_attention_2 chunk_size_feed_forward problem_type id2label label2id num_labels
    finetuning_task task_specific_params prefix use_bfloat16 tf_legacy_loss gradient_checkpointing
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size num_return_sequences output_scores forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    pretraining_tp is_decoder is_llama_config transformers.js_config unsloth_version unsloth_fixed
    max_sequence_length max_seq_len seq_length model_max_length original_max_position_embeddings
    base_model_tp_plan base_model_pp_plan base_model_fsdp_plan base_model_ep_plan
    """.split()  # noqa: SIM905 - names read better as prose
)

_OFF = (False, None)
_NONE = (None, 0, False)

# Fields that change the arithmetic or the kind of model: their meaning, and the values that mean "not used".
UNUSED: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "hidden_act": ("another activation", ("silu", "swish", None)),
    "activation_function": ("another activation", ("silu", "swish", None)),
    "attention_bias": ("biases in attention", _OFF),
    "qkv_bias": ("biases in attention", _OFF),
    "mlp_bias": ("biases in the feed-forward block", _OFF),
    "bias": ("biases", _OFF),
    "use_bias": ("biases", _OFF),
    "sliding_window": ("attention to the last positions only", _NONE),
    "use_sliding_window": ("attention to the last positions only", _OFF),
    "attention_chunk_size": ("attention within chunks only", _NONE),
    "partial_rotary_factor": ("RoPE on a part of each head", (1, None)),
    "rotary_pct": ("RoPE on a part of each head", (1, None)),
    "rope_interleaved": ("RoPE on neighbouring pairs", _OFF),
    "rope_local_base_freq": ("two RoPE bases", (None,)),
    "use_mrope": ("RoPE over several axes", _OFF),
    "no_rope_layers": ("layers without RoPE", (None, [])),
    "no_rope_layer_interval": ("layers without RoPE", _NONE),
    "pruned_heads": ("heads left out", ({}, None)),
    "is_encoder_decoder": ("an encoder", _OFF),
    "is_causal": ("attention to later positions", (True, None)),
    "use_bidirectional_attention": ("attention to later positions", _OFF),
    "add_cross_attention": ("an encoder", _OFF),
    "cross_attention_hidden_size": ("an encoder", (None,)),
    "tie_encoder_decoder": ("an encoder", _OFF),
    "num_local_experts": ("experts", _NONE),
    "num_experts": ("experts", _NONE),
    "n_routed_experts": ("experts", _NONE),
    "num_experts_per_tok": ("experts", _NONE),
    "n_shared_experts": ("experts that every token uses", _NONE),
    "num_nextn_predict_layers": ("layers that predict further tokens", _NONE),
    "clip_qkv": ("queries, keys and values that are clipped", (None,)),
    "qk_layernorm": ("norms of queries and keys", _OFF),
    "use_qk_norm": ("norms of queries and keys", _OFF),
    "qk_norm": ("norms of queries and keys", _OFF),
    "attn_logit_softcapping": ("attention scores that are capped", (None,)),
    "final_logit_softcapping": ("logits that are capped", (None,)),
    "embedding_multiplier": ("a scaled embedding", (1, None)),
    "residual_multiplier": ("a scaled residual stream", (1, None)),
    "logits_scaling": ("scaled logits", (1, None)),
    "logit_scale": ("scaled logits", (1, None)),
    "per_layer_config": ("layers of different configurations", ({}, None)),
    "quantization": ("weights quantised by MLX: start from the float checkpoint", (None,)),
}

QUANTISED_FORMATS = ("edgelm", "gptq", "awq", "compressed-tensors", "fp8")
"""Formats of quantised weights that `edgelm.quant.WeightSource` reads, which checks them further."""


def not_implemented(config: Mapping[str, Any], read: Collection[str]) -> dict[str, str]:
    """Return the fields of a config.json that may change the arithmetic and are not implemented.

    Args:
        config: contents of config.json.
        read: the fields that the model reads.

    Returns:
        For each field, a text with its name, value and meaning.
    """
    found: dict[str, str] = {}
    of_rope = rope.problems(config)
    for key, value in config.items():
        if key in rope.FIELDS:
            if key in of_rope:
                found[key] = of_rope[key]
        elif key == "quantization_config":
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            if method not in (None, *QUANTISED_FORMATS):
                found[key] = (
                    f"quantization_config.quant_method {shortened(method)} (read are {', '.join(QUANTISED_FORMATS)}: "
                    "start from the float checkpoint)"
                )
        elif key == "layer_types" and key not in read:
            if value is not None and not (isinstance(value, list) and all(kind == FULL for kind in value)):
                kinds = sorted({str(kind) for kind in value} - {FULL}) if isinstance(value, list) else [str(value)]
                found[key] = f"layer_types {shortened(', '.join(kinds))} (layers other than {FULL})"
        elif key in read or key in IGNORED_FIELDS or value is None:
            continue
        elif key not in UNUSED:
            found[key] = f"{shortened(key)[1:-1]} {shortened(value)} (unknown; if it changes nothing, remove it)"
        elif not _is_unused(key, value, config):
            found[key] = f"{key} {shortened(value)} ({UNUSED[key][0]})"
    return found


def _is_unused(key: str, value: object, config: Mapping[str, Any]) -> bool:
    if any(type(value) in (type(unused), int, float) and value == unused for unused in UNUSED[key][1]):
        return True
    if key == "num_local_experts":
        return value == config.get("num_experts")
    if key == "sliding_window":
        positions = config.get("max_position_embeddings")
        wide = isinstance(value, int) and isinstance(positions, int) and value >= positions
        return wide or config.get("use_sliding_window") is False
    return False


def check_fields(config: Mapping[str, Any], model: str, read: Collection[str]) -> None:
    """Check that every field of a config.json is read by the model, harmless, or set to a value that means "not used".

    Args:
        config: contents of config.json.
        model: the model's name, for errors.
        read: the fields that the model reads.

    Raises:
        UnsupportedConfigError: lists every other field, with its value and meaning.
    """
    found = not_implemented(config, read)
    if found:
        raise UnsupportedConfigError(
            f"config.json: {'; '.join(found.values())}: not implemented for {model}, and may change what it computes"
        )
