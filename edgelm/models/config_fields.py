"""Reading a config.json so that no field which changes the arithmetic goes unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgelm.errors import CheckpointError, UnsupportedConfigError

# Fields without influence on the logits: bookkeeping, training, storage, generation defaults, and what transformers 4
# wrote into every config. Token ids are read by the tokenizer, which knows better (published configs get them wrong).
# Dropout does nothing once training is over. Classes named by auto_map are not run: `architectures` counts.
HARMLESS = frozenset(
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

# Fields that do change the arithmetic (or the kind of model): what they mean, and the values that mean "not used".
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

QUANTISED_BY = ("edgelm", "gptq", "awq", "compressed-tensors", "fp8")
"""Formats of quantised weights that `edgelm.quant.WeightSource` reads; it knows them closer."""

_FULL = "full_attention"
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# Of a table of RoPE that change nothing while its type is plain.
_ROPE_UNUSED = ("original_max_position_embeddings", "max_position_embeddings", "rope_theta")
_ROPE_KINDS = {
    "llama3": "RoPE scaling for long contexts",
    "linear": "RoPE scaling for long contexts",
    "dynamic": "RoPE scaling for long contexts",
    "ntk": "RoPE scaling for long contexts",
    "yarn": "RoPE scaling for long contexts",
    "longrope": "RoPE scaling for long contexts",
    "su": "RoPE scaling for long contexts",
    "mrope": "RoPE over several axes",
    "proportional": "RoPE on a part of each head",
}

# Positions and their multiples are float32 numbers, which are whole up to here.
MAX_POSITIONS = 1 << 24
MAX_COUNT = (1 << 31) - 1
MIN_FLOAT, MAX_FLOAT = 1.1754944e-38, 3.4028234e38  # what float32 holds with all its digits


def shortened(value: object) -> str:
    """A value for an error message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def not_implemented(config: Mapping[str, Any], read: Collection[str]) -> dict[str, str]:
    """Every field of `config` that may change the arithmetic and is not implemented: its name, value and meaning.

    Args:
        config: config.json.
        read: the fields that the model reads.
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if key in _ROPE_FIELDS:
            problems = _rope_problems(key, value)
            if problems:
                found[key] = "; ".join(problems)
        elif key == "quantization_config":
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            if method not in (None, *QUANTISED_BY):
                found[key] = (
                    f"quantization_config.quant_method {shortened(method)} (read are {', '.join(QUANTISED_BY)}: start "
                    "from the float checkpoint)"
                )
        elif key == "layer_types":
            if value is not None and not (isinstance(value, list) and all(kind == _FULL for kind in value)):
                kinds = sorted({str(kind) for kind in value} - {_FULL}) if isinstance(value, list) else [str(value)]
                found[key] = f"layer_types {shortened(', '.join(kinds))} (layers other than {_FULL})"
        elif key in read or key in HARMLESS or value is None:
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


def _rope_problems(field: str, rope: object) -> list[str]:
    if rope is None or field == "rope_theta":
        return []
    if not isinstance(rope, Mapping):
        return [f"{field} {shortened(rope)} (no table of RoPE)"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    plain = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
    if not plain:
        meaning = _ROPE_KINDS.get(kind, "unknown") if isinstance(kind, str) else "unknown"
        factor = f", factor {shortened(rope['factor'])}" if "factor" in rope else ""
        return [f"{field}.rope_type {kind if isinstance(kind, str) else shortened(kind)} ({meaning}{factor})"]
    found = []
    for key, value in rope.items():
        if key in ("rope_type", "type", *_ROPE_UNUSED) or value is None:
            continue
        if not (key in ("partial_rotary_factor", "factor", "attention_factor") and value == 1):
            found.append(f"{field}.{key} {shortened(value)} (RoPE other than plain)")
    return found


def check_fields(config: Mapping[str, Any], model: str, read: Collection[str]) -> None:
    """Check that every key of `config` is one of `read` (the fields the model reads), harmless, or set to "not used".

    Raises:
        UnsupportedConfigError: naming every field that is neither, with its value and what it means.
    """
    found = not_implemented(config, read)
    if found:
        raise UnsupportedConfigError(
            f"config.json: {'; '.join(found.values())}: not implemented for {model}, and may change what it computes"
        )


def read_rope_theta(config: Mapping[str, Any], default: float = 10000.0) -> float:
    """Base of the rotary frequencies from `rope_theta` or transformers 5's `rope_parameters`; plain RoPE only.

    Raises:
        UnsupportedConfigError: for any scaling, or when the two fields contradict each other.
        CheckpointError: it is no number above zero.
    """
    found = [problem for field in _ROPE_FIELDS for problem in _rope_problems(field, config.get(field))]
    if found:
        raise UnsupportedConfigError(f"config.json: {'; '.join(found)}: not implemented")
    thetas: dict[str, float] = {}
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = positive_float(config, "rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is not None and rope.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = positive_float(rope, "rope_theta")
    if len(set(thetas.values())) > 1:
        raise UnsupportedConfigError(f"config.json gives several RoPE bases: {thetas}; keep one")
    return next(iter(thetas.values()), default)


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of a head: `head_dim`, or the hidden size shared between the heads.

    Raises:
        CheckpointError: a field is missing or impossible.
    """
    heads, hidden = positive_int(config, "num_attention_heads"), positive_int(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
    return positive_int(config, "head_dim", hidden // heads)


def positive_int(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """Read a whole number > 0; null counts as absent.

    Raises:
        CheckpointError: the field is absent and has no default, or is not a whole number above zero.
    """
    value = config.get(field)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json: {field} is missing")
        return default
    limit = MAX_POSITIONS if field == "max_position_embeddings" else MAX_COUNT
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; expected a whole number above zero")
    if value > limit:
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; at most {limit} is possible")
    return value


def positive_float(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """Read a number > 0; null counts as absent.

    Raises:
        CheckpointError: the field is absent and has no default, or is not a number above zero.
    """
    value = config.get(field)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json: {field} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_FLOAT <= value <= MAX_FLOAT:
        raise CheckpointError(
            f"config.json: {field} is {shortened(value)}; expected a number above zero that float32 can hold"
        )
    return float(value)


def boolean(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """Read true or false; null counts as absent.

    Raises:
        CheckpointError: the field is something else.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} is {shortened(value)}; expected true or false")
    return value


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Check what attention needs of its numbers.

    Raises:
        CheckpointError: KV heads do not divide the heads, or the head width is odd (RoPE turns pairs).
    """
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"config.json: the head width is {head_dim}; RoPE needs an even one")
