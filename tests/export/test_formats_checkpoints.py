"""Are checkpoints that other tools quantised read exactly, and is everything else refused?"""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from format_writers import (
    STYLES,
    Style,
    Written,
    compressed,
    fp8,
    gptq,
    gptq_config,
    group_of,
    int8,
    linear,
    packed,
    write_format,
)
from tiny_models import MakeCheckpoint

from edgelm.checkpoint import Checkpoint
from edgelm.cli.inspect import inspect
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.errors import CheckpointError, EdgeLMError, RecipeError
from edgelm.quant import Recipe, WeightSource, parse_scheme
from edgelm.quant.source import stored_recipe
from edgelm.slices import slices

BY_NAME = {style.name: style for style in STYLES}
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.experts.2.down_proj"
Write = Callable[..., Written]


@pytest.fixture
def write(checkpoint: MakeCheckpoint, tmp_path: Path) -> Write:
    """Write the tiny MoE in a style, or with other writers for some tensors."""
    base = checkpoint("olmoe", num_experts=4, num_experts_per_tok=2, num_hidden_layers=2)

    def make(style: str | Style, **more: Any) -> Written:
        chosen = BY_NAME[style] if isinstance(style, str) else style
        return write_format(base, tmp_path / chosen.name, chosen, **more)

    return make


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_every_value_is_what_the_format_says(write: Write, style: Style) -> None:
    written = write(style)
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        assert source.is_stored_quantized
        assert source.recipe.name == style.recipe
        assert set(source.shapes) == set(written.values)
        for name, values in written.values.items():
            assert source.shape(name) == values.shape
            scheme = source.scheme(name)
            assert (None if scheme is None else scheme.name) == written.schemes.get(name), name
            assert source.recipe.scheme_for(name, values.shape) == scheme, f"the recipe says the same of {name}"
            for rows in (None, slice(0, 1), slice(3, 33)):
                expected = values if rows is None else values[rows]
                found = source.dequantized().read_float32(name, rows)
                assert found.tobytes() == expected.tobytes() or np.array_equal(found, expected), name
        stored = sum(info.nbytes for info in opened.tensors.values())
        assert sum(source.nbytes(name) for name in source.shapes) == stored


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_the_derived_recipe_is_short_and_round_trips_through_toml(write: Write, style: Style) -> None:
    written = write(style)
    with Checkpoint.open(written.path) as opened:
        recipe = WeightSource(opened).recipe
        again = Recipe.from_toml(recipe.to_toml())
        assert again == recipe
        assert [rule.pattern for rule in recipe.rules] == [
            "lm_head.weight", "model.embed_tokens.weight", "model.layers.*.mlp.gate.weight",
        ] or {rule.pattern for rule in recipe.rules} == {
            "lm_head.weight", "model.embed_tokens.weight", "model.layers.*.mlp.gate.weight",
        }  # fmt: skip
        assert WeightSource(opened, again).recipe == recipe, "a bundle's recipe opens the checkpoint again"
        from_config = stored_recipe(opened.config)
        assert from_config is not None
        assert (from_config.name, from_config.default) == (recipe.name, recipe.default)
        with pytest.raises(RecipeError, match=f'already quantised with the recipe "{style.recipe}", not "int4"'):
            WeightSource(opened, Recipe.load("int4"))


def test_static_scales_of_inputs_are_kept(write: Write) -> None:
    for style, activations, scale in (("int8-static", "int8-static", 0.03125), ("fp8-static", "fp8-static", 0.0625)):
        written = write(style)
        with Checkpoint.open(written.path) as opened:
            source = WeightSource(opened)
            for name in written.values:
                assert source.input_scale(name) == (scale if name in written.schemes else None)
                if name in written.schemes:
                    assert source.recipe.rule(name).activations == activations
                elif len(written.values[name].shape) == 2:
                    assert source.recipe.rule(name).activations == "float"
        written.change(f"{Q_PROJ}.input_scale", written.arrays[f"{Q_PROJ}.input_scale"][1] * 0)
        with Checkpoint.open(written.path) as opened, pytest.raises(CheckpointError, match=r"input_scale is 0\.0"):
            WeightSource(opened).input_scale(f"{Q_PROJ}.weight")


