"""Does compressed-tensors read the checkpoints that we write for vLLM, with our values, and what is refused?

The oracles are the library compressed-tensors, transformers, and `format_writers`, which packs bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from format_writers import stream
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_models import MakeCheckpoint

from edgelm.checkpoint import Checkpoint, TensorSpec, write_sharded
from edgelm.cli.inspect import inspect
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.errors import EdgeLMError, RecipeError
from edgelm.quant import Recipe, WeightSource, dequantize
from edgelm.quant import checkpoint as writing
from edgelm.quant.calibration import calibrate_checkpoint
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.formats.compressed_tensors_layout import CompressedTensorsLayout
from edgelm.quant.primitives import pack, unpack
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor

FORMAT = "compressed-tensors"
FLOAT = '[[rule]]\nrole = ["embedding", "router", "head"]\nscheme = "float"\n'
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


def recipe(default: str, *rules: str, **keys: str) -> Recipe:
    lines = [f'default = "{default}"', *(f'{key} = "{value}"' for key, value in keys.items())]
    return Recipe.from_toml("\n".join([*lines, *rules, FLOAT]), name="mine")


def rule(scheme: str, **what: str) -> str:
    (key, value), *more = what.items()
    return "\n".join(["[[rule]]", f'{key} = "{value}"', f'scheme = "{scheme}"', *(f'{k} = "{v}"' for k, v in more), ""])


ATTENTION = [rule("int8-row-sym", match=f"*.self_attn.{part}_proj.weight") for part in "qkv"]
RECIPES = {
    "int4": Recipe.load("int4"),
    "int8": Recipe.load("int8"),
    "groups": recipe("int8-g32-sym"),
    "asymmetric": recipe("int4-g32-asym"),
    "asymmetric rows": recipe("int4-row-asym"),
    "two schemes": recipe("int4-g64-sym", *ATTENTION),
    "by layer": recipe("int4-g64-sym", rule("int8-g64-sym", match="*.layers.0.*_proj.weight")),
    "feed-forward only": recipe("int4-g64-sym", rule("float", match="*.self_attn.*")),
}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def expected(source: Path, plan: Recipe) -> tuple[Recipe, dict[str, QuantTensor]]:
    """Return the recipe in the form of this layout, and the quantised matrices by module, from our quantiser."""
    with Checkpoint.open(source) as checkpoint:
        plan = CompressedTensorsLayout().adapted(plan, checkpoint.decoder)
        weights = WeightSource(checkpoint, plan)
        names = [name for name in weights.shapes if weights.scheme(name) is not None]
        return plan, {name.removesuffix(".weight"): weights.quantized(name) for name in names}


@pytest.mark.parametrize("plan", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("family", ["olmoe", "fox"])
def test_the_library_decompresses_our_values(
    checkpoint: MakeCheckpoint, tmp_path: Path, family: str, plan: Recipe
) -> None:
    pytest.importorskip("compressed_tensors", reason="is in the extra dev")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    summary = quantize_checkpoint(checkpoint(family), tmp_path / "q", plan, format=FORMAT, shard_bytes=200_000)
    _, quantised = expected(checkpoint(family), plan)
    assert summary.quantized_tensors == len(quantised) > 0
    config = QuantizationConfig.model_validate(settings(tmp_path / "q"))
    tensors = {k: v for file in sorted((tmp_path / "q").glob("*.safetensors")) for k, v in load_file(file).items()}
    assert summary.stored_bytes == sum(tensor.nbytes for tensor in tensors.values())
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for module, found in quantised.items():
        schemes = [
            scheme
            for scheme in config.config_groups.values()
            if "Linear" in scheme.targets or any(match_name(module, target) for target in scheme.targets)
        ]
        assert len(schemes) == 1, module
        assert not any(match_name(module, name) for name in config.ignore)
        names = compressor.compression_param_names(schemes[0])
        # Pops them: no tensor of a quantised module is left.
        state = {name: tensors.pop(f"{module}.{name}") for name in names}
        values = compressor.decompress(state, schemes[0])["weight"].numpy()
        assert values.dtype == np.float32
        assert values.tobytes() == dequantize(found).tobytes(), module
    with Checkpoint.open(checkpoint(family)) as plain:
        assert set(tensors) == {name for name in plain.tensors if name.removesuffix(".weight") not in quantised}
        for name, tensor in tensors.items():
            assert np.array_equal(tensor.float().numpy(), plain.read_float32(name))


def test_the_config_is_what_the_library_writes(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="is in the extra dev")
    from compressed_tensors.quantization import QuantizationConfig

    for name in ("int4", "int8", "asymmetric", "two schemes"):
        quantize_checkpoint(checkpoint("olmoe"), tmp_path / name, RECIPES[name], format=FORMAT)
        found = settings(tmp_path / name)
        again = json.loads(QuantizationConfig.model_validate(found).model_dump_json())
        assert {key: again[key] for key in found} == found
        assert all(value is None for key, value in again.items() if key not in found)
    assert found["ignore"] == ["model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    assert [group["targets"] for group in found["config_groups"].values()] == [
        [rf"re:model\.layers\.\d+\.self_attn\.{part}_proj$" for part in "qkv"],
        [r"re:model\.layers\.\d+\.self_attn\.o_proj$", r"re:model\.layers\.\d+\.mlp\.experts\..*"],
    ]


def test_a_tied_head_is_ignored_by_name(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    quantize_checkpoint(checkpoint("fox"), tmp_path / "q", RECIPES["int4"], format=FORMAT)
    assert settings(tmp_path / "q")["ignore"] == ["model.embed_tokens", "lm_head"]


@pytest.mark.filterwarnings(
    "ignore:You passed .quantization_config.*:UserWarning"
)  # of `special`: it says what it does
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in ("olmoe", "fox") for name in ("int4", "int8", "two schemes")),
        ("fox", "asymmetric"),
    ],
)
def test_transformers_computes_the_logits_of_our_values(tmp_path: Path, family: str, name: str) -> None:
    """Transformers loads the checkpoint, and the float checkpoint with our dequantised values: the same logits."""
    pytest.importorskip("compressed_tensors", reason="is in the extra dev")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = CHECKPOINTS / f"{family}-tiny"
    quantize_checkpoint(source, tmp_path / "q", RECIPES[name], format=FORMAT)
    plan, _ = expected(source, RECIPES[name])
    (tmp_path / "float").mkdir()
    shutil.copy(source / "config.json", tmp_path / "float")
    with Checkpoint.open(source) as plain:
        read = WeightSource(plain, plan).dequantized().read_float32
        specs = {name: TensorSpec("F32", info.shape) for name, info in plain.tensors.items()}
        write_sharded(tmp_path / "float", specs, lambda name: [read(name)])
    ids = torch.randint(3, 2000, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = []
    # Without this transformers 5.23 expects zero points that are not packed.
    special = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name == "asymmetric" else {}
    for folder, options in (("q", special), ("float", {})):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.isfinite(logits[0]).all()
    assert (logits[0] - logits[1]).norm() <= 1e-6 * logits[1].norm()


@pytest.mark.parametrize("plan", RECIPES.values(), ids=list(RECIPES))
def test_our_own_reader_gives_the_same_values(checkpoint: MakeCheckpoint, tmp_path: Path, plan: Recipe) -> None:
    quantize_checkpoint(checkpoint("olmoe"), tmp_path / "q", plan, format=FORMAT)
    _, quantised = expected(checkpoint("olmoe"), plan)
    with Checkpoint.open(tmp_path / "q") as stored:
        source = WeightSource(stored)
        assert {name for name in source.shapes if source.scheme(name)} == {f"{module}.weight" for module in quantised}
        for module, wanted in quantised.items():
            for rows in (slice(0, wanted.shape[0]), slice(5, 19)):
                found = source.quantized(f"{module}.weight", rows)
                assert found.scheme == wanted.scheme
                assert np.array_equal(found.codes, wanted.codes[rows])
                assert found.scales.tobytes() == wanted.scales[rows].tobytes()
                assert found.zeros is None or np.array_equal(found.zeros, wanted.rows(rows).zeros)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, None, False), Scheme(8, None), Scheme(4, 32, False)])
@pytest.mark.parametrize("rows", [8, 20, 64, 77])
def test_each_bit_is_where_the_format_says(scheme: Scheme, rows: int) -> None:
    """In blocks of 32 rows, whose zero points lie in words of their own."""
    rng, columns = np.random.default_rng(rows), 96
    codes = rng.integers(0, scheme.levels, (rows, columns), np.uint8)
    groups = scheme.groups(columns)
    zeros = None if scheme.symmetric else rng.integers(0, scheme.levels, (rows, groups), np.uint8)
    scales = rng.standard_normal((rows, groups)).astype(np.float16)
    whole = QuantTensor(pack(codes, scheme.bits), scales, zeros, scheme, (rows, columns))
    layout = CompressedTensorsLayout()
    specs = layout.parts("a.b.weight", whole.shape, scheme)
    types = {"I32": np.int32, "I64": np.int64, "F32": np.float32}
    stored: dict[str, NDArray[Any]] = {key: np.zeros(spec.shape, types[spec.dtype]) for key, spec in specs.items()}
    for start in range(0, rows, layout.row_unit):
        part = whole.rows(slice(start, start + layout.row_unit))
        for key, first, array in layout.blocks("a.b.weight", whole.shape, start, part):
            assert array.dtype == stored[key].dtype
            stored[key][first : first + len(array)] = array
    assert np.array_equal(stored.pop("a.b.weight_packed"), stream(codes.T, scheme.bits).T)
    assert np.array_equal(stored.pop("a.b.weight_scale"), scales.astype(np.float32))
    assert stored.pop("a.b.weight_shape").tolist() == [rows, columns]
    if zeros is not None:
        padded = np.pad(zeros, ((0, -rows % 8), (0, 0)))
        assert np.array_equal(stored.pop("a.b.weight_zero_point"), stream(padded, scheme.bits))
    assert not stored
    assert np.array_equal(unpack(whole.codes, scheme.bits), codes)


def test_blocks_and_shards_do_not_change_the_tensors(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RECIPES["asymmetric"]
    quantize_checkpoint(checkpoint("olmoe"), tmp_path / "one", plan, format=FORMAT, threads=1)
    monkeypatch.setattr(writing, "_BLOCK_BYTES", 5000)
    quantize_checkpoint(checkpoint("olmoe"), tmp_path / "many", plan, format=FORMAT, threads=3, shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    with Checkpoint.open(tmp_path / "one") as one, Checkpoint.open(tmp_path / "many") as many:
        assert set(one.tensors) == set(many.tensors)
        for name in one.tensors:
            assert np.array_equal(one.read_raw(name), many.read_raw(name)), name


def test_calibrated_values_are_stored(tmp_path: Path) -> None:
    """Calibration chooses the same values for both layouts."""
    plan = recipe("int4-g64-sym")
    text = tmp_path / "text.txt"
    text.write_text("def add(left, right):\n    return left + right\n" * 200)
    options: dict[str, Any] = {"text": text, "samples": 4, "length": 32, "threads": 1}
    source = CHECKPOINTS / "olmoe-tiny"
    made = calibrate_checkpoint(source, tmp_path / "q", plan, format=FORMAT, **options)
    assert made.recipe == plan
    calibrate_checkpoint(source, tmp_path / "own", plan, **options)
    with Checkpoint.open(tmp_path / "q") as one, Checkpoint.open(tmp_path / "own") as other:
        found, wanted = WeightSource(one).dequantized(), WeightSource(other).dequantized()
        for name in WeightSource(other).shapes:
            assert np.array_equal(found.read_float32(name), wanted.read_float32(name)), name
        _, rounded = expected(source, plan)
        module = "model.layers.1.self_attn.q_proj"
        assert not np.array_equal(found.read_float32(f"{module}.weight"), dequantize(rounded[module]))
    assert (tmp_path / "q" / "calibration.json").is_file()


def test_presets_take_the_schemes_of_vllm(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for name, options, scheme in (
        ("int4", {"hidden_size": 128, "intermediate_size": 128}, "int4-g128"),
        ("int4", {"hidden_size": 128, "intermediate_size": 64}, "int4-g64"),
        ("int4", {"hidden_size": 128, "intermediate_size": 96}, "int4-g32"),
        ("int4", {"hidden_size": 128, "intermediate_size": 40}, "int4-row"),
        ("int8", {"hidden_size": 128, "intermediate_size": 64}, "int8-row"),
    ):
        source = checkpoint("fox", num_hidden_layers=1, **options)
        made = quantize_checkpoint(source, tmp_path / "q", Recipe.load(name), format=FORMAT, overwrite=True)
        assert made.recipe.name == scheme
        result = CliRunner().invoke(inspect, [str(tmp_path / "q")], catch_exceptions=False)
        assert f"recipe {FORMAT}-{scheme}" in result.output


Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN0 = "model.layers.0.mlp.experts.0.down_proj.weight"
REFUSED: dict[str, tuple[Recipe, str]] = {
    "fp8": (Recipe.load("fp8"), rf"gives {Q0} fp8-row, which {FORMAT} cannot hold: pack-quantized has 4 and 8 bits"),
    "int3": (recipe("int3-g32-sym"), f"gives {Q0} int3-g32-sym, .* 4 and 8 bits in vLLM. To go on, choose among int4"),
    "a group of 16": (recipe("int4-g16-sym"), f"{Q0} int4-g16-sym, .* groups of 32, 64 and 128, and rows"),
    "zero points of 8 bits": (recipe("int8-g32-asym"), f"{Q0} int8-g32-asym, .*: zero points have 4 bits in vLLM"),
    "fp8 cache": (recipe("int4-g64-sym", kv="fp8"), 'has kv = "fp8", .* remove the key, and give vLLM --kv-cache'),
    "int8 activations": (
        recipe("int8-row-sym", activations="int8-token"),
        f'gives {Q0} int8-row-sym, .* float activations, not "int8-token"',
    ),
    "static activations": (recipe("int8-row-sym", activations="int8-static"), 'not "int8-static"'),
    "embedding": (
        recipe("int4-g64-sym", rule("int8-g128-sym", role="embedding")),
        r"gives model\.embed_tokens\.weight int8-g128-sym, .*: the embedding, which stays float there",
    ),
    "head": (recipe("int4-g64-sym", rule("int8-g128-sym", role="head")), r"lm_head\.weight .*: the head, which stays"),
    "router": (recipe("int4-g64-sym", rule("int8-row-sym", role="router")), r"mlp\.gate\.weight .*: the router, which"),
    "query apart from key": (
        recipe("int4-g64-sym", rule("int8-row-sym", role="q")),
        rf"gives {Q0} int8-row-sym and model\.layers\.0\.self_attn\.k_proj\.weight int4-g64-sym, but q, k and v are",
    ),
    "value float": (recipe("int4-g64-sym", rule("float", role="v")), r"v_proj\.weight float, but q, k and v are"),
    "one expert with more bits": (
        recipe("int4-g64-sym", rule("int8-g64-sym", match="*.layers.1.mlp.experts.3.*")),
        r"layers\.1\.mlp\.experts\.3\.gate_proj\.weight int8-g64-sym, but the experts of a layer are computed as one",
    ),
    "experts of two groups": (
        recipe("int4-g128-sym"),
        rf"experts\.0\.gate_proj\.weight int4-g128-sym and {DOWN0} int4-g64-sym, .* a group that divides the rows",
    ),
}


@pytest.mark.parametrize(("plan", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_the_format_cannot_hold_is_refused_by_name(
    checkpoint: MakeCheckpoint, tmp_path: Path, plan: Recipe, said: str
) -> None:
    for write in (quantize_checkpoint, calibrate_checkpoint):
        with pytest.raises(RecipeError, match=said):
            write(checkpoint("olmoe"), tmp_path / "q", plan, format=FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_gate_and_up_of_a_dense_model_have_one_scheme(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    plan = recipe("int4-g64-sym", rule("int8-row-sym", role="up"))
    with pytest.raises(RecipeError, match=r"up_proj\.weight int8-row-sym, but gate and up are computed as one"):
        quantize_checkpoint(checkpoint("fox"), tmp_path / "q", plan, format=FORMAT)


def test_rows_that_do_not_fill_words_are_refused(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("fox", num_hidden_layers=1, intermediate_size=36)
    with pytest.raises(RecipeError, match=r"down_proj\.weight int4-row-sym, .*: its rows of 36 are no multiple of 8"):
        quantize_checkpoint(source, tmp_path / "q", Recipe.load("int4"), format=FORMAT)


Run = Callable[..., Result]


@pytest.fixture
def run(checkpoint: MakeCheckpoint, tmp_path: Path) -> Run:
    """Run `edgelm quantize` on the tiny MoE."""

    def invoke(*options: str, source: str | None = None, out: str = "q") -> Result:
        folder = source or str(checkpoint("olmoe"))
        return CliRunner().invoke(quantize_command, [folder, "-o", str(tmp_path / out), *options])

    return invoke


def test_the_command_writes_it(run: Run, tmp_path: Path) -> None:
    made = run("--format", FORMAT, "--json")
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert (document["format"], document["recipe"]) == (FORMAT, "int4-g64")
    assert document["float_tensors"] == 4 + 2 * 4 + 1
    assert settings(tmp_path / "q")["quant_method"] == FORMAT
    words = run("--format", FORMAT, "--recipe", "int8", out="r").output
    assert f"int8-row, in 0 s\ntry: vllm serve {tmp_path / 'r'}" in words


def test_wrong_input_gives_one_line(run: Run, tmp_path: Path) -> None:
    unknown = run("--format", "gguf")
    assert unknown.exit_code == 2
    assert "'gguf' is not one of 'edgelm', 'compressed-tensors'" in unknown.output
    mixed = run("--format", FORMAT, "--bits", "4.5")
    assert mixed.exit_code == 2
    assert "--bits and --max-size choose schemes that compressed-tensors does not have" in mixed.output
    fp8 = run("--format", FORMAT, "--recipe", "fp8")
    assert isinstance(fp8.exception, RecipeError)
    assert "\n" not in str(fp8.exception)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("x")
    taken = run("--format", FORMAT)
    assert isinstance(taken.exception, EdgeLMError)
    assert "exists already" in str(taken.exception)
    run("--format", FORMAT, out="r")
    again = run("--format", FORMAT, source=str(tmp_path / "r"), out="s")
    assert isinstance(again.exception, RecipeError)
    assert "is already quantised: start from the float checkpoint" in str(again.exception)
    assert run("--format", FORMAT, "--overwrite", out="r").exit_code == 0


def test_an_unknown_format_is_refused_by_the_library_call(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(EdgeLMError, match="no checkpoint format 'gguf' to write: choose edgelm or compressed-tensors"):
        quantize_checkpoint(checkpoint("fox"), tmp_path / "q", Recipe.load("int4"), format="gguf")
