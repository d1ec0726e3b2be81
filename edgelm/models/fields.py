"""Reading a config.json so that no field which changes the arithmetic goes unnoticed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgelm.errors import CheckpointError, UnsupportedConfigError

# Fields without influence on the logits: bookkeeping, training, storage, generation defaults, and what transformers 4
# wrote into every config. Token ids are read by the tokenizer, which knows better (published configs get them wrong).
HARMLESS = frozenset(
    """
    architectures model_type _name_or_path transformers_version torch_dtype dtype use_cache initializer_range
    pad_token_id bos_token_id eos_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    attention_dropout output_attentions output_hidden_states output_router_logits return_dict torchscript
    return_dict_in_generate router_aux_loss_coef router_z_loss_coef _attn_implementation_autoset
    _attn_implementation attn_implementation chunk_size_feed_forward problem_type id2label label2id
    finetuning_task task_specific_params prefix use_bfloat16 tf_legacy_loss gradient_checkpointing
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_version unsloth_fixed
    """.split()  # noqa: SIM905 - sixty names read better as prose
)

# Fields that do change the arithmetic (or the kind of model), with the values that mean "not used".
UNUSED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "num_local_experts": (None,),
}

QUANTISED_BY = ("edgelm", "gptq", "awq", "compressed-tensors", "fp8")
"""Formats of quantised weights that `edgelm.quant.WeightSource` reads; it knows them closer."""

_ROPE_TYPE_KEYS = ("rope_type", "type")


def _refuse(field: str, value: object, accepted: str) -> UnsupportedConfigError:
    return UnsupportedConfigError(
        f"config.json: {field} is {value!r}, which changes the arithmetic and is not implemented; "
        f"EdgeLM accepts {accepted}"
    )


def check_fields(config: Mapping[str, Any], model: str, read: Collection[str]) -> None:
    """Check that every key of `config` is one of `read` (the fields the model reads), harmless, or set to "not used".

    Raises:
        UnsupportedConfigError: naming the first field that is neither.
    """
    for key, value in config.items():
        if key in read or key in HARMLESS or key in ("rope_theta", "rope_scaling", "rope_parameters"):
            continue
        if key == "quantization_config":
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            if method not in (None, *QUANTISED_BY):
                raise _refuse("quantization_config.quant_method", method, ", ".join(QUANTISED_BY))
        elif key in UNUSED:
            if value not in UNUSED[key]:
                raise _refuse(key, value, " or ".join(map(repr, UNUSED[key])))
        else:
            raise UnsupportedConfigError(
                f"config.json: unknown field {key!r} (value {value!r}) for {model}: it may change the arithmetic; "
                "remove it from config.json if you know that it does not"
            )


def read_rope_theta(config: Mapping[str, Any], default: float = 10000.0) -> float:
    """Base of the rotary frequencies from `rope_theta` or transformers 5's `rope_parameters`; plain RoPE only.

    Raises:
        UnsupportedConfigError: for any scaling, or when the two fields contradict each other.
    """
    thetas: dict[str, float] = {}
    if config.get("rope_theta") is not None:
        thetas["rope_theta"] = positive_float(config, "rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise _refuse(field, rope, "null")
        for key, value in rope.items():
            if key in _ROPE_TYPE_KEYS and value == "default":
                continue
            if key == "rope_theta":
                thetas[f"{field}.rope_theta"] = positive_float(rope, "rope_theta")
            elif not (key == "partial_rotary_factor" and value == 1):
                raise _refuse(f"{field}.{key}", value, "plain RoPE: null or rope_type 'default'")
    if len(set(thetas.values())) > 1:
        raise UnsupportedConfigError(f"config.json gives several RoPE bases: {thetas}; keep one")
    return next(iter(thetas.values()), default)


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
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {field} is {value!r}; expected a whole number above zero")
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {field} is {value!r}; expected a number above zero")
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
        raise CheckpointError(f"config.json: {field} is {value!r}; expected true or false")
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