def test_activation_types_are_in_the_recipe(write: Write) -> None:
    for style, kind in (("int8-token", "int8-token"), ("int8", "auto"), ("fp8-block", "auto")):
        with Checkpoint.open(write(style).path) as opened:
            recipe = WeightSource(opened).recipe
        assert recipe.rule(f"{Q_PROJ}.weight").activations == kind
        # Matrices that stay float have float activations: a router with int8 activations would choose other experts.
        assert recipe.rule("model.layers.0.mlp.gate.weight").activations == ("auto" if kind == "auto" else "float")
    written = write("int8-static")
    written.change(f"{Q_PROJ}.input_scale", None)
    refused(written, r"lacks .*\.input_scale")


def test_exceptions_become_rules(write: Write) -> None:
    """Layers with more bits by `dynamic`, one float expert, and a quantised head."""
    style = Style(
        "dynamic",
        gptq_config(lm_head=True, dynamic={"+:.*v_proj": {"bits": 8, "group_size": 64}, "-:.*experts[.]3[.].*": {}}),
        gptq(),
        "gptq-int4-g32",
    )
    written = write(
        style,
        quantise=lambda name, shape: (linear(name, shape) or name == "lm_head.weight") and ".experts.3." not in name,
        draw_for=lambda name: gptq(8, 64) if "v_proj" in name else None,
    )
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        for name, values in written.values.items():
            scheme = source.scheme(name)
            assert (None if scheme is None else scheme.name) == written.schemes.get(name), name
            assert source.recipe.scheme_for(name, values.shape) == scheme, name
            assert np.array_equal(source.dequantized().read_float32(name), values)
        assert len([rule for rule in source.recipe.rules if fnmatchcase(f"{Q_PROJ}.weight", rule.pattern)]) == 0
        assert source.scheme("model.layers.1.self_attn.v_proj.weight") == parse_scheme("int8-g64-sym")


def test_groups_of_config_groups_are_distinguished(write: Write) -> None:
    attention = {**group_of(num_bits=8, strategy="channel", group_size=None), "targets": ["re:.*self_attn.*"]}
    attention["format"] = "int-quantized"
    experts = {**group_of(), "format": "pack-quantized"}
    style = Style("mixed", compressed("mixed-precision", attention, experts), packed(), "compressed-tensors-int8-row")
    written = write(style, draw_for=lambda name: int8() if "self_attn" in name else None)
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        for name, values in written.values.items():
            assert np.array_equal(source.dequantized().read_float32(name), values), name
            assert source.recipe.scheme_for(name, values.shape) == source.scheme(name)


def test_zero_biases_are_ignored_and_others_refused(write: Write) -> None:
    written = write("gptq")
    written.change(f"{Q_PROJ}.bias", np.zeros(128, np.float16), "F16")
    with Checkpoint.open(written.path) as opened:
        assert f"{Q_PROJ}.bias" not in WeightSource(opened).shapes
    written.change(f"{Q_PROJ}.bias", np.full(128, 0.5, np.float16))
    refused(written, rf"{Q_PROJ}\.bias is not zero")


