"""Are checkpoints in every form that tools write read as in transformers, and others refused with the reason?"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import generated
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.utils import logging
from transformers_oracle import TOLERANCE, disk_tensors, randomize, relative

from edgelm.checkpoint import Checkpoint
from edgelm.errors import CheckpointError, UnsupportedConfigError
from edgelm.models import decoder as decoder_of
from edgelm.reference.module import ReferenceModel

Tensors = dict[str, Tensor]
SEEDS = range(20)

# Fields of published fine-tunes that change nothing, with their values.
IGNORED_FIELDS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    "_commit_hash": "6d84c48581ece794365f2b8c0b1ef2d4b1b1b1b1",
    "_name_or_path": "some/base",
    "pretraining_tp": 2,
    "original_max_position_embeddings": 32,
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    "quantization_config": None,
    "quantization": None,
    "num_nextn_predict_layers": 0,
    "unsloth_version": "2025.3.19",
    "unsloth_fixed": True,
    "use_flash_attention": True,
    "_flash_attn_2_enabled": False,
    "attn_implementation": "eager",
    "neftune_noise_alpha": 5.0,
    "max_sequence_length": 64,
    "model_max_length": 64,
    "tokenizer_padding_side": "left",
    "is_decoder": True,
    "is_causal": True,
    "use_mrope": False,
    "bias": False,
    "qkv_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1,
    "partial_rotary_factor": 1.0,
    "hidden_dropout_prob": 0.1,
    "resid_pdrop": 0.1,
    "attention_dropout": 0.1,
    "router_jitter_noise": 0.01,
    "z_loss": 0.001,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "gradient_checkpointing": True,
    "output_router_logits": False,
    "tie_encoder_decoder": False,
    "pad_token": "<pad>",
    "an_unknown_field": None,
    "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
}


def configs(seed: int, **changes: Any) -> tuple[dict[str, Any], Any]:
    """Return a config.json, of the two families in turn, and transformers' model of it with random weights."""
    llama = seed % 2 == 0
    config = {**generated("llama" if llama else "olmoe", seed), **changes}
    ours = {key: value for key, value in config.items() if key != "architectures"}
    if llama:
        model: Any = LlamaForCausalLM(LlamaConfig(**ours))
    else:
        model = OlmoeForCausalLM(OlmoeConfig(**ours))
    randomize(model, seed)
    return config, model.bfloat16().eval()


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def check_against_transformers(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.decoder
        checkpoint.check_tensors(config.tensor_shapes)
        ours = ReferenceModel(config)
        ours.load_weights(checkpoint.read_float32)
    ids = torch.arange(3, 14)[None] % config.vocab_size
    with torch.no_grad():
        assert relative(ours(ids), theirs(ids).logits) < TOLERANCE


def frequencies(config: dict[str, Any]) -> Tensor:
    rope = decoder_of(config).attention[0].rope
    assert rope is not None
    return torch.tensor(rope.inv_freq)


def with_frequencies(config: dict[str, Any], tensors: Tensors, model: Any) -> Tensors:
    found = frequencies(config).to((torch.float32, torch.bfloat16, torch.float16)[config["num_hidden_layers"] % 3])
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config["num_hidden_layers"])]
    return tensors | dict.fromkeys(names if config["hidden_size"] % 4 else ["model.rotary_emb.inv_freq"], found)


def stacked(config: dict[str, Any], tensors: Tensors, model: Any) -> Tensors:
    found = {name: t for name, t in model.state_dict().items() if name in tensors or ".experts." in name}
    assert any(name.endswith("gate_up_proj") for name in found) == (config["model_type"] == "olmoe")
    return found


VARIANTS: dict[str, Callable[[dict[str, Any], Tensors, Any], Tensors]] = {
    "stacked experts": stacked,
    "without the model's prefix": lambda c, tensors, m: {n.removeprefix("model."): t for n, t in tensors.items()},
    "with the model's prefix twice": lambda c, tensors, m: {f"model.{n}": t for n, t in tensors.items()},
    "several types": lambda c, tensors, m: {
        n: t.to((torch.float64, torch.float32, torch.float16, torch.bfloat16)[i % 4])
        for i, (n, t) in enumerate(tensors.items())
    },
    "rotary frequencies": with_frequencies,
    "stacked, without the prefix, with frequencies": lambda c, tensors, m: with_frequencies(
        c, {n.removeprefix("model."): t for n, t in stacked(c, tensors, m).items()}, m
    ),
}
TIED: dict[str, Callable[[Tensors], Tensors]] = {
    "head beside the embedding": lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
    "head of another type": lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].double()},
    "head in place of the embedding": lambda tensors: {
        ("lm_head.weight" if name == "model.embed_tokens.weight" else name): t for name, t in tensors.items()
    },
}


