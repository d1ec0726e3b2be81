"""Are activations and KV caches quantised by the formulas, and only those that the recipe names?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_checkpoint import CONFIGS, tokens, write_small

from edgelm.errors import RecipeError
from edgelm.quant import PRESETS, Recipe, Rule, Scheme, WeightSource, fp8
from edgelm.quant.activations import (
    DYNAMIC,
    STATIC,
    KvScales,
    fp8_static,
    fp8_token,
    int8_blocks,
    int8_static,
    int8_token,
    round_cache,
    round_fp8,
)
from edgelm.quant.reference import activation_kinds, quantized_activations, reference_module
from edgelm.reference.hooks import Hooks
from edgelm.reference.layerwise import LayerwiseReference

FAMILIES = pytest.mark.parametrize("family", CONFIGS)
ROUTER = PRESETS["int8"].rules[0]


def some(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_t(4, shape).astype(np.float32))


def recipe(activations: str = "auto", kv: str = "auto", family: str = "olmoe") -> Recipe:
    rules = (ROUTER,) if family == "olmoe" else ()
    return Recipe("test", Scheme(8, None), rules, activations=activations, kv=kv)


def test_int8_has_a_scale_per_row_and_an_error_of_half_a_step():
    x = some(3, 5, 40)
    found = int8_token(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    codes = found / step
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.abs().max() <= 127.001
    assert ((found - x).abs() <= step / 2 * 1.0001).all()
    # The largest value of a row is exact.
    assert torch.allclose(found.abs().amax(-1), x.abs().amax(-1))


def test_blocks_are_quantised_like_separate_rows():
    x = some(4, 96)
    assert torch.equal(int8_blocks(x), int8_token(x.view(4, 3, 32)).view(4, 96))
    ragged = int8_blocks(x[:, :70])
    assert torch.equal(ragged[:, :64], int8_blocks(x)[:, :64])
    assert torch.equal(ragged[:, 64:], int8_token(x[:, 64:70]))
    assert (int8_blocks(x) - x).norm() < (int8_token(x) - x).norm()


def test_static_int8_clips_to_the_range_of_int8():
    x = torch.tensor([-300.0, -128.4, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 126.6, 300.0])
    assert int8_static(x, 1.0).tolist() == [-128, -128, -2, 0, 0, 0, 2, 2, 127, 127]
    assert torch.equal(int8_static(x, 0.5), int8_static(x / 0.5, 1.0) * 0.5)


@pytest.mark.parametrize("form", fp8.FORMS)
def test_fp8_activations_are_rounded_like_weights(form):
    x = torch.cat([some(4000) * 100, some(4000) * 1e-3, torch.tensor([1e9, -1e9, 0.0])])
    expected = fp8.decode(fp8.encode(x.numpy(), fp8.FORMS[form]), fp8.FORMS[form])
    assert np.array_equal(round_fp8(x, form).numpy(), expected)
    rows = some(6, 64)
    scale = rows.abs().amax(-1, keepdim=True) / float(fp8.FORMS[form].largest)
    assert torch.equal(fp8_token(rows, form), round_fp8(rows / scale, form) * scale)
    assert torch.equal(fp8_static(rows, 0.25, form), round_fp8(rows * 4, form) / 4)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_zeros_and_rows_too_small_for_a_scale_become_zero(kind):
    x = some(3, 64)
    x[0] = 0
    x[1] = 1e-35
    found = DYNAMIC[kind](x)
    assert (found[:2] == 0).all()
    assert torch.isfinite(found).all()
    assert found[2].count_nonzero() > 50


def test_a_cache_is_quantised_per_head_and_token_or_by_given_scales():
    keys, values = some(2, 3, 7, 16), some(2, 3, 7, 16) * 3
    of_keys, of_values = round_cache(keys, values, "int8")
    assert torch.equal(of_keys[1, 2, 5], int8_token(keys[1, 2, 5]))
    assert torch.equal(of_values, int8_token(values))
    assert torch.equal(round_cache(keys, values, "float16")[0], keys.half().float())
    assert round_cache(keys, values, "float32")[0] is keys
    scales = KvScales(torch.rand(3, 16) + 0.01, torch.rand(3) + 0.01)
    for kind, static in (("int8", int8_static), ("fp8", fp8_static)):
        of_keys, of_values = round_cache(keys, values, kind, scales)
        assert torch.equal(of_keys[1, 2, 5], static(keys[1, 2, 5], scales.keys[2]))
        assert torch.equal(of_values[0, 1], static(values[0, 1], float(scales.values[1])))
    with pytest.raises(KeyError):
        round_cache(keys, values, "int3")


class Names(Hooks):
    def __init__(self) -> None:
        self.names: dict[str, tuple[int, ...]] = {}
        self.layers: list[int] = []

    def inputs(self, matrix, x):
        self.names[matrix.name] = tuple(x.shape)
        return x

    def cached(self, layer, keys, values):
        self.layers.append(layer)
        return keys, values


@FAMILIES
def test_hooks_see_every_matmul_with_the_name_of_its_matrix(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    names = Names()
    module = reference_module(WeightSource(checkpoint), hooks=names)
    ids = torch.from_numpy(tokens(16))
    logits = module(ids)
    looked_up = set() if family == "fox" else {"model.embed_tokens.weight"}
    matrices = {n: info.shape for n, info in checkpoint.tensors.items() if len(info.shape) == 2 and n not in looked_up}
    assert set(names.names) == set(matrices)
    assert all(names.names[name][-1] == shape[1] for name, shape in matrices.items())
    assert names.layers == [0, 1]
    module.hooks = None
    names.names.clear()
    assert torch.equal(module(ids), logits)
    assert not names.names


@FAMILIES
@pytest.mark.parametrize("activations", ["int8-token", "fp8-token"])
def test_weights_activations_and_cache_all_change_the_logits(family, activations, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    ids = torch.from_numpy(tokens())
    logits = {
        (a, kv): reference_module(WeightSource(checkpoint, recipe(a, kv, family)))(ids)
        for a in ("float", activations)
        for kv in ("float32", "int8")
    }
    exact = reference_module(WeightSource(checkpoint))(ids)
    assert len({tuple(found.flatten()[:50].tolist()) for found in [exact, *logits.values()]}) == 5
    # Measured: 0.04 to 0.11 (Fox) and 0.08 to 0.18 (OLMoE, where other experts are selected).
    for found in logits.values():
        assert (found - exact).norm() < (0.3 if family == "olmoe" else 0.2) * exact.norm()
    # Finer steps have a smaller error.
    assert (logits["float", "float32"] - exact).norm() < (logits[activations, "int8"] - exact).norm()


@FAMILIES
def test_layer_by_layer_gives_the_same_logits(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    source = WeightSource(checkpoint, recipe("int8-token", "int8", family))
    ids = tokens(4)
    expected = reference_module(source)(torch.from_numpy(ids))
    hooks = quantized_activations(source)
    reference = LayerwiseReference(checkpoint.decoder, source.dequantized(), hooks=hooks)
    final = torch.from_numpy(reference.windows(ids))
    found = torch.cat([block for _, block in reference.head_blocks(final)], -1)
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    # Also with a KV cache that is filled in two steps.
    result = reference.step([window[:10] for window in ids])
    steps = reference.step([window[10:] for window in ids], result.states)
    logits = np.concatenate([block for _, (block, *_) in steps.logits()], -1)
    assert np.allclose(logits, expected[0, 10:].numpy(), atol=2e-4 * float(expected.abs().max()))


def test_float_matrices_keep_float_inputs_and_auto_follows_the_target(tmp_path):
    checkpoint = write_small(tmp_path / "c", "olmoe")
    rules = (ROUTER, Rule("*.o_proj.weight", Scheme(8, None), activations="float"))
    source = WeightSource(checkpoint, replace(recipe("fp8-token"), rules=rules))
    kinds = activation_kinds(source)
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "fp8-token"
    assert kinds["lm_head.weight"] == "fp8-token"
    assert not {"model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate.weight"} & set(kinds)
    assert "model.embed_tokens.weight" not in kinds
    plain = WeightSource(checkpoint, recipe())
    assert not activation_kinds(plain)
    assert set(activation_kinds(plain, auto="int8-b32").values()) == {"int8-b32"}
    assert quantized_activations(plain) is None
    with pytest.raises(RecipeError, match=r"no activations 'int5': give float, int8-token"):
        activation_kinds(plain, auto="int5")


def test_static_activations_without_a_scale_are_refused_by_name(tmp_path):
    checkpoint = write_small(tmp_path / "c", "fox")
    source = WeightSource(checkpoint, recipe("int8-static", family="fox"))
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight has int8-static activations.*calibrate"):
        reference_module(source)
    scales = dict.fromkeys(activation_kinds(source), 0.05)
    ids = torch.from_numpy(tokens())
    coarse = reference_module(source, scales=scales)(ids)
    exact = reference_module(source, recipe(family="fox"))(ids)
    assert not torch.equal(coarse, exact)
    assert set(STATIC) == {"int8-static", "fp8-static", "fp8e5m2-static"}
