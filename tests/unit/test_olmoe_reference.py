"""Does our OLMoE compute what transformers' OLMoE computes, and does it refuse what it cannot compute?"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig as HfConfig
from transformers import OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers_oracle import TOLERANCE, Comparison, check_cached_decoding, check_hidden_states, compare, relative

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import family
from edgelm.models.olmoe import (
    Olmoe,
    OlmoeConfig,
    SparseMoE,
    layer_from_disk,
    load_balancing_loss,
    router_z_loss,
    tensor_shapes,
)
from edgelm.reference.kv_cache import Trace

# config.json of allenai/OLMoE-1B-7B-0924.
PUBLISHED: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}


def generated_config(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    heads, head_dim = choose.choice([1, 2, 4, 6]), choose.choice([4, 8, 10, 16])
    experts = choose.choice([1, 2, 5, 8, 16])
    config: dict[str, Any] = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": choose.choice([17, 64, 97, 131]),
        "hidden_size": heads * head_dim,
        "intermediate_size": choose.choice([8, 20, 33]),
        "num_hidden_layers": choose.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": choose.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0]),
        "num_experts": experts,
        "num_experts_per_tok": {0: 1, 1: experts}.get(seed % 4, choose.randint(1, experts)),
        "norm_topk_prob": seed % 8 >= 4,
        "clip_qkv": choose.choice([0.3, 1.0]) if seed % 3 == 0 else None,
        "tie_word_embeddings": seed % 5 == 0,
        "rope_theta": choose.choice([100.0, 10000.0, 500000.0]),
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    if seed % 2:
        config["rms_norm_eps"] = choose.choice([1e-6, 1e-3])
    return config


CONFIGS = [generated_config(seed) for seed in range(24)]


@cache
def comparison(seed: int) -> Comparison:
    return compare(CONFIGS[seed], HfConfig(**CONFIGS[seed]), OlmoeForCausalLM, seed)


def test_the_generated_configs_cover_what_they_should() -> None:
    def some(condition: Any) -> bool:
        return any(map(condition, CONFIGS)) and not all(map(condition, CONFIGS))

    assert some(lambda c: c["clip_qkv"] is not None)
    assert some(lambda c: c["norm_topk_prob"])
    assert some(lambda c: c["norm_topk_prob"] and 1 < c["num_experts_per_tok"] < c["num_experts"])
    assert some(lambda c: not c["norm_topk_prob"] and 1 < c["num_experts_per_tok"] < c["num_experts"])
    assert some(lambda c: c["num_key_value_heads"] < c["num_attention_heads"])
    assert some(lambda c: c["tie_word_embeddings"])
    assert some(lambda c: "rms_norm_eps" not in c)
    assert some(lambda c: c["rope_theta"] != 10000.0)
    assert some(lambda c: c["vocab_size"] % 2)
    assert some(lambda c: c["num_experts_per_tok"] == 1 < c["num_experts"])
    assert some(lambda c: c["num_experts_per_tok"] == c["num_experts"] > 1)


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_logits_hidden_states_and_experts_equal_transformers(seed: int) -> None:
    c = comparison(seed)
    assert relative(c.logits, c.expected.logits) < TOLERANCE
    assert c.logits.dtype == torch.float32
    check_hidden_states(c)
    assert len(c.trace.experts) == len(c.expected_experts) == CONFIGS[seed]["num_hidden_layers"]
    assert len(c.trace.router_logits) == len(c.trace.experts)
    for got, expected in zip(c.trace.experts, c.expected_experts, strict=True):
        assert torch.equal(got.flatten(0, 1), expected)
    for got, expected in zip(c.trace.router_logits, c.expected_router_logits, strict=True):
        assert relative(got.flatten(0, 1), expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_decoding_with_the_cache_equals_the_full_forward(seed: int) -> None:
    check_cached_decoding(comparison(seed))


@pytest.mark.parametrize("seed", range(len(CONFIGS)))
def test_what_transformers_writes_as_config_reads_the_same(seed: int) -> None:
    written = HfConfig(**CONFIGS[seed]).to_dict()
    assert "rope_parameters" in written, "transformers 5 writes the base there"
    assert OlmoeConfig.from_dict(written) == OlmoeConfig.from_dict(CONFIGS[seed])


@pytest.mark.parametrize("seed", range(6))
def test_training_losses_equal_transformers_and_the_formula(seed: int) -> None:
    c = comparison(seed)
    logits, active = c.trace.router_logits, CONFIGS[seed]["num_experts_per_tok"]
    flat = tuple(layer.flatten(0, 1) for layer in logits)
    experts = CONFIGS[seed]["num_experts"]
    assert torch.isclose(
        load_balancing_loss(logits, active, pooled=True), load_balancing_loss_func(flat, experts, active), rtol=1e-5
    )
    by_layer = torch.stack([load_balancing_loss_func((layer,), experts, active) for layer in flat]).mean()
    assert torch.isclose(load_balancing_loss(logits, active), by_layer, rtol=1e-5)
    z = torch.cat(flat).double().exp().sum(-1).log().square().mean()
    assert torch.isclose(router_z_loss(logits).double(), z, rtol=1e-5)


def test_load_balancing_tells_balanced_from_collapsed_and_sees_each_layer() -> None:
    balanced = torch.eye(4).repeat(8, 1) * 20
    collapsed = [torch.eye(4)[[e]].repeat(32, 1) * 20 for e in range(4)]
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1, abs=1e-3)
    assert load_balancing_loss(collapsed[:1], 1).item() == pytest.approx(4, abs=1e-3)
    # Four layers that collapse to different experts look balanced only when they are pooled.
    assert load_balancing_loss(collapsed, 1).item() == pytest.approx(4, abs=1e-3)
    assert load_balancing_loss(collapsed, 1, pooled=True).item() == pytest.approx(1, abs=1e-3)


def test_gradients_reach_router_and_chosen_experts_only() -> None:
    torch.manual_seed(0)
    config = OlmoeConfig.from_dict({**generated_config(3), "num_experts": 16, "num_experts_per_tok": 2})
    model = Olmoe(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    trace = Trace()
    model(torch.tensor([[1, 2]]), trace=trace).square().mean().backward()
    for layer, experts in zip(model.layers, trace.experts, strict=True):
        assert layer.mlp.gate.weight.grad.abs().sum() > 0
        touched = layer.mlp.experts.gate_proj.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
        assert touched == sorted(set(experts.flatten().tolist()))


def test_weights_kept_in_bfloat16_give_float32_arithmetic() -> None:
    c = comparison(1)
    narrow, wide = Olmoe(c.model.config).bfloat16(), Olmoe(c.model.config)
    rounded = {name: tensor.bfloat16().float().numpy() for name, tensor in c.model.tensors()}
    for model in (narrow, wide):
        model.load_weights(rounded.__getitem__)
    assert {tensor.dtype for _, tensor in narrow.tensors()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(narrow(c.ids), wide(c.ids))


def test_only_chosen_experts_are_asked_for() -> None:
    config = OlmoeConfig.from_dict({**generated_config(3), "num_experts": 16, "num_experts_per_tok": 2})
    asked = []

    class Source:
        def __getitem__(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            asked.append(expert)
            shape = (config.intermediate_size, config.hidden_size)
            return torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[::-1])

    moe = SparseMoE(config, Source())
    torch.nn.init.normal_(moe.gate.weight)
    assert [name for name, _ in moe.named_parameters()] == ["gate.weight"]
    trace = Trace()
    moe(torch.randn(3, config.hidden_size), trace)
    assert asked == sorted(set(trace.experts[0].flatten().tolist()))


def test_a_layer_from_disk_has_the_names_of_the_checkpoint() -> None:
    config = comparison(2).model.config
    tensors = {name: tensor.numpy() for name, tensor in comparison(2).model.tensors()}
    read: list[str] = []
    layer = layer_from_disk(config, 0, lambda name: read.append(name) or tensors[name])  # type: ignore[func-returns-value]
    assert set(read) == {n for n in tensor_shapes(config) if n.startswith("model.layers.0.") and ".experts." not in n}
    with torch.no_grad():
        x = torch.randn(1, 5, config.hidden_size)
        assert torch.equal(layer(x, None, 0, None), comparison(2).model.layers[0](x, None, 0, None))


def test_the_published_config_is_read() -> None:
    config = OlmoeConfig.from_dict(PUBLISHED)
    assert (config.head_dim, config.rms_norm_eps, config.norm_topk_prob) == (128, 1e-5, False)
    assert family(PUBLISHED).name == "olmoe"
    shapes = tensor_shapes(config)
    assert len(shapes) == 3219
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 6_919_161_856
    assert shapes["model.layers.15.mlp.experts.63.down_proj.weight"] == (2048, 1024)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"head_dim": 128},
        {"rms_norm_eps": 1e-5},
        {"quantization_config": {"quant_method": "edgelm", "format_version": 1}},
        {"attention_dropout": 0.1, "_name_or_path": "x", "dtype": "float32", "sliding_window": None, "mlp_bias": False},
    ],
    ids=str,
)
def test_fields_that_do_not_change_the_arithmetic_are_fine(change: dict[str, Any]) -> None:
    assert OlmoeConfig.from_dict({**PUBLISHED, **change}) == OlmoeConfig.from_dict(PUBLISHED)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "rope_theta"),
        ({"sliding_window": 1024}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 64}, "head_dim"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}, "quantization_config"),
        ({"num_shared_experts": 2}, "num_shared_experts"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ],
    ids=str,
)
def test_fields_that_are_not_implemented_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=named):
        OlmoeConfig.from_dict({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok 65"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"hidden_size": 2050}, "hidden_size 2050"),
        ({"vocab_size": "50304"}, "vocab_size is '50304'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"clip_qkv": -1.0}, "clip_qkv is -1.0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"num_attention_heads": 2048, "num_key_value_heads": 2048}, "head width is 1"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        OlmoeConfig.from_dict({**PUBLISHED, **change})


def test_families_are_found_by_architecture_first() -> None:
    assert family({"architectures": ["OlmoeForCausalLM"], "model_type": "llama"}).name == "olmoe"
    assert family({"model_type": "olmoe"}).name == "olmoe"
    with pytest.raises(UnsupportedConfigError, match=r"'MixtralForCausalLM'.*OlmoeForCausalLM, LlamaForCausalLM"):
        family({"architectures": ["MixtralForCausalLM"], "model_type": "olmoe"})
    with pytest.raises(UnsupportedConfigError, match="model_type None"):
        family({})