@pytest.fixture(autouse=True)
def quiet_and_on_one_thread() -> Iterator[None]:
    """Use one thread: such small matrices take longer on several."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_gives_the_logits_of_transformers(tmp_path: Path, variant: str) -> None:
    for seed in SEEDS:
        config, model = configs(seed)
        tensors = VARIANTS[variant](config, disk_tensors(model), model)
        check_against_transformers(write(tmp_path / str(seed), config, tensors))


@pytest.mark.parametrize("variant", TIED)
def test_tied_models_in_every_form_give_the_logits_of_transformers(tmp_path: Path, variant: str) -> None:
    for seed in SEEDS:
        config, model = configs(seed, tie_word_embeddings=True)
        check_against_transformers(write(tmp_path / str(seed), config, TIED[variant](disk_tensors(model))))


def test_ignored_fields_give_the_logits_of_transformers(tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in SEEDS:
        config, model = configs(seed)
        chosen = random.Random(seed).sample(sorted(IGNORED_FIELDS), 15)
        seen.update(chosen)
        more = {name: IGNORED_FIELDS[name] for name in chosen}
        if seed % 3 == 0:
            more["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
        if seed % 4 == 1:
            more["rope_scaling"] = {"rope_type": "default", "original_max_position_embeddings": 32}
        if seed % 4 == 2:
            more["rope_scaling"] = {"type": "linear", "factor": 1.0}
        if seed % 5 == 0 and config["model_type"] == "llama" and "head_dim" not in config:
            more["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        check_against_transformers(write(tmp_path / str(seed), {**config, **more}, disk_tensors(model)))
    assert seen == set(IGNORED_FIELDS)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught, Checkpoint.open(folder) as checkpoint:
        config = checkpoint.decoder
        checkpoint.check_tensors(config.tensor_shapes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(kind: str, tensors: Tensors) -> Tensors:
    embedding = tensors["model.embed_tokens.weight"]
    if kind == "head differs":
        other = embedding.float().clone()
        other[2, 3] += 0.5
        other[1, 1] -= 0.25
        return tensors | {"lm_head.weight": other}
    if kind == "head differs once":
        other = embedding.float().clone()
        other[16, 31] += 2**-10
        return tensors | {"lm_head.weight": other}
    if kind == "head of another shape":
        return tensors | {"lm_head.weight": embedding[1:]}
    if kind == "frequencies differ":
        return tensors | {"model.rotary_emb.inv_freq": torch.ones(4) / 2}
    if kind == "frequencies differ by their last digits":  # from another base, or computed in bfloat16
        frequencies = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        frequencies[2] *= 1 + 1e-4
        return tensors | {"model.rotary_emb.inv_freq": frequencies.float()}
    if kind == "frequencies of another width":
        return tensors | {"model.rotary_emb.inv_freq": torch.ones(5)}
    if kind == "two embeddings":
        return tensors | {"embed_tokens.weight": embedding}
    if kind == "inside":
        return {name.replace("self_attn.", "self_attn._orig_mod."): t for name, t in tensors.items()}
    if kind == "lora":
        return tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}
    return {f"{kind}{name}": t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "_orig_mod.",
            r"has the prefix '_orig_mod\.' \(\d+ of \d+ have\), left by torch\.compile: save model\._orig_mod",
        ),
        ("module.", r"the prefix 'module\.' .*DeepSpeed: save model\.module, or rename the tensors"),
        ("base_model.model.", r"the prefix 'base_model\.model\.' .*PEFT: save model\.merge_and_unload\(\)"),
        ("language_model.", r"the prefix 'language_model\.' .*save the language model alone"),
        ("inside", r"'model\.layers\.0\.self_attn\._orig_mod\.\w+\.weight' has '_orig_mod' in its name"),
        ("lora", r"has 'lora_A' in its name \(1 of \d+ have\), left by PEFT"),
        ("head differs", r"'lm_head.weight' differs from .* in 2 value\(s\), by 0\.5 at \[2, 3\].*tie_word_embeddings"),
        ("head differs once", r"'lm_head.weight' differs from .* in 1 value\(s\), by 0\.000\d+ at \[16, 31\]"),
        ("head of another shape", r"\(16, 32\) and .*\(17, 32\) differ in shape.*tie_word_embeddings"),
        (
            "frequencies differ",
            r"'model\.rotary_emb\.inv_freq' differs .*config.json gives by 0\.5 at \[0\] \(0\.5 for 1",
        ),
        (
            "frequencies differ by their last digits",
            r"'model\.rotary_emb\.inv_freq' differs .* by 1e-06 at \[2\] \(0\.010001 for 0\.01",
        ),
        ("frequencies of another width", r"is F32 \(5,\), the rotary frequencies of heads of 8 are \(4,\)"),
        ("two embeddings", r"is a second tensor for 'model\.embed_tokens\.weight'"),
    ],
)
def test_tensors_that_differ_are_refused_with_the_difference(tmp_path: Path, kind: str, said: str) -> None:
    config, model = configs(
        0, tie_word_embeddings=True, vocab_size=17, hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
        rope_theta=10000.0, head_dim=8,
    )  # fmt: skip
    assert re.search(said, refusal(write(tmp_path / "c", config, changed(kind, disk_tensors(model)))))


def test_all_fields_that_change_the_arithmetic_are_listed_with_value_and_meaning() -> None:
    config, _ = configs(0)
    changes = {
        "rope_scaling": {"rope_type": "proportional", "factor": 8.0},
        "attention_bias": True,
        "hidden_act": "gelu",
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization": {"group_size": 64, "bits": 4},
        "sliding_window": 7,
        "my_field": [1, 2],
        "unsloth_version": "1",
    }
    with pytest.raises(UnsupportedConfigError) as caught:
        decoder_of({**config, **changes})
    message = str(caught.value)
    for said in (
        "rope_scaling.rope_type proportional (RoPE on a part of each head, factor 8.0)",
        "attention_bias True (biases in attention)",
        "hidden_act 'gelu' (another activation)",
        "layer_types 'sliding_attention' (layers other than full_attention)",
        "quantization {'group_size': 64, 'bits': 4} (weights quantised by MLX: start from the float checkpoint)",
        "sliding_window 7 (attention to the last positions only)",
        "my_field [1, 2] (unknown; if it changes nothing, remove it)",
    ):
        assert said in message
    assert "unsloth" not in message
    assert "low_freq_factor" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_weight_that_is_not_finite_is_named_with_its_element(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    config, model = configs(1)
    tensors = {name: t.to(dtype) for name, t in disk_tensors(model).items()}
    name, (row, column) = "model.layers.0.mlp.experts.1.up_proj.weight", (3, 2)
    tensors[name][row, column] = value
    said = rf"'{name}' holds {value} at \[3, 2\]"
    for form in (tensors, VARIANTS["without the model's prefix"](config, tensors, model)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with Checkpoint.open(write(folder, config, form)) as checkpoint:
            for read in (checkpoint.read_float32, checkpoint.read_raw):
                for rows in (None, slice(0, 4), slice(3, 4)):
                    with pytest.raises(CheckpointError, match=said):
                        read(name, rows)
                assert read(name, slice(0, 3)).shape[0] == 3  # other rows are not checked


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    config, model = configs(1)
    tensors = {name: t.double() for name, t in disk_tensors(model).items()}
    tensors["model.norm.weight"][1] = 1e39
    tensors["model.layers.0.input_layernorm.weight"][1] = 1 + 2**-30
    with Checkpoint.open(write(tmp_path / "c", config, tensors)) as checkpoint:
        assert checkpoint.tensors["model.norm.weight"].dtype == "F32"
        assert checkpoint.read_raw("model.layers.0.input_layernorm.weight")[1] == np.float32(1)
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' holds inf at \[1\] once it is rounded"):
            checkpoint.read_raw("model.norm.weight")


def test_parts_of_a_stack_are_read_by_rows(tmp_path: Path) -> None:
    config, model = configs(3)
    tensors = disk_tensors(model)
    with Checkpoint.open(write(tmp_path / "c", config, stacked(config, tensors, model))) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert len(checkpoint.stored) < len(tensors)
        for name, wanted in tensors.items():
            rows = slice(wanted.shape[0] // 3, wanted.shape[0] - 1)
            assert checkpoint.shape(name) == tuple(wanted.shape)
            np.testing.assert_array_equal(checkpoint.read_float32(name, rows), wanted[rows].float().numpy())
        sizes = sum(info.nbytes for info in checkpoint.tensors.values())
        assert sizes == sum(info.nbytes for info in checkpoint.stored.values())


def test_the_tiny_checkpoints_need_no_renaming(tmp_path: Path) -> None:
    for name in ("fox-tiny", "olmoe-tiny"):
        folder = Path(__file__).parents[2] / "examples" / "checkpoints" / name
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.tensors == checkpoint.stored
            assert checkpoint.tensors.keys() == load_file(folder / "model.safetensors").keys()
        shutil.copytree(folder, tmp_path / name)
        check_against_transformers(tmp_path / name)