def test_a_tensor_is_repacked_once_for_all_its_rows(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write("awq")
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        read: list[str] = []
        plain = opened.read_raw
        monkeypatch.setattr(opened, "read_raw", lambda key, rows=None: read.append(key) or plain(key, rows))
        names = [f"model.layers.0.mlp.experts.1.{part}_proj.weight" for part in ("gate", "up")]
        for start in range(0, 64, 16):
            for name in names:
                source.quantized(name, slice(start, start + 16))
        assert sorted(read) == sorted(
            f"{name.removesuffix('.weight')}.{part}" for name in names for part in ("qweight", "qzeros", "scales")
        )


def test_inspect_names_the_recipe_and_the_reason_of_a_refusal(write: Write) -> None:
    written = write("fp8-static")
    result = CliRunner().invoke(inspect, [str(written.path)], catch_exceptions=False)
    assert "by fp8, recipe fp8-row-stored" in result.output
    assert f"{len(written.schemes)} matrices with a static scale" in " ".join(result.output.split())
    document = json.loads(CliRunner().invoke(inspect, [str(written.path), "--json"]).stdout)
    assert document["recipe"]["name"] == "fp8-row-stored"
    assert document["refused"] == []
    written.configure({"fmt": "e5m2"})
    result = CliRunner().invoke(inspect, [str(written.path)], catch_exceptions=False)
    assert "REFUSED" in result.output
    assert "fmt" in result.output


def test_quantising_it_again_is_refused(write: Write, tmp_path: Path) -> None:
    written = write("gptq")
    result = CliRunner().invoke(quantize_command, [str(written.path), "-o", str(tmp_path / "q"), "--recipe", "int4"])
    assert isinstance(result.exception, RecipeError)
    assert "is already quantised" in str(result.exception)
    assert "start from the float checkpoint" in str(result.exception)
    assert not (tmp_path / "q").exists()


def refused(written: Written, said: str, read: str | None = None) -> None:
    """Check that opening the checkpoint raises an error that matches `said`, or, with `read`, reading that tensor."""
    with Checkpoint.open(written.path) as opened:
        if read is None:
            with pytest.raises(EdgeLMError, match=said):
                WeightSource(opened)
            return
        source = WeightSource(opened)
        with pytest.raises(CheckpointError, match=said):
            source.quantized(f"{read}.weight")


W4 = group_of()
W8 = group_of(num_bits=8, strategy="channel", group_size=None)
F8 = group_of(num_bits=8, type="float", strategy="channel", group_size=None)
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"quant_method": "bitsandbytes"}, "'bitsandbytes', but only edgelm, gptq, .* are supported"),
    ("gptq", {"quant_method": None}, "quantised by None"),
    ("gptq", {"bits": 2}, r"quantization_config\.bits is 2, but EdgeLM reads 3 or 4 or 8"),
    ("gptq", {"bits": None}, r"quantization_config\.bits is None"),
    ("gptq", {"group_size": 96}, r"group_size is 96, but EdgeLM reads -1 and powers of two of at least 16"),
    ("gptq", {"group_size": 8}, "group_size is 8"),
    ("gptq", {"sym": "yes"}, "sym is 'yes'"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', but EdgeLM reads gptq or gptq_v2"),
    ("gptq", {"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format is True"),
    ("gptq", {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    ("gptq", {"dynamic": {"+:.*q_proj": {"bits": 2}}}, "bits is 2"),
    ("gptq", {"dynamic": {"-:.*q_proj": {}}}, rf"{Q_PROJ} is stored quantised, but .*\.dynamic in config\.json"),
    ("gptq", {"dynamic": {"+:(": {}}}, "a pattern is '\\('"),
    ("gptq", {"modules_to_not_convert": ["self_attn"]}, r"modules_to_not_convert"),
    ("gptq", {"rotation": "hadamard"}, "rotation is 'hadamard', but EdgeLM reads none"),
    ("awq", {"adapter": {"rank": 8}}, "adapter"),
    ("gptq", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("gptq", {"bits": 8}, "qzeros is I32"),
    ("gptq", {"group_size": 64}, r"qzeros is I32 \(4, 16\); int4-g64-sym of .* needs I32 \(2, 16\)"),
    ("awq", {"bits": 8}, "bits is 8, but EdgeLM reads 4"),
    ("awq", {"version": "gemv"}, "version is 'gemv', but EdgeLM reads \"gemm\""),
    ("awq", {"version": "exllama"}, "version is 'exllama'"),
    ("awq", {"modules_to_not_convert": ["q_proj"]}, rf"{Q_PROJ} is stored quantised"),
    ("awq", {"group_size": 48}, "group_size is 48"),
    ("packed", {"format": "marlin-24"}, "format is 'marlin-24'"),
    ("packed", {"format": "nvfp4-pack-quantized"}, "nvfp4"),
    ("packed", {"format": "dense"}, "format is 'dense'"),
    ("packed", {"quantization_status": "thawed"}, "quantization_status is 'thawed'"),
    ("packed", {"quantization_status": 3}, "quantization_status is 3"),
    ("packed", {"kv_cache_scheme": {"num_bits": 8}}, "no scales of the KV cache"),
    ("packed", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format is 'sparse-24-bitmask'"),
    ("packed", {"config_groups": {}}, "at least one group"),
    ("packed", {"config_groups": [1]}, "an object"),
    ("packed", {"config_groups": {"a": {**W4, "targets": ["re:.*mlp.*"]}}}, "no group in .* names it"),
    ("packed", {"ignore": ["lm_head", Q_PROJ]}, rf"{Q_PROJ} is stored quantised, .*\.ignore"),
    ("packed", {"config_groups": {"a": {**W4, "output_activations": {"num_bits": 8}}}}, "output_activations"),
    ("packed", {"config_groups": {"a": group_of(num_bits=3)}}, "num_bits is 3"),
    ("packed", {"config_groups": {"a": group_of(strategy="tensor_group")}}, "strategy is 'tensor_group'"),
    ("packed", {"config_groups": {"a": group_of(type="fp")}}, "type is 'fp'"),
    ("packed", {"config_groups": {"a": group_of(group_size=24)}}, "group_size is 24"),
    ("packed", {"config_groups": {"a": group_of(dynamic=True)}}, "dynamic is True"),
    ("packed", {"config_groups": {"a": F8}}, "what the format pack-quantized stores"),
    ("int8", {"config_groups": {"a": group_of(strategy="channel")}}, "8 with the format int-quantized"),
    ("int8", {"format": "naive-quantized", "config_groups": {"a": F8}}, "which does not agree with .* in config.json"),
    ("int8", {"format": "pack-quantized"}, "which does not agree with .* in config.json"),
    ("int8", {"config_groups": {"a": {**W8, "input_activations": {"dynamic": False, "strategy": "group"}}}}, "static"),
    (
        "int8",
        {"config_groups": {"a": {**W8, "input_activations": {"dynamic": False, "symmetric": False}}}},
        "true where the scale is static",
    ),
    ("float8", {"config_groups": {"a": group_of(num_bits=8, type="float", symmetric=False)}}, "symmetric is False"),
    (
        "float8",
        {"config_groups": {"a": group_of(num_bits=8, type="float", strategy="block", block_structure=[128])}},
        r"block_structure is \[128\]",
    ),
    ("fp8-block", {"fmt": "e5m2"}, "fmt is 'e5m2'"),
    ("fp8-block", {"activation_scheme": "none"}, "activation_scheme is 'none'"),
    ("fp8-block", {"weight_block_size": [128, 100]}, "weight_block_size is 100"),
    ("fp8-block", {"weight_block_size": 128}, "weight_block_size is 128"),
    ("fp8-block", {"weight_block_size": None}, r"lacks .*\.weight_scale "),
    ("fp8-block", {"activation_scheme": "static"}, r"lacks .*\.input_scale"),
    ("fp8-block", {"modules_to_not_convert": ["self_attn"]}, "modules_to_not_convert or ignored_layers"),
]


@pytest.mark.parametrize(("style", "change", "said"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_is_not_read_is_refused(write: Write, style: str, change: dict[str, Any], said: str) -> None:
    written = write(style)
    written.configure(change)
    refused(written, said)


@pytest.mark.parametrize("style", ["gptq", "packed", "int8", "fp8-block"])
def test_quantised_weights_without_a_quantization_config_are_refused(write: Write, style: str) -> None:
    written = write(style)
    path = written.path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"}))
    refused(written, "is quantised, but config.json has no quantization_config")


def test_a_config_that_is_no_object_is_refused(write: Write) -> None:
    written = write("gptq")
    path = written.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": "gptq"}))
    refused(written, "quantization_config is 'gptq', not an object")


MISSING = [
    ("gptq", ["qweight"], "has .* but not"),
    ("gptq", ["qzeros"], rf"lacks {Q_PROJ}\.qzeros of the quantised {Q_PROJ}\.weight"),
    ("gptq", ["scales"], "lacks .*scales"),
    ("awq", ["qzeros"], "lacks .*qzeros"),
    ("awq", ["qweight"], "has .* but not"),
    ("packed", ["weight_shape"], "lacks .*weight_shape"),
    ("packed", ["weight_scale"], "lacks .*weight_scale"),
    ("packed", ["weight_packed"], "has .* but not"),
    ("packed-asym", ["weight_zero_point"], "lacks .*weight_zero_point"),
    ("int8", ["weight_scale"], "lacks .*weight_scale"),
    ("fp8-block", ["weight_scale_inv"], "lacks .*weight_scale_inv"),
    ("fp8-static", ["input_scale"], "lacks .*input_scale"),
    ("fp8-static", ["weight"], "has .* but not"),
]


@pytest.mark.parametrize(("style", "parts", "said"), MISSING)
def test_missing_parts_are_named(write: Write, style: str, parts: list[str], said: str) -> None:
    written = write(style)
    for part in parts:
        written.change(f"{Q_PROJ}.{part}", None)
    refused(written, said)


@pytest.mark.parametrize("style", ["packed", "int8", "fp8-static"])
@pytest.mark.parametrize("status", ["initialized", "calibration", "frozen"])
def test_the_types_of_the_tensors_decide_not_the_status(write: Write, style: str, status: str) -> None:
    written = write(style)
    with Checkpoint.open(written.path) as opened:
        plain = WeightSource(opened)
        wanted = {name: plain.dequantized_float32(name) for name in plain.shapes}
    written.configure({"quantization_status": status})
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        assert source.recipe == plain.recipe
        for name, values in wanted.items():
            np.testing.assert_array_equal(source.dequantized_float32(name), values)


def test_float_weights_with_scales_are_refused(write: Write) -> None:
    written = write("int8")
    written.configure({"quantization_status": "frozen"})
    written.change(f"{Q_PROJ}.weight", np.zeros((128, 128), np.float32), "F32")
    refused(
        written,
        rf"has {Q_PROJ}\.weight_scale, but {Q_PROJ}\.weight is F32 and not quantised: .*save_compressed",
    )


def test_a_checkpoint_with_nothing_quantised_is_refused(write: Write) -> None:
    refused(write("gptq", quantise=lambda name, shape: False), "no tensor is stored that way")


def test_activation_order_is_refused(write: Write) -> None:
    for style, key in (("gptq", f"{Q_PROJ}.g_idx"), ("packed", f"{Q_PROJ}.weight_g_idx")):
        written = write(style)
        order = np.arange(128, dtype=np.int32) // 32
        written.change(key, order, "I32")
        with Checkpoint.open(written.path) as opened:
            assert np.array_equal(
                WeightSource(opened).dequantized().read_float32(f"{Q_PROJ}.weight"), written.values[f"{Q_PROJ}.weight"]
            ), "groups of neighbours are what is wanted"
        written.change(key, order[np.random.default_rng(3).permutation(128)], "I32")
        refused(written, rf"{Q_PROJ}\.weight was quantised in activation order", Q_PROJ)
    written = write(Style("act-order", gptq_config(desc_act=True), gptq(), ""))
    written.change(f"{Q_PROJ}.g_idx", np.arange(128, dtype=np.int32)[::-1] // 32)
    refused(written, "desc_act false")  # before anything is exported


def test_a_zero_point_of_all_ones_in_version_1_is_refused(write: Write) -> None:
    written = write("gptq-asym")
    zeros = written.arrays[f"{Q_PROJ}.qzeros"][1].copy()
    zeros.view(np.uint32)[1, 2] |= 0xF00
    written.change(f"{Q_PROJ}.qzeros", zeros)
    refused(written, r"zero point of row 18, group 1 is 15, which means 16 or 0", Q_PROJ)
    written = write("gptq-v2")
    zeros = written.arrays[f"{Q_PROJ}.qzeros"][1].copy()
    zeros.view(np.uint32)[0, 2] |= 0xF00
    written.change(f"{Q_PROJ}.qzeros", zeros)
    with Checkpoint.open(written.path) as opened:
        found = WeightSource(opened).quantized(f"{Q_PROJ}.weight").zeros
        assert found is not None
        assert found[18, 0] == 15, "in version 2 it is what it says"


@pytest.mark.parametrize("style", ["gptq", "packed"])
def test_zero_points_of_a_symmetric_config_are_checked(write: Write, style: str) -> None:
    written = write(style)
    if style == "gptq":
        zeros = written.arrays[f"{DOWN}.qzeros"][1].copy()
        zeros[0, 0] ^= 1
        written.change(f"{DOWN}.qzeros", zeros)
    else:
        written.change(f"{DOWN}.weight_zero_point", np.ones((128, 2), np.int8), "I8")
    refused(written, rf"{DOWN}\.weight has the zero point [79], but config\.json says symmetric", DOWN)


def test_zero_points_out_of_range_are_refused(write: Write) -> None:
    written = write("packed-asym-bytes")
    zeros = written.arrays[f"{DOWN}.weight_zero_point"][1].copy()
    zeros[5, 1] = 8
    written.change(f"{DOWN}.weight_zero_point", zeros)
    refused(written, r"has the zero point 16, outside of 0 \.\. 15", DOWN)
    zeros[5, 1] = -9
    written.change(f"{DOWN}.weight_zero_point", zeros)
    refused(written, r"has the zero point -1, outside of 0 \.\. 15", DOWN)


@pytest.mark.parametrize(
    ("value", "said"), [(1 / 3, "not exact in float16"), (1e6, "not exact in float16"), (np.inf, "finite")]
)
def test_scales_that_are_not_exact_in_float16_are_refused(write: Write, value: float, said: str) -> None:
    written = write("packed")
    scales = np.full((128, 4), 0.25, np.float32)
    written.change(f"{Q_PROJ}.weight_scale", scales, "F32")
    with Checkpoint.open(written.path) as opened:
        assert WeightSource(opened).quantized(f"{Q_PROJ}.weight").scales[0, 0] == np.float16(0.25), "the type is free"
    scales[7, 3] = value
    written.change(f"{Q_PROJ}.weight_scale", scales, "F32")
    refused(written, said, Q_PROJ)


def test_damage_to_fp8_is_refused(write: Write) -> None:
    written = write("fp8-block")
    codes = written.arrays[f"{DOWN}.weight"][1].copy()
    codes[9, 3] = 0xFF
    written.change(f"{DOWN}.weight", codes)
    refused(written, rf"{DOWN}\.weight\[9, 3\] is NaN", DOWN)
    written.change(f"{DOWN}.weight", codes, "F8_E5M2")
    refused(written, "has .*weight_scale_inv but not")


@pytest.mark.parametrize("key", ["self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_scale", "mlp.output_scale"])
def test_scales_of_the_cache_are_refused(write: Write, key: str) -> None:
    written = write("fp8-static")
    written.change(f"model.layers.0.{key}", np.ones(1, np.float32), "F32")
    refused(written, rf"{key}: static scales of the KV cache")


def test_what_is_stored_twice_or_unknown_is_refused(write: Write) -> None:
    written = write("gptq")
    written.change(f"{Q_PROJ}.weight", written.values[f"{Q_PROJ}.weight"], "F32")
    refused(written, rf"{Q_PROJ}\.weight of type F32 does not agree with the quantization_config")
    written = write("packed")
    written.change(f"{Q_PROJ}.weight", written.values[f"{Q_PROJ}.weight"], "F32")
    refused(written, "has both")
    written = write("int8")
    written.change("lm_head.weight", np.zeros((640, 128), np.uint8), "F8_E5M2")
    refused(written, r"lm_head\.weight of type F8_E5M2")
    written = write("fp8-static")
    written.change(f"{Q_PROJ}.extra", np.zeros((2, 2), np.uint8), "F8_E4M3")
    refused(written, r"extra is F8_E4M3 of shape \(2, 2\), but not a weight matrix")


def test_an_odd_input_zero_point_is_refused(write: Write) -> None:
    written = write("int8-static")
    written.change(f"{Q_PROJ}.input_zero_point", np.zeros(1, np.int8), "I8")
    with Checkpoint.open(written.path) as opened:
        WeightSource(opened)
    written.change(f"{Q_PROJ}.input_zero_point", np.ones(1, np.int8))
    refused(written, "input_zero_point is not zero")


def test_shapes_that_do_not_fit_are_named(write: Write) -> None:
    written = write("gptq")
    words = written.arrays[f"{Q_PROJ}.qweight"][1]
    written.change(f"{Q_PROJ}.qweight", words[:, :127])
    refused(written, "127 rows, whose 4-bit zero points do not fill whole words")
    written.change(f"{Q_PROJ}.qweight", words.reshape(-1))
    refused(written, r"qweight has the shape \(2048,\)")
    written = write("awq")
    written.change(f"{Q_PROJ}.qweight", np.zeros(8, np.int32))
    refused(written, r"qweight has the shape \(8,\)")
    written = write("packed")
    written.change(f"{Q_PROJ}.weight_shape", np.array([128, 127]))
    refused(written, "rows of 127 values, not a multiple of 8")
    written.change(f"{Q_PROJ}.weight_shape", np.array([128, 136]))
    refused(written, r"weight_packed is I32 \(128, 16\)")
    written.change(f"{Q_PROJ}.weight_shape", np.array([128, 128, 1]))
    refused(written, "must be a matrix")


def test_a_head_of_another_size_is_named(write: Write, checkpoint: MakeCheckpoint) -> None:
    """A head that was padded for some kernel has more rows than the vocabulary."""
    del checkpoint
    style = Style("head", gptq_config(lm_head=True), gptq(), "gptq-int4-g32")
    written = write(style, quantise=lambda name, shape: linear(name, shape) or name == "lm_head.weight")
    drawn = gptq()(np.random.default_rng(0), 704, 128)
    for part, (_, array) in drawn.parts.items():
        written.change(f"lm_head.{part}", array)
    with Checkpoint.open(written.path) as opened:
        shapes = {name: values.shape for name, values in written.values.items()}
        with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(704, 128\), .* \(640, 128\)"):
            WeightSource(opened).check_tensors(shapes)


def test_rows_that_no_group_divides_are_read(write: Write) -> None:
    """A last group that is not complete becomes smaller equal ones, or stays if these would be below 16."""
    drawn = packed(4, 32, False)(np.random.default_rng(2), 16, 48)
    written = write("packed-asym")
    for part, (_, array) in drawn.parts.items():
        written.change(f"{DOWN}.{part}", array)
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        assert source.scheme(f"{DOWN}.weight") == parse_scheme("int4-g16-asym")
        for rows in (slice(0, 16), slice(5, 11)):
            assert np.array_equal(source.dequantized().read_float32(f"{DOWN}.weight", rows), drawn.values[rows])
    drawn = packed(4, 32, False)(np.random.default_rng(2), 16, 40)
    for part, (_, array) in drawn.parts.items():
        written.change(f"{DOWN}.{part}", array)
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        assert source.scheme(f"{DOWN}.weight") == parse_scheme("int4-g32-asym")
        assert np.array_equal(source.dequantized().read_float32(f"{DOWN}.weight"), drawn.values)


def test_fp8_scales_may_be_per_row(write: Write) -> None:
    """Also with `quant_method: fp8`, in both shapes."""
    written = write("fp8-static", draw_for=lambda name: fp8(per="row", input_scale=True) if "q_proj" in name else None)
    scale = written.arrays[f"{Q_PROJ}.weight_scale"][1]
    for shape in ((128, 1), (128,)):
        written.change(f"{Q_PROJ}.weight_scale", scale.reshape(shape))
        with Checkpoint.open(written.path) as opened:
            found = WeightSource(opened).dequantized().read_float32(f"{Q_PROJ}.weight", slice(30, 60))
        assert np.array_equal(found, written.values[f"{Q_PROJ}.weight"][30:60])


def test_blocks_of_rows_are_read_across_blocks_of_scales(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A vocabulary of 640 rows spans five blocks of 128; reading starts and ends inside of them."""
    written = write_format(
        checkpoint("fox", tie_word_embeddings=False),
        tmp_path / "f",
        BY_NAME["fp8-block"],
        quantise=lambda name, shape: linear(name, shape) or name == "lm_head.weight",
    )
    with Checkpoint.open(written.path) as opened:
        source = WeightSource(opened)
        for rows in (slice(0, 640), slice(100, 300), slice(383, 385), slice(600, 640), *slices(640, 256)):
            found = source.dequantized().read_float32("lm_head.weight", rows)
            assert np.array_equal(found, written.values["lm_head.weight"][rows])
