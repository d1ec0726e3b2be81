"""Does a quantised checkpoint have the same values as quantisation on the fly, and is a wrong one refused?"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from edgelm.checkpoint import Checkpoint, TensorSpec, float32_to_bf16, write_sharded
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.errors import CheckpointError, EdgeLMError, RecipeError
from edgelm.progress import Progress
from edgelm.quant import PRESETS, Fp8Scheme, Recipe, Rule, Scheme, WeightSource, dequantize, quantize
from edgelm.quant import checkpoint as writing
from edgelm.quant.checkpoint import quantize_checkpoint

SHAPES = {
    "model.embed_tokens.weight": (50, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.gate.weight": (4, 64),
    "model.layers.0.mlp.experts.0.down_proj.weight": (64, 48),
    "model.norm.weight": (64,),
    "lm_head.weight": (50, 64),
}
CONFIG = {
    "architectures": ["OlmoeForCausalLM"], "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 1, "num_experts_per_tok": 1,
}  # fmt: skip
RECIPES = [
    PRESETS["int4"],
    PRESETS["int8"],
    PRESETS["fp8"],
    Recipe("few-bits", Scheme(3, 32), (Rule("*.mlp.gate.*", None), Rule("*_tokens.*", Scheme(3, 16, symmetric=False)))),
    Recipe("blocks", Fp8Scheme(32), (Rule("*.mlp.gate.*", None), Rule("lm_head.*", Scheme(8, 128)))),
    Recipe("asymmetric", Scheme(4, 64, symmetric=False), (Rule("*norm*", None), Rule("lm_head.*", Scheme(8, None)))),
]


@pytest.fixture(params=["BF16", "F32", "F16"])
def folder(request, tmp_path):
    """A checkpoint in one of the published dtypes."""
    rng = np.random.default_rng(7)
    stored = {"BF16": float32_to_bf16, "F32": lambda w: w, "F16": lambda w: w.astype(np.float16)}[request.param]
    values = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in SHAPES.items()}
    path = tmp_path / "float"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin.index.json").write_text("{}")
    (path / "LICENSE").write_text("licence")
    specs = {name: TensorSpec(request.param, shape) for name, shape in SHAPES.items()}
    write_sharded(path, specs, lambda name: [stored(values[name])])
    return path


def assert_same(found, expected):
    assert found.scheme == expected.scheme
    assert found.shape == expected.shape
    assert np.array_equal(found.codes, expected.codes)
    assert found.scales.tobytes() == expected.scales.tobytes()
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or np.array_equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("shard_bytes", [None, 4000])
def test_stored_codes_equal_those_made_on_the_fly(folder, tmp_path, recipe, shard_bytes, monkeypatch):
    monkeypatch.setattr(writing, "_BLOCK_BYTES", 1500)  # several blocks per tensor
    summary = quantize_checkpoint(folder, tmp_path / "q", recipe, shard_bytes=shard_bytes, threads=3)
    with Checkpoint.open(folder) as plain, Checkpoint.open(tmp_path / "q") as stored:
        fly, kept = WeightSource(plain, recipe), WeightSource(stored)
        assert kept.is_stored_quantized
        assert not fly.is_stored_quantized
        assert kept.recipe == recipe
        assert kept.shapes == SHAPES
        kept.check_tensors(SHAPES)
        for name, shape in SHAPES.items():
            scheme = kept.recipe.scheme_for(name, shape)
            assert kept.scheme(name) == fly.scheme(name) == scheme
            reference = plain.read_float32(name)
            for rows in (None, slice(3, 4), slice(10, 33)):
                wanted = reference if rows is None else reference[rows]
                if scheme is None:
                    assert np.array_equal(kept.float32(name, rows), wanted)
                else:
                    expected = quantize(np.ascontiguousarray(wanted), scheme)
                    assert_same(fly.quantized(name, rows), expected)
                    assert_same(kept.quantized(name, rows), expected)
                    wanted = dequantize(expected)
                    assert np.array_equal(fly.float32(name, rows), reference if rows is None else reference[rows])
                for source in (fly, kept):
                    assert np.array_equal(source.dequantized().read_float32(name, rows), wanted), name
                    assert source.dequantized().shape(name) == shape
        assert summary.quantized_tensors == sum(fly.scheme(name) is not None for name in SHAPES)
        assert summary.stored_bytes == sum(info.nbytes for info in stored.tensors.values())
        assert summary.weights == sum(int(np.prod(shape)) for shape in SHAPES.values())


def test_other_files_of_the_folder_are_copied(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"])
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert names == {"config.json", "tokenizer.json", "LICENSE", "model.safetensors", "edgelm-files.json"}
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["quantization_config"]["quant_method"] == "edgelm"
    assert Recipe.from_toml(config["quantization_config"]["recipe"]) == PRESETS["int4"]


def test_progress_counts_every_byte_read(folder, tmp_path):
    class Count(Progress):
        total = done = 0.0

        def task(self, label, total, *, unit="bytes"):
            import contextlib

            assert unit == "bytes"
            Count.total = total

            @contextlib.contextmanager
            def count():
                yield lambda amount: setattr(Count, "done", Count.done + amount)

            return count()

    summary = quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"], progress=Count())
    assert Count.done == Count.total == summary.source_bytes


def test_a_quantised_checkpoint_refuses_another_recipe(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"])
    with Checkpoint.open(tmp_path / "q") as stored:
        assert WeightSource(stored, PRESETS["int4"]).is_stored_quantized
        with pytest.raises(RecipeError, match='already quantised with the recipe "int4", not "int8"'):
            WeightSource(stored, PRESETS["int8"])
        with pytest.raises(RecipeError, match="has only quantised values of"):
            WeightSource(stored).float32("lm_head.weight")
    with pytest.raises(RecipeError, match="already quantised"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "q2", PRESETS["int4"])
    assert not (tmp_path / "q2").exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"quant_method": "bitsandbytes"},
            CheckpointError,
            "quantised by 'bitsandbytes', but only edgelm, gptq, .* are supported",
        ),
        ({"format_version": 2}, CheckpointError, "format_version 2"),
        ({"recipe": 'name = "x"\ndefault = "int9"'}, RecipeError, "int9"),
        ({"recipe": Recipe("f", None).to_toml()}, CheckpointError, "qweight, but its recipe keeps"),
        ({"recipe": Recipe("f", Scheme(4, 32, symmetric=False)).to_toml()}, CheckpointError, r"lacks .*\.zeros"),
    ],
)
def test_a_contradictory_config_is_refused(folder, tmp_path, change, error, said):
    quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"])
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with Checkpoint.open(tmp_path / "q") as stored, pytest.raises(error, match=said):
        WeightSource(stored)


def test_damage_to_a_quantised_checkpoint_is_named(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"])
    stem = "model.layers.0.self_attn.q_proj"

    def rewritten(change):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(tmp_path / "q", tmp_path / "d")
        with Checkpoint.open(tmp_path / "q") as stored:
            arrays = {n: (info.dtype, stored.read_raw(n)) for n, info in stored.tensors.items()}
        change(arrays)
        specs = {n: TensorSpec(dtype, array.shape) for n, (dtype, array) in arrays.items()}
        write_sharded(tmp_path / "d", specs, lambda name: [arrays[name][1]])
        return Checkpoint.open(tmp_path / "d")

    with (
        rewritten(lambda a: a.pop(f"{stem}.scales")) as damaged,
        pytest.raises(CheckpointError, match=rf"lacks {stem}\.scales"),
    ):
        WeightSource(damaged)
    with (
        rewritten(lambda a: a.pop(f"{stem}.qweight")) as damaged,
        pytest.raises(CheckpointError, match=rf"has {stem}\.scales but not"),
    ):
        WeightSource(damaged)

    def cut_scales(arrays):
        dtype, scales = arrays[f"{stem}.scales"]
        arrays[f"{stem}.scales"] = (dtype, scales[:, :1])

    with rewritten(cut_scales) as damaged, pytest.raises(CheckpointError, match=rf"{stem}\.weight is damaged: scales"):
        WeightSource(damaged).quantized(f"{stem}.weight")


def test_rows_with_a_partly_used_last_byte_are_read_back(tmp_path):
    shapes = {"a.weight": (9, 37), "b.weight": (9, 33), "c.weight": (9, 36), "d.weight": (9, 40)}
    values = np.random.default_rng(3).standard_normal((9, 40)).astype(np.float32)
    path, out = tmp_path / "float", tmp_path / "q"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    write_sharded(path, specs, lambda name: [np.ascontiguousarray(values[:, : shapes[name][1]])])
    rules = (Rule("b.*", Scheme(3, None, symmetric=False)), Rule("c.*", Scheme(6, 16)))
    recipe = Recipe("odd", Scheme(4, 16), rules)
    quantize_checkpoint(path, out, recipe, threads=1)
    with Checkpoint.open(path) as plain, Checkpoint.open(out) as stored:
        assert [name for name in stored.tensors if name.endswith("columns")] == ["a.columns", "b.columns"]
        source, expected = WeightSource(stored), WeightSource(plain, recipe)
        assert source.shapes == shapes
        for name in shapes:
            assert_same(source.quantized(name), expected.quantized(name))
            assert_same(source.quantized(name, slice(2, 7)), expected.quantized(name).rows(slice(2, 7)))
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes().replace((37).to_bytes(8, "little"), (39).to_bytes(8, "little")))
    with (
        Checkpoint.open(out) as damaged,
        pytest.raises(CheckpointError, match=r"a\.columns is \[39\], which does not agree with 19 bytes"),
    ):
        WeightSource(damaged)


def test_a_calibrated_input_scale_is_stored_with_its_matrix(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", PRESETS["int8"])
    with Checkpoint.open(tmp_path / "q") as stored:
        arrays = {n: (info.dtype, stored.read_raw(n)) for n, info in stored.tensors.items()}
    stem = "model.layers.0.self_attn.q_proj"
    arrays[f"{stem}.input_scale"] = ("F32", np.array(0.5, np.float32))
    specs = {n: TensorSpec(dtype, array.shape) for n, (dtype, array) in arrays.items()}
    write_sharded(tmp_path / "q", specs, lambda name: [arrays[name][1]])
    with Checkpoint.open(tmp_path / "q") as stored:
        source = WeightSource(stored)
        source.check_tensors(SHAPES)
        assert {name: source.input_scale(name) for name in SHAPES if source.input_scale(name)} == {
            f"{stem}.weight": 0.5
        }
        assert sum(map(source.nbytes, SHAPES)) == sum(info.nbytes for info in stored.tensors.values())


def test_tensors_of_another_model_are_named(folder):
    with Checkpoint.open(folder) as checkpoint:
        source = WeightSource(checkpoint, PRESETS["int4"])
        for change, said in (
            ({"extra.weight": (3,)}, "lacks 1 tensor.*extra.weight"),
            ({"lm_head.weight": (50, 65)}, r"lm_head.weight has shape \(50, 64\).*\(50, 65\)"),
        ):
            with pytest.raises(CheckpointError, match=said):
                source.check_tensors(SHAPES | change)
        with pytest.raises(CheckpointError, match=r"has 1 unknown tensor.*lm_head"):
            source.check_tensors({name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"})
        with pytest.raises(CheckpointError, match=r"no tensor nothing\.weight"):
            source.quantized("nothing.weight")
        with pytest.raises(RecipeError, match=r"does not quantise model\.norm\.weight"):
            source.quantized("model.norm.weight")


def test_a_failure_leaves_nothing_behind(folder, tmp_path):
    with Checkpoint.open(folder) as checkpoint:
        values = {name: (info.dtype, checkpoint.read_raw(name)) for name, info in checkpoint.tensors.items()}
        place = checkpoint.tensors["lm_head.weight"]
    damaged = values["lm_head.weight"][1]
    damaged[49, 63] = {"BF16": 0x7F80, "F16": np.inf, "F32": np.inf}[place.dtype]
    specs = {name: TensorSpec(dtype, array.shape) for name, (dtype, array) in values.items()}
    write_sharded(folder, specs, lambda name: [values[name][1]])
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds inf at \[49, 63\]"):
        quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"], threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]

    with pytest.raises(RecipeError, match="quantises none"):
        quantize_checkpoint(folder, tmp_path / "q", PRESETS["none"])
    with pytest.raises(RecipeError, match="matches none"):
        quantize_checkpoint(folder, tmp_path / "q", Recipe("typo", Scheme(4, 32), (Rule("*.gat.weight", None),)))
    (tmp_path / "q").mkdir()
    with pytest.raises(EdgeLMError, match="exists already"):
        quantize_checkpoint(folder, tmp_path / "q", PRESETS["int4"])


def test_the_command_prints_what_it_wrote(folder, tmp_path):
    arguments = [str(folder), "-o", str(tmp_path / "q"), "--recipe", "int8", "--json"]
    result = CliRunner().invoke(quantize_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert made["recipe"] == "int8"
    assert made["quantized_tensors"] == 4
    assert made["float_tensors"] == 2
    assert made["bytes"] < made["source_bytes"]
    with Checkpoint.open(tmp_path / "q") as stored:
        assert WeightSource(stored).recipe == PRESETS["int8"]
