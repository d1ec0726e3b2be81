"""Are activation ranges measured correctly, in parts and at once, and do static scales minimise the error?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_checkpoint import CONFIGS, tokens, write_small

from edgelm.checkpoint import Checkpoint
from edgelm.errors import RecipeError
from edgelm.progress import Silent
from edgelm.quant import PRESETS, Recipe, Scheme, WeightSource
from edgelm.quant.activations import STATIC
from edgelm.quant.calibration.ranges import InputRange, calibrated_scales, record_ranges
from edgelm.quant.checkpoint import write_quantized
from edgelm.quant.reference import activation_kinds, reference_module
from edgelm.reference.hooks import Hooks

FAMILIES = pytest.mark.parametrize("family", CONFIGS)


def recipe(family: str, activations: str) -> Recipe:
    rules = PRESETS["int8"].rules[:1] if family == "olmoe" else ()
    return Recipe("test", Scheme(8, None), rules, activations=activations)


def heavy(rows: int, columns: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_t(3, (rows, columns)).astype(np.float32))


def test_ranges_of_parts_equal_the_range_of_the_whole():
    x = heavy(500)
    whole, parts = InputRange(64), InputRange(64)
    whole.add(x)
    for part in x.split(77):
        parts.add(part.view(1, *part.shape))
    assert torch.equal(whole.absmax, x.abs().amax(0))
    assert torch.allclose(whole.mean, x.abs().mean(0), rtol=1e-5)
    assert whole.tokens == parts.tokens == 500
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.absmax, parts.absmax)
    assert int(whole.counts.sum()) == x.numel()
    halves = [InputRange(64), InputRange(64)]
    for half, part in zip(halves, x.split(250), strict=True):
        half.add(part)
    merged = halves[0].merged(halves[1])
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.absmax, whole.absmax)


def test_quantiles_are_accurate_to_a_bin():
    x = heavy(2000)
    found = InputRange(64)
    found.add(x)
    for share in (0.1, 0.5, 0.99, 0.9999, 1.0):
        assert found.quantile(share) == pytest.approx(np.quantile(x.abs().numpy(), share), rel=0.035)


@pytest.mark.parametrize("kind", STATIC)
def test_the_static_scale_is_near_the_optimum(kind):
    x = heavy(2000)
    found = InputRange(64)
    found.add(x)
    static = STATIC[kind]
    full = float(x.abs().max()) / static.largest

    def error(scale: float) -> float:
        return float((static.rounding(x, scale) - x).square().sum())

    assert found.scale(kind, "absmax") == pytest.approx(full)
    best = min(error(full * ratio) for ratio in np.linspace(0.02, 1.1, 100))
    assert error(found.scale(kind, "mse")) <= 1.02 * best
    if kind == "int8-static":
        assert error(found.scale(kind, "mse")) < 0.7 * error(full)


def test_zeros_have_a_scale_and_infinite_values_are_refused():
    found = InputRange(8)
    found.add(torch.zeros(4, 8))
    assert found.scale("int8-static", "mse") == 1.0
    with pytest.raises(RecipeError, match="not finite"):
        found.add(torch.tensor([[1.0, float("nan")] * 4]))
    with pytest.raises(RecipeError, match="no method 'max' for ranges: give absmax or mse"):
        found.scale("int8-static", "max")


class Keep(Hooks):
    """Records the inputs of one matrix."""

    def __init__(self, name, kept):
        self.name, self.kept = name, kept

    def inputs(self, matrix, x):
        if matrix.name == self.name:
            self.kept.append(x)
        return x


@FAMILIES
def test_ranges_of_a_model_are_those_of_its_matmul_inputs(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    ids = tokens()
    found = record_ranges(checkpoint.decoder, checkpoint, ids)
    layer = "model.layers.1"
    q, k, v = (found.ranges[f"{layer}.self_attn.{m}_proj.weight"] for m in "qkv")
    assert q is k is v
    assert q.tokens == ids.size
    module = reference_module(WeightSource(checkpoint))
    seen: list[torch.Tensor] = []
    module.hooks = Keep(f"{layer}.self_attn.q_proj.weight", seen)
    module(torch.from_numpy(ids))
    assert torch.allclose(q.absmax, seen[0].abs().amax((0, 1)), rtol=1e-4)
    head = "model.embed_tokens.weight" if family == "fox" else "lm_head.weight"
    assert found.ranges[head].tokens == ids.size
    if family == "olmoe":
        experts = [found.ranges[f"{layer}.mlp.experts.{e}.up_proj.weight"] for e in range(4)]
        assert sum(expert.tokens for expert in experts) == 2 * ids.size
    attention = module.decoder.attention[1]
    assert found.keys[1].shape == (attention.kv_heads, attention.head_dim)
    scales = found.kv_scales("int8", channels=True)[1]
    assert torch.allclose(scales.keys * 127, found.keys[1])
    assert torch.allclose(scales.values * 127, found.values[1].amax(-1))


def test_experts_share_the_scale_of_their_inputs_and_rare_ones_borrow(tmp_path):
    checkpoint = write_small(tmp_path / "c", "olmoe")
    source = WeightSource(checkpoint, recipe("olmoe", "int8-static"))
    found = record_ranges(checkpoint.decoder, checkpoint, tokens())
    kinds = activation_kinds(source)
    experts = "model.layers.0.mlp.experts"
    scales = found.scales(kinds, "absmax")
    gates = {scales[f"{experts}.{e}.{m}_proj.weight"] for e in range(4) for m in ("gate", "up")}
    assert len(gates) == 1
    largest = max(found.ranges[f"{experts}.{e}.gate_proj.weight"].largest for e in range(4))
    assert gates.pop() == pytest.approx(largest / 127)
    downs = [f"{experts}.{e}.down_proj.weight" for e in range(4)]
    assert len({scales[name] for name in downs}) == 4
    rare = found.ranges[downs[2]]
    rare.tokens = 5
    together = max(found.ranges[name].largest for name in downs) / 127
    assert found.scales(kinds, "absmax")[downs[2]] == pytest.approx(together)
    del found.ranges["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(RecipeError, match=r"no calibration token reached model\.layers\.0\.self_attn\.o_proj\.weight"):
        found.scales(kinds)


@FAMILIES
def test_calibrated_scales_are_nearly_as_good_as_per_token_scales(family, tmp_path):
    checkpoint = write_small(tmp_path / "c", family)
    source = WeightSource(checkpoint, recipe(family, "int8-static"))
    ids = torch.from_numpy(tokens(seed=1))
    exact = reference_module(WeightSource(checkpoint))(ids)
    ranges = record_ranges(checkpoint.decoder, source.dequantized(), tokens())
    errors = {}
    for method in ("absmax", "mse"):
        module = reference_module(source, scales=ranges.scales(activation_kinds(source), method))
        errors[method] = float((module(ids) - exact).norm() / exact.norm())
    token = reference_module(source, replace(source.recipe, activations="int8-token"))(ids)
    assert float((token - exact).norm() / exact.norm()) < min(errors.values())
    assert max(errors.values()) < (0.4 if family == "olmoe" else 0.25)  # measured: 0.28 and 0.17


def test_calibrated_scales_are_stored_and_used(tmp_path):
    checkpoint = write_small(tmp_path / "c", "fox")
    what = recipe("fox", "int8-static")
    source = WeightSource(checkpoint, what, threads=1)
    scales = calibrated_scales(source, tokens())
    assert set(scales) == set(activation_kinds(source))
    (tmp_path / "q").mkdir()
    options = {"threads": 1, "shard_bytes": None, "progress": Silent()}
    write_quantized(source, tmp_path / "q", **options, input_scales=scales)
    stored = WeightSource(Checkpoint.open(tmp_path / "q"), threads=1)
    name = "model.layers.1.mlp.down_proj.weight"
    assert stored.checkpoint.tensors[name.replace(".weight", ".input_scale")].dtype == "F32"
    assert stored.input_scale(name) == pytest.approx(scales[name], rel=1e-6)
    ids = torch.from_numpy(tokens())
    expected = reference_module(source, scales=scales)(ids)
    found = reference_module(stored)(ids)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    with pytest.raises(RecipeError, match="calibrate"):
        reference_module(source)
    assert calibrated_scales(WeightSource(checkpoint, recipe("fox", "int8-token")), tokens()) == {}
