"""Is every known kind of damage detected by arithmetic alone, and is the layer named?

Each test damages a copy of a good bundle of a trained checkpoint and updates the manifest, so that hashes do not help.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.errors import BundleError
from edgelm.parity.check import check_parity
from edgelm.parity.pack import ParityPack

from . import damage
from .conftest import OPERATOR_SETS

MODELS = ("olmoe", "fox")
RECIPES = ("int4", "int8", "none")


@pytest.fixture(params=OPERATOR_SETS, scope="session")
def ops(request):
    return request.param


def judge(folder, **options):
    damage.reseal(folder)
    report = check_parity(folder, threads=1, **options)
    assert next(check for check in report.checks if check.name == "integrity").passed, "the manifest is outdated"
    return report


def failed(report):
    return {check.name for check in report.failures}


# Median and ninth decile, which rounding hardly changes: they fail in every recipe if damage reaches the logits.
LOGITS = {"logits.error", "logits.error_p90", "greedy.error"}
MEANS = LOGITS | {"logits.kl_mean"}
EVERY_LOGIT = MEANS | {
    "logits.kl_p99", "logits.kl_max", "logits.top1", "perplexity.device", "greedy.kl", "greedy.tokens"
}  # fmt: skip


def assert_caught(report, first, must):
    """Check that the first wrong layer is `first`, and that the checks in `must` fail, but none before the damage.

    `first`: -1 for the embedding, None where no layer is wrong.
    """
    found = failed(report)
    assert report.first_diverged_layer == first, found
    assert found >= must, must - found
    unhurt = {"integrity", "tokenizer", "tokenizer.encode", "tokenizer.decode", "tokenizer.vocabulary", "head"} - must
    layers = len(report.diagnosis.layers)
    unhurt |= {f"{kind}[{i}]" for kind in ("layer", "experts") for i in range(layers if first is None else first)}
    if first != -1:
        unhurt.add("embedding")
    assert not found & unhurt, found & unhurt


def used_experts(folder, layer, count):
    """Return the experts of a layer that most positions selected."""
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
    large = EVERY_LOGIT if recipe == "none" else MEANS | {"logits.top1", "perplexity.device"}
    assert_caught(report, 2, large | {"layer[2]"})
    assert "MoE block as a whole" in report.cause


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize(("model", "part"), [("olmoe", "MoE block as a whole"), ("fox", "feed-forward")])
def test_gate_and_up_swapped(copied, model, recipe, part):
    folder = copied(model, recipe)
    damage.swap_gate_and_up(folder, layer=1)
    report = judge(folder)
    assert_caught(report, 1, MEANS | {"layer[1]", "logits.kl_p99", "logits.kl_max", "logits.top1"})
    assert part in report.cause


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_scales_of_one_expert_corrupted(copied, recipe):
    folder = copied("olmoe", recipe)
    expert = used_experts(folder, 2, 5)[4]
    damage.corrupt_expert_scales(folder, 2, expert)
    report = judge(folder)
    assert_caught(report, 2, {"layer[2]"})  # one expert of 32 hardly changes the logits
    assert f"expert {expert}:" in report.cause


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_experts_swapped(copied, recipe):
    folder = copied("olmoe", recipe)
    first, second = sorted(used_experts(folder, 1, 4)[2:])
    damage.exchange_experts(folder, 1, first, second)
    report = judge(folder)
    assert_caught(report, 1, (EVERY_LOGIT if recipe == "none" else MEANS) | {"layer[1]"})
    assert f"experts {first}, {second}:" in report.cause


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_wrong_rope_base(copied, model, recipe):
    folder = copied(model, recipe)
    damage.change_rope_base(folder, 500000.0)
    report = judge(folder)
    large = EVERY_LOGIT if recipe == "none" else EVERY_LOGIT - {"logits.kl_max", "greedy.kl"}
    assert_caught(report, 0, large | {"layer[0]"} | ({"experts[0]"} if model == "olmoe" else set()))
    assert "attention scores" in report.cause
    assert "first positions agree" in report.cause


@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_qk_norm_per_head(copied, recipe):
    folder = copied("olmoe", recipe)
    damage.norm_queries_per_head(folder, layer=1)
    report = judge(folder)
    assert_caught(report, 1, (EVERY_LOGIT if recipe == "none" else LOGITS) | {"layer[1]", "experts[1]"})
    assert "attention scores" in report.cause


BLOCKS = [
    ("olmoe", "layers.1.attn.qkv", 1),
    ("olmoe", "model.layers.3.self_attn.o_proj", 3),
    ("olmoe", "layers.2.moe.gate_up", 2),
    ("olmoe", "layers.0.moe.down", 0),
    ("fox", "layers.1.attn.qkv", 1),
    ("fox", "layers.2.mlp.gate_up", 2),
]


def used_byte(folder, block, layer):
    """Return (tensor, offset) of a code in the middle of a matrix; in an MoE, of an expert that is often selected."""
    expert = used_experts(folder, layer, 3)[2] if ".moe." in block else 0
    if damage.is_native(folder):
        tensor = f"layers.{layer}.moe.experts" if ".moe." in block else f"{block}.weight"
        return tensor, damage.Packed(folder, tensor, 2 * expert + block.endswith(".down")).middle_code()
    tensor = f"{block}.qweight"
    entry = next(entry for entry in damage.manifest(folder)["tensors"] if entry["name"] == tensor)
    one = entry["size"] // (damage.manifest(folder)["model"]["num_experts"] if ".moe." in block else 1)
    return tensor, expert * one + one // 2 + 1


@pytest.mark.parametrize(("model", "block", "layer"), BLOCKS)
def test_one_flipped_weight_byte_is_named_by_the_hashes(copied, model, block, layer):
    folder = copied(model, "int4")
    tensor, place = used_byte(folder, block, layer)
    damage.flip_byte(folder, tensor, place)
    report = check_parity(folder, threads=1)
    integrity = next(check for check in report.checks if check.name == "integrity")
    assert integrity.passed is False
    assert f"{tensor} (layer {layer})" in integrity.detail
    assert {"integrity", f"layer[{layer}]"} <= failed(report)


@pytest.mark.parametrize(("model", "block", "layer"), BLOCKS)
def test_one_flipped_weight_byte_is_found_by_arithmetic_alone(copied, model, block, layer):
    folder = copied(model, "int4")
    damage.flip_byte(folder, *used_byte(folder, block, layer))
    report = judge(folder)
    assert_caught(report, layer, {f"layer[{layer}]"})
    # One bit hardly changes the logits: only the layers show it.
    assert not any(name.startswith(("logits.", "greedy.", "perplexity")) for name in failed(report))


@pytest.mark.parametrize("model", MODELS)
def test_a_wrong_tokenizer_file(copied, model):
    folder = copied(model, "int4")
    damage.exchange_tokens(folder)
    report = judge(folder)
    # The swapped SentencePiece pieces are in no prompt.
    used = {"tokenizer.encode", "tokenizer.decode"} if model == "olmoe" else set()
    assert failed(report) == used | {"tokenizer.vocabulary"}


def test_a_tokenizer_that_cannot_be_read(copied):
    folder = copied("olmoe", "int4")
    (folder / "tokenizer.json").write_text("{}")
    report = judge(folder)
    assert failed(report) == {"tokenizer"}


def test_rows_of_the_embedding_damaged(copied):
    folder = copied("olmoe", "int4")
    token = int(ParityPack.load(folder / "parity").ids[3])
    damage.damage_embedding_row(folder, token)
    report = judge(folder)
    assert_caught(report, -1, {"embedding"})
    assert f"token ids {token}" in report.cause


@pytest.mark.parametrize("recipe", ["int4", "none"])
def test_a_wrong_final_norm_is_distinguished_from_layers(copied, recipe):
    folder = copied("olmoe", recipe)
    with damage.Tensor(folder, "model.norm.weight", np.float32) as weight:
        weight[::2] *= 1.3
    report = judge(folder)
    large = EVERY_LOGIT if recipe == "none" else MEANS | {"perplexity.device"}
    assert_caught(report, None, large | {"head"})
    assert "final norm or output head" in report.cause


def test_damage_in_the_shipped_graph_is_distinguished_from_weights(copied):
    folder = copied("olmoe", "int4")
    damage.renormalise_routing(folder, layer=0, graphs=["model.onnx"])
    report = judge(folder)
    assert_caught(report, None, MEANS | {"logits.top1", "perplexity.device"})
    assert report.cause.startswith("the shipped graph: ")


def test_nan_weights_fail(copied):
    # With the float recipe, since int8 activations turn a single NaN into a zero.
    folder = copied("fox", "none")
    with damage.Tensor(folder, "model.layers.2.input_layernorm.weight", np.float32) as weight:
        weight[0] = np.nan
    report = judge(folder)
    layers = {f"layer[{i}]" for i in range(2, len(report.diagnosis.layers))}
    assert_caught(report, 2, EVERY_LOGIT | {"head"} | layers)


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
@pytest.mark.parametrize(
    ("tensor", "position", "message"),
    [
        ("layers.1.attn.qkv.weight", 0, r"QuantLinear layers\.1\.attn\.qkv\.weight.* EDLM"),
        ("layers.1.attn.qkv.weight", 9, r"QuantLinear layers\.1\.attn\.qkv\.weight"),
        ("layers.2.moe.experts", 0, r"SparseMoE layers\.2\.moe"),
        ("layers.2.moe.experts", 64 + 7, r"SparseMoE layers\.2\.moe"),
        ("model.embed_tokens.weight", 5, r"QuantEmbedding model\.embed_tokens\.weight"),
    ],
)
def test_a_damaged_header_of_packed_weights_is_refused_by_name(copied, ops, tensor, position, message):
    if ops != "native":
        pytest.skip("portable weights have no headers")
    folder = copied("olmoe", "int4")
    damage.flip_byte(folder, tensor, position)
    damage.reseal(folder)
    with pytest.raises(BundleError, match=message):
        check_parity(folder, threads=1)


def test_a_bundle_with_the_weights_of_another_recipe_fails(exported, copied):
    folder = copied("olmoe", "int8")
    for name in ("pack.npz", "pack.json"):
        (folder / "parity" / name).write_bytes((exported("olmoe", "int4") / "parity" / name).read_bytes())
    report = judge(folder)
    assert_caught(report, 0, MEANS | {"layer[0]", "experts[0]"})
