"""Is every known kind of damage caught, by arithmetic alone, and is the layer named?

Each test damages a copy of a healthy bundle of a trained checkpoint and re-seals the manifest: no hash can help.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.parity.check import check_parity
from edgelm.parity.pack import ParityPack

from . import damage

MODELS = ("olmoe", "fox")
RECIPES = ("int4", "int8", "none")


def judge(folder, **options):
    damage.reseal(folder)
    report = check_parity(folder, threads=1, **options)
    assert next(check for check in report.checks if check.name == "integrity").passed, "the damage was not re-sealed"
    return report


def failed(report):
    return {check.name for check in report.failures}


def used_experts(folder, layer, count):
    """The experts of a layer that most positions chose."""
    experts = ParityPack.load(folder / "parity").target.experts[layer]
    return [int(expert) for expert in np.argsort(-np.bincount(experts.ravel()))[:count]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_healthy_bundle_passes(exported, model, recipe):
    report = check_parity(exported(model, recipe), threads=1)
    assert report.passed, [(check.name, check.value, check.limit, check.detail) for check in report.failures]
    assert report.first_diverged_layer is None
    assert report.cause is None
    assert all(layer.bad == 0 for layer in report.diagnosis.layers)


@pytest.mark.parametrize("recipe", RECIPES)
def test_renormalised_routing(copied, recipe):
    folder = copied("olmoe", recipe)
    damage.renormalise_routing(folder, layer=2)
    report = judge(folder)
    assert report.first_diverged_layer == 2
    assert "mixture of experts as a whole" in report.cause
    assert {"layer[2]", "logits.kl_mean"} <= failed(report)


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize(("model", "part"), [("olmoe", "mixture of experts as a whole"), ("fox", "feed-forward")])
def test_gate_and_up_swapped(copied, model, recipe, part):
    folder = copied(model, recipe)
    damage.swap_gate_and_up(folder, layer=1)
    report = judge(folder)
    assert report.first_diverged_layer == 1
    assert part in report.cause


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_one_experts_scales_corrupted(copied, recipe):
    folder = copied("olmoe", recipe)
    expert = used_experts(folder, 2, 5)[4]
    damage.corrupt_expert_scales(folder, 2, expert)
    report = judge(folder)
    assert report.first_diverged_layer == 2
    assert f"expert {expert}:" in report.cause


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_experts_exchanged(copied, recipe):
    folder = copied("olmoe", recipe)
    first, second = sorted(used_experts(folder, 1, 4)[2:])
    damage.exchange_experts(folder, 1, first, second)
    report = judge(folder)
    assert report.first_diverged_layer == 1
    assert f"experts {first}, {second}:" in report.cause


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_wrong_rope_base(copied, model, recipe):
    folder = copied(model, recipe)
    damage.change_rope_base(folder, 500000.0)
    report = judge(folder)
    assert report.first_diverged_layer == 0
    assert "attention scores" in report.cause
    assert "first positions agree" in report.cause


@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_qk_norm_per_head(copied, recipe):
    folder = copied("olmoe", recipe)
    damage.norm_queries_per_head(folder, layer=1)
    report = judge(folder)
    assert report.first_diverged_layer == 1
    assert "attention scores" in report.cause


BLOCKS = [
    ("olmoe", "layers.1.attn.qkv.qweight", 1),
    ("olmoe", "model.layers.3.self_attn.o_proj.qweight", 3),
    ("olmoe", "layers.2.moe.gate_up.qweight", 2),
    ("olmoe", "layers.0.moe.down.qweight", 0),
    ("fox", "layers.1.attn.qkv.qweight", 1),
    ("fox", "layers.2.mlp.gate_up.qweight", 2),
]


def used_byte(folder, tensor, layer):
    """A byte in the middle of the tensor, in a mixture of an expert that many positions chose."""
    entry = next(entry for entry in damage.manifest(folder)["tensors"] if entry["name"] == tensor)
    experts = damage.manifest(folder)["model"]["num_experts"]
    if ".moe." not in tensor:
        return entry["size"] // 2 + 1
    one = entry["size"] // experts
    return used_experts(folder, layer, 3)[2] * one + one // 2 + 1


@pytest.mark.parametrize(("model", "tensor", "layer"), BLOCKS)
def test_one_flipped_weight_byte_is_named_by_the_hashes(copied, model, tensor, layer):
    folder = copied(model, "int4")
    damage.flip_byte(folder, tensor, used_byte(folder, tensor, layer))
    report = check_parity(folder, threads=1)
    integrity = next(check for check in report.checks if check.name == "integrity")
    assert integrity.passed is False
    assert f"{tensor} (layer {layer})" in integrity.detail


@pytest.mark.parametrize(("model", "tensor", "layer"), BLOCKS)
def test_one_flipped_weight_byte_is_found_by_arithmetic_alone(copied, model, tensor, layer):
    folder = copied(model, "int4")
    damage.flip_byte(folder, tensor, used_byte(folder, tensor, layer))
    report = judge(folder)
    assert report.passed is False
    assert report.first_diverged_layer == layer


@pytest.mark.parametrize("model", MODELS)
def test_a_wrong_tokenizer_file(copied, model):
    folder = copied(model, "int4")
    damage.exchange_tokens(folder)
    report = judge(folder)
    assert "tokenizer.vocabulary" in failed(report)
    assert not any(name.startswith(("logits", "layer")) for name in failed(report))


def test_a_tokenizer_that_cannot_be_read(copied):
    folder = copied("olmoe", "int4")
    (folder / "tokenizer.json").write_text("{}")
    report = judge(folder)
    assert "tokenizer" in failed(report)


def test_rows_of_the_embedding_damaged(copied):
    folder = copied("olmoe", "int4")
    token = int(ParityPack.load(folder / "parity").ids[3])
    rows = damage.manifest(folder)["model"]["vocab_size"]
    with damage.Tensor(folder, "model.embed_tokens.scales", np.float32, (rows, -1)) as scales:
        scales[token] *= 1.5
    report = judge(folder)
    assert report.first_diverged_layer == -1
    assert f"token ids {token}" in report.cause


@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_a_wrong_final_norm_is_told_from_the_layers(copied, recipe):
    folder = copied("olmoe", recipe)
    with damage.Tensor(folder, "model.norm.weight", np.float32) as weight:
        weight[::2] *= 1.3
    report = judge(folder)
    assert report.first_diverged_layer is None
    assert "final norm or output head" in report.cause


def test_damage_in_the_shipped_graph_only_is_told_from_the_weights(copied):
    folder = copied("olmoe", "int4")

    def change(graph):
        node = next(node for node in graph.node if node.op_type == "QMoE")
        del node.input[14:]
        return 1

    damage.edit_graphs(folder, change, graphs=["model.onnx"])
    report = judge(folder)
    assert report.passed is False
    assert report.first_diverged_layer is None
    assert "shipped graph only" in report.cause


def test_weights_that_are_no_numbers_fail(copied):
    # In float: the int8 activations of the quantised recipes turn a single NaN into a zero.
    folder = copied("fox", "none")
    with damage.Tensor(folder, "model.layers.2.input_layernorm.weight", np.float32) as weight:
        weight[0] = np.nan
    report = judge(folder)
    assert report.passed is False
    assert report.first_diverged_layer == 2
    assert {"logits.kl_mean", "logits.kl_max", "perplexity.device", "layer[2]"} <= failed(report)


def test_a_bundle_with_the_weights_of_another_recipe_fails(exported, copied):
    folder = copied("olmoe", "int8")
    for name in ("pack.npz", "pack.json"):
        (folder / "parity" / name).write_bytes((exported("olmoe", "int4") / "parity" / name).read_bytes())
    report = judge(folder)
    assert report.passed is False
