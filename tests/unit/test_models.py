"""Does each model compute the same as transformers, and refuse configs that it cannot compute?

Every family is tested with generated configs with different shapes, norms, RoPE and routing. The weights come from a
checkpoint that transformers writes, so that tensor names are tested too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers_oracle import TOLERANCE, Comparison, check_cached_decoding, check_hidden_states, compare, relative

from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import FAMILIES, family
from edgelm.models import decoder as decoder_of
from edgelm.models.spec import ROLES, Decoder
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.kv_cache import Trace
from edgelm.reference.layerwise import LayerWeights
from edgelm.reference.module import ReferenceModel
from edgelm.synth import PUBLISHED

Config = dict[str, Any]
SEEDS = range(20)


def common(choose: random.Random, seed: int, architecture: str, model_type: str) -> Config:
    heads, head_dim = choose.choice([1, 2, 4, 6]), choose.choice([4, 8, 10, 16])
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
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
        "pad_token_id": None,
    }
    if seed % 2:
        config["rms_norm_eps"] = choose.choice([1e-6, 1e-3])
    return config


def wide_heads(config: Config, seed: int) -> Config:
    """In every fourth config the heads together are wider than the hidden size."""
    return (
        config | {"head_dim": config["hidden_size"] // config["num_attention_heads"] + 2} if seed % 4 == 0 else config
    )


def experts(choose: random.Random, seed: int) -> tuple[int, int]:
    count = choose.choice([1, 2, 5, 8, 16])
    return count, {0: 1, 1: count}.get(seed % 4, choose.randint(1, count))


def llama(choose: random.Random, seed: int, config: Config) -> Config:
    scaling: list[Config | None] = [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 2.0},
    ]  # fmt: skip
    return wide_heads(config, seed) | {"rope_scaling": scaling[seed % 5]}


def olmoe(choose: random.Random, seed: int, config: Config) -> Config:
    count, active = experts(choose, seed)
    return config | {
        "num_experts": count,
        "num_experts_per_tok": active,
        "norm_topk_prob": seed % 8 >= 4,
        "clip_qkv": choose.choice([0.3, 1.0]) if seed % 3 == 0 else None,
    }


def mistral(choose: random.Random, seed: int, config: Config) -> Config:
    return wide_heads(config, seed) | {"sliding_window": [None, 4, 9][seed % 3]}


def mixtral(choose: random.Random, seed: int, config: Config) -> Config:
    count, active = experts(choose, seed)
    changes = {"num_local_experts": count, "num_experts_per_tok": active, "sliding_window": [None, 6][seed % 2]}
    return wide_heads(config, seed) | changes


def qwen2(choose: random.Random, seed: int, config: Config) -> Config:
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": seed % 3}
    return config | (windows if seed % 3 == 0 else {"use_sliding_window": False, "sliding_window": 5})


def qwen3(choose: random.Random, seed: int, config: Config) -> Config:
    return qwen2(choose, seed, config) | {"head_dim": choose.choice([4, 8, 10, 16])}


def qwen3_moe(choose: random.Random, seed: int, config: Config) -> Config:
    count, active = experts(choose, seed)
    return config | {
        "head_dim": choose.choice([4, 8, 10, 16]),
        "num_experts": count,
        "num_experts_per_tok": active,
        "moe_intermediate_size": choose.choice([8, 20, 33]),
        "norm_topk_prob": seed % 8 >= 4,
        "decoder_sparse_step": 2 if seed % 7 == 5 else 1,
        "mlp_only_layers": [0] if seed % 5 == 3 and config["num_hidden_layers"] > 1 else [],
    }


def olmo2(choose: random.Random, seed: int, config: Config) -> Config:
    return config


GENERATORS: dict[str, Callable[[random.Random, int, Config], Config]] = {
    "llama": llama,
    "olmoe": olmoe,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "olmo2": olmo2,
}


@cache
def generated(name: str, seed: int) -> Config:
    choose = random.Random(seed)
    found = next(one for one in FAMILIES if one.name == name)
    return GENERATORS[name](choose, seed, common(choose, seed, found.architecture, found.model_type))


def hf_config(config: Config) -> Any:
    given = {key: value for key, value in config.items() if value is not None or key.endswith("_token_id")}
    return AutoConfig.for_model(config["model_type"], **{k: v for k, v in given.items() if k != "model_type"})


@cache
def comparison(name: str, seed: int) -> Comparison:
    return compare(generated(name, seed), hf_config(generated(name, seed)), seed)


every_config = pytest.mark.parametrize(("name", "seed"), [(f.name, seed) for f in FAMILIES for seed in SEEDS])
every_family = pytest.mark.parametrize("name", [f.name for f in FAMILIES])


def test_every_family_is_compared_with_transformers() -> None:
    assert set(GENERATORS) == {found.name for found in FAMILIES}


@every_family
def test_the_generated_configs_cover_all_features(name: str) -> None:
    configs = [generated(name, seed) for seed in SEEDS]

    def some(condition: Callable[[Config], Any]) -> bool:
        return any(map(condition, configs)) and not all(map(condition, configs))

    assert some(lambda c: 1 < c["num_key_value_heads"] < c["num_attention_heads"])
    assert some(lambda c: c["num_key_value_heads"] == 1 < c["num_attention_heads"])
    assert some(lambda c: c["tie_word_embeddings"])
    assert some(lambda c: "rms_norm_eps" not in c)
    assert some(lambda c: c["rope_theta"] != 10000.0)
    assert some(lambda c: c["vocab_size"] % 2)
    if "num_experts_per_tok" in configs[0]:
        counts = [(decoder_of(c).num_experts, c["num_experts_per_tok"]) for c in configs]
        assert any(active == 1 < count for count, active in counts)
        assert any(active == count > 1 for count, active in counts)
        assert any(1 < active < count for count, active in counts)


@every_config
def test_logits_hidden_states_and_experts_equal_transformers(name: str, seed: int) -> None:
    c = comparison(name, seed)
    assert relative(c.logits, c.expected.logits) < TOLERANCE
    assert c.logits.dtype == torch.float32
    check_hidden_states(c)
    assert len(c.trace.router_logits) == len(c.trace.experts) == len(c.expected_experts)
    for got, expected in zip(c.trace.experts, c.expected_experts, strict=True):
        assert torch.equal(got.flatten(0, 1), expected)
    for got, expected in zip(c.trace.router_logits, c.expected_router_logits, strict=True):
        assert relative(got.flatten(0, 1), expected) < TOLERANCE


@every_config
def test_decoding_with_the_cache_equals_the_full_forward(name: str, seed: int) -> None:
    check_cached_decoding(comparison(name, seed))


@every_config
def test_configs_written_by_transformers_give_the_same_spec(name: str, seed: int) -> None:
    config = generated(name, seed)
    written = hf_config(config).to_dict() | {"architectures": config["architectures"]}
    assert decoder_of(written) == decoder_of(config)


@every_config
def test_matrices_have_the_right_roles_layers_and_experts(name: str, seed: int) -> None:
    decoder = decoder_of(generated(name, seed))
    assert set(decoder.matrices) == {n for n, shape in decoder.tensor_shapes.items() if len(shape) == 2}
    for matrix in decoder.matrices.values():
        assert matrix.role in ROLES
        assert decoder.tensor_shapes[matrix.name] == (matrix.rows, matrix.columns)
        assert (matrix.layer is None) == (matrix.role in ("embedding", "head"))
        assert (matrix.expert is not None) == (f".experts.{matrix.expert}." in matrix.name)
        if matrix.layer is not None:
            assert f".layers.{matrix.layer}." in matrix.name


@every_family
def test_absent_fields_have_the_defaults_of_transformers(name: str) -> None:
    config = generated(name, 3)
    required = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    if name not in (
        "llama",
        "olmoe",
        "olmo2",
    ):  # by default these have as many KV heads as heads; the others have a fixed number
        required.append("num_key_value_heads")
    sizes = [key for key in config if key in required or "intermediate" in key or "experts" in key or key == "head_dim"]
    bare = {key: config[key] for key in ("architectures", "model_type", *sizes)}
    whole = hf_config(bare).to_dict() | {"architectures": config["architectures"]}
    # transformers writes the default window of its class, which has no effect where it is not used.
    assert decoder_of(bare) == decoder_of(whole)


@every_family
def test_a_layer_reads_only_its_own_tensors_and_selected_experts(name: str) -> None:
    c = comparison(name, 2)
    decoder: Decoder = c.model.decoder
    tensors = {key: tensor.numpy() for key, tensor in c.model.tensors()}
    read: list[str] = []

    def reading(key: str) -> np.ndarray[Any, Any]:
        read.append(key)
        return tensors[key]

    run, trace = Interpreter(decoder, LayerWeights(decoder, 0, reading)), Trace()
    with torch.no_grad():
        x = torch.randn(1, 5, decoder.hidden_size)
        assert torch.equal(run.layer(0, x, None, trace), c.model.interpreter.layer(0, x))
    mine = {key for block in decoder.layers[0] for key, _ in block.tensors()}
    of_experts = {key for key in mine if ".experts." in key}
    assert len(read) == len(set(read))
    assert set(read) - of_experts == mine - of_experts
    if trace.experts:
        chosen = set(trace.experts[0].flatten().tolist())
        moe = decoder.moe(0)
        assert moe is not None
        assert set(read) & of_experts == {m.name for e in chosen for m in moe.experts[e].matrices}


@every_family
def test_weights_in_bfloat16_are_computed_in_float32(name: str) -> None:
    c = comparison(name, 1)
    low, full = ReferenceModel(c.model.decoder).bfloat16(), ReferenceModel(c.model.decoder)
    rounded = {key: tensor.bfloat16().float().numpy() for key, tensor in c.model.tensors()}
    for model in (low, full):
        model.load_weights(rounded.__getitem__)
    assert {tensor.dtype for _, tensor in low.tensors()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(low(c.ids), full(c.ids))


def test_gradients_reach_the_router_and_selected_experts_only() -> None:
    torch.manual_seed(0)
    model = ReferenceModel(decoder_of(generated("olmoe", 3) | {"num_experts": 16, "num_experts_per_tok": 2}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    trace = Trace()
    model(torch.tensor([[1, 2]]), trace=trace).square().mean().backward()
    for index, chosen in enumerate(trace.experts):
        moe = model.decoder.moe(index)
        assert moe is not None
        router = model.read(moe.router.name).grad
        assert router is not None
        assert router.abs().sum() > 0
        touched = [e for e, expert in enumerate(moe.experts) if model.read(expert.gate.name).grad is not None]
        assert touched == sorted(set(chosen.flatten().tolist()))


def test_the_cache_cannot_be_truncated_to_more_positions() -> None:
    c = comparison("llama", 0)
    cache_of_three = c.model.new_cache()
    with torch.no_grad():
        c.model(c.ids[:, :3], cache_of_three)
    for length in (4, -1):
        with pytest.raises(ValueError, match=f"3 positions to {length}"):
            cache_of_three.truncate(length)


# -- configs -----------------------------------------------------------------------------------------------------------

FOX: Config = dict(PUBLISHED["fox-1-1.6b"])
OLMOE: Config = dict(PUBLISHED["olmoe-1b-7b"])
BASES = {"fox": FOX, "olmoe": OLMOE}


@pytest.mark.parametrize(
    ("config", "tensors", "weights"),
    [(FOX, 290, 1_665_271_808), (OLMOE, 3219, 6_919_161_856)],
    ids=["fox", "olmoe"],
)
def test_the_published_configs_are_read(config: Config, tensors: int, weights: int) -> None:
    shapes = decoder_of(config).tensor_shapes
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == weights
    assert decoder_of(config).attention[0].head_dim == 128


def test_the_published_olmoe_does_not_normalize_its_eight_weights() -> None:
    moe = decoder_of(OLMOE).first_moe
    assert moe is not None
    assert (len(moe.experts), moe.k, moe.normalize) == (64, 8, False)
    assert decoder_of(OLMOE).norm.eps == 1e-5


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("fox", {"rope_scaling": {"rope_type": "default"}}),
        ("fox", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("fox", {"head_dim": 128}),
        ("fox", {"pad_token_id": 0, "_attn_implementation_autoset": True, "hidden_act": "swish"}),
        ("fox", {"is_llama_config": True, "rope_interleaved": False}),  # as in SmolLM2
        ("fox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),  # changes longer contexts only
        ("olmoe", {"rope_scaling": {"type": "default"}}),
        ("olmoe", {"rms_norm_eps": 1e-5}),
        ("olmoe", {"quantization_config": {"quant_method": "edgelm", "format_version": 1}}),
        ("olmoe", {"attention_dropout": 0.1, "_name_or_path": "x", "dtype": "float32", "sliding_window": None,
                   "mlp_bias": False}),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_do_not_change_the_arithmetic_are_accepted(base: str, change: Config) -> None:
    assert decoder_of({**BASES[base], **change}) == decoder_of(BASES[base])


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("fox", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "several RoPE bases"),
        ("fox", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("fox", {"rope_scaling": {"rope_type": "mrope"}}, "RoPE over several axes"),
        ("fox", {"rope_scaling": "linear"}, "no table of RoPE"),
        ("fox", {"rope_scaling": {"type": "linear", "factor": 2.0},
                 "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "several kinds of RoPE"),
        ("fox", {"sliding_window": 1024}, "sliding_window"),
        ("fox", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("fox", {"attention_bias": True}, "attention_bias"),
        ("fox", {"mlp_bias": True}, "mlp_bias"),
        ("fox", {"quantization_config": {"quant_method": "aqlm"}}, "quantization_config"),
        ("fox", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("fox", {"num_experts": 8}, "num_experts"),
        ("olmoe", {"sliding_window": 1024}, "sliding_window"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act"),
        ("olmoe", {"head_dim": 64}, "head_dim"),
        ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmoe", {"num_shared_experts": 2}, "num_shared_experts"),
        ("olmoe", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_are_not_implemented_are_refused_by_name(base: str, change: Config, named: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=named):
        decoder_of({**BASES[base], **change})


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        ("fox", {"intermediate_size": None}, "intermediate_size is missing"),
        ("fox", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("fox", {"hidden_size": 2050}, "hidden_size 2050"),
        ("fox", {"head_dim": 33}, "head width is 33"),
        ("fox", {"rope_theta": 0}, "rope_theta is 0"),
        ("fox", {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing"),
        ("fox", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor is missing"),
        ("fox", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
                                  "original_max_position_embeddings": 16}}, r"high_freq_factor 1 is not above"),
        ("fox", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, r"expected 64 numbers"),
        ("olmoe", {"num_experts": None}, "num_experts is missing"),
        ("olmoe", {"num_experts_per_tok": 65}, "num_experts_per_tok 65"),
        ("olmoe", {"vocab_size": "50304"}, "vocab_size is '50304'"),
        ("olmoe", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv is -1.0"),
        ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ("olmoe", {"rms_norm_eps": True}, "rms_norm_eps is True"),
        ("olmoe", {"num_attention_heads": 2048, "num_key_value_heads": 2048}, "head width is 1"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_numbers_are_refused_by_name(base: str, change: Config, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        decoder_of({**BASES[base], **change})


def test_families_are_found_by_architecture_first() -> None:
    assert family({"architectures": ["OlmoeForCausalLM"], "model_type": "llama"}).name == "olmoe"
    assert family({"model_type": "olmoe"}).name == "olmoe"
    with pytest.raises(UnsupportedConfigError, match=r"'GPT2LMHeadModel'.*OlmoeForCausalLM, LlamaForCausalLM"):
        family({"architectures": ["GPT2LMHeadModel"], "model_type": "olmoe"})
    with pytest.raises(UnsupportedConfigError, match="model_type None"):
        family({})
