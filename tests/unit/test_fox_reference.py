"""Does our Fox compute what transformers' Llama computes, and does it refuse what it cannot compute?"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM
from transformers_oracle import TOLERANCE, Comparison, check_cached_decoding, check_hidden_states, compare, relative

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import family
from edgelm.models.fox import Fox, FoxConfig, layer_from_disk, tensor_shapes

# config.json of tensoropera/Fox-1-1.6B.
PUBLISHED: dict[str, Any] = {
    "_name_or_path": "fox",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.1",
    "use_cache": True,
    "vocab_size": 256000,
}


def generated_config(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    heads, head_dim = choose.choice([1, 2, 4, 6]), choose.choice([4, 8, 10, 16])
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": choose.choice([17, 64, 97, 131]),
        "hidden_size": heads * head_dim,
        "intermediate_size": choose.choice([8, 20, 33, 64]),
        "num_hidden_layers": choose.choice([1, 2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": choose.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0]),
        "tie_word_embeddings": seed % 3 != 0,
        "rope_theta": choose.choice([100.0, 10000.0, 500000.0]),
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if seed % 4 == 0:
        config["head_dim"] = head_dim + 2  # the heads together are then wider than the hidden size
    if seed % 2:
        config["rms_norm_eps"] = choose.choice([1e-5, 1e-3])
    return config


CONFIGS = [generated_config(seed) for seed in range(24)]


@cache
def comparison(seed: int) -> Comparison:
    return compare(CONFIGS[seed], HfConfig(**CONFIGS[seed]), LlamaForCausalLM, seed)


def test_the_generated_configs_cover_what_they_should() -> None:
    def some(condition: Any) -> bool:
        return any(map(condition, CONFIGS)) and not all(map(condition, CONFIGS))

    assert some(lambda c: 1 < c["num_key_value_heads"] < c["num_attention_heads"])
    assert some(lambda c: c["num_key_value_heads"] == 1 < c["num_attention_heads"])
    assert some(lambda c: c["tie_word_embeddings"])
    assert some(lambda c: "rms_norm_eps" not in c)
    assert some(lambda c: "head_dim" in c)
    assert some(lambda c: c["rope_theta"] != 10000.0)
    assert some(lambda c: c["vocab_size"] % 2)


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_logits_and_hidden_states_equal_transformers(seed: int) -> None:
    c = comparison(seed)
    assert relative(c.logits, c.expected.logits) < TOLERANCE
    assert c.logits.dtype == torch.float32
    check_hidden_states(c)
    assert c.trace.experts == c.trace.router_logits == []


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_decoding_with_the_cache_equals_the_full_forward(seed: int) -> None:
    check_cached_decoding(comparison(seed))


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_what_transformers_writes_as_config_reads_the_same(seed: int) -> None:
    assert FoxConfig.from_dict(HfConfig(**CONFIGS[seed]).to_dict()) == FoxConfig.from_dict(CONFIGS[seed])


def test_weights_kept_in_bfloat16_give_float32_arithmetic() -> None:
    c = comparison(1)
    narrow, wide = Fox(c.model.config).bfloat16(), Fox(c.model.config)
    rounded = {name: tensor.bfloat16().float().numpy() for name, tensor in c.model.tensors()}
    for model in (narrow, wide):
        model.load_weights(rounded.__getitem__)
    with torch.no_grad():
        assert torch.equal(narrow(c.ids), wide(c.ids))


def test_a_layer_from_disk_has_the_names_of_the_checkpoint() -> None:
    config = comparison(2).model.config
    tensors = {name: tensor.numpy() for name, tensor in comparison(2).model.tensors()}
    read: list[str] = []
    layer = layer_from_disk(config, 0, lambda name: read.append(name) or tensors[name])  # type: ignore[func-returns-value]
    assert set(read) == {name for name in tensor_shapes(config) if name.startswith("model.layers.0.")}
    with torch.no_grad():
        x = torch.randn(1, 5, config.hidden_size)
        assert torch.equal(layer(x, None, 0, None), comparison(2).model.layers[0](x, None, 0, None))


def test_the_cache_refuses_to_go_forward() -> None:
    c = comparison(0)
    cache_of_three = c.model.new_cache()
    with torch.no_grad():
        c.model(c.ids[:, :3], cache_of_three)
    for length in (4, -1):
        with pytest.raises(ValueError, match=f"3 positions to {length}"):
            cache_of_three.truncate(length)


def test_the_published_config_is_read() -> None:
    config = FoxConfig.from_dict(PUBLISHED)
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (128, 1e-5, True)
    assert family(PUBLISHED).name == "llama"
    shapes = tensor_shapes(config)
    assert "lm_head.weight" not in shapes
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_665_271_808


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"head_dim": 128},
        {"pad_token_id": 0, "_attn_implementation_autoset": True, "hidden_act": "swish"},
    ],
    ids=str,
)
def test_fields_that_do_not_change_the_arithmetic_are_fine(change: dict[str, Any]) -> None:
    assert FoxConfig.from_dict({**PUBLISHED, **change}) == FoxConfig.from_dict(PUBLISHED)


def test_absent_fields_are_what_transformers_takes_them_for() -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = FoxConfig.from_dict({name: PUBLISHED[name] for name in required})
    theirs = HfConfig(**{name: PUBLISHED[name] for name in required})
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "several RoPE bases"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters"),
        ({"sliding_window": 1024}, "sliding_window"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantization_config"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"num_experts": 8}, "num_experts"),
    ],
    ids=str,
)
def test_fields_that_are_not_implemented_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=named):
        FoxConfig.from_dict({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": 2050}, "hidden_size 2050"),
        ({"head_dim": 33}, "head width is 33"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        FoxConfig.from_dict({**PUBLISHED, **change})
