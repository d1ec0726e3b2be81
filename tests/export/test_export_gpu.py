"""Does `edgelm export --target tensorrt` write the weights exactly, a program, and kernels that compile?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from tiny_models import MakeCheckpoint
from unpack_gpu import unpack_matrix

from edgelm.bundle.gpu_layout import GpuKind
from edgelm.checkpoint import Checkpoint
from edgelm.cli.export import export as export_command
from edgelm.cli.inspect import inspect as inspect_command
from edgelm.errors import EdgeLMError, ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.options import TARGETS as NAMES
from edgelm.export.plan import WEIGHTS_FILE, Plan, make_plan
from edgelm.export.registry import TARGETS
from edgelm.export.tensorrt import target as gpu_target
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.progress import Silent
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.kernels import sources
from edgelm.runtimes.cuda.kernels.images import KernelFolder, compile_bundle_kernels
from edgelm.runtimes.cuda.operators import bundle_kernels
from edgelm.runtimes.cuda.program import Program, matrix_of
from edgelm.tokenization.tokenizer import Tokenizer

ROUTER = '\n[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'
SHORT = GoldenOptions(prompts=(Prompt("short", "a"),), greedy_tokens=0)
FEWER_BITS_V = '\n[[rule]]\nmatch = "*.v_proj.weight"\nscheme = "{}"\n'


def planned(path: Path, recipe: Recipe, dtype: str = "auto") -> tuple[WeightSource, Plan]:
    checkpoint = Checkpoint.open(path)
    source = WeightSource(checkpoint, recipe, threads=1)
    options = ExportOptions(target="tensorrt", dtype=dtype, sms=(86,))
    tokenizer = Tokenizer.from_folder(path)
    target = TARGETS["tensorrt"]
    return source, make_plan(source, tokenizer, options, target, Silent())


class Written:
    """A checkpoint's weights, read back from a bundle for GPUs."""

    def __init__(self, folder: Path, path: Path, recipe: Recipe, dtype: str = "auto") -> None:
        self.source, plan = planned(path, recipe, dtype)
        plan.graphs.weights.write(folder / WEIGHTS_FILE, self.source, 2, lambda amount: None)
        self.program = Program.from_json(plan.graphs.files[plan.graphs.file], "program.json")
        self.blob = (folder / WEIGHTS_FILE).read_bytes()
        self.nodes = {node.outputs[0]: node for node in self.program.nodes}

    def bytes_of(self, name: str) -> bytes:
        weight = self.program.weights[name]
        return self.blob[weight.offset : weight.offset + weight.size]

    def attributes(self, output: str) -> Mapping[str, Any]:
        return self.nodes[output].attrs

    def matrix(self, output: str, name: str, prefix: str = "", index: int = 0) -> NDArray[np.float32]:
        return unpack_matrix(self.bytes_of(name), matrix_of(self.nodes[output], prefix), index)

    def want(self, *names: str) -> NDArray[np.float32]:
        return np.concatenate([self.source.dequantized_float32(name) for name in names])


@pytest.mark.parametrize(
    "scheme", ["int4-g32-sym", "int3-g64-asym", "int6-row-sym", "int8-g32-sym", "fp8-row", "float"]
)
def test_are_the_weights_of_a_moe_exactly_the_checkpoints(
    checkpoint: MakeCheckpoint, tmp_path: Path, scheme: str
) -> None:
    recipe = Recipe.from_toml(f'name = "test"\ndefault = "{scheme}"\n{ROUTER}')
    written = Written(tmp_path, checkpoint("olmoe"), recipe)
    stem = "model.layers.1"
    qkv = written.matrix("layers.1.attn.qkv", "layers.1.attn.qkv.weight")
    assert np.array_equal(qkv, written.want(*(f"{stem}.self_attn.{p}_proj.weight" for p in "qkv")))
    for e in (0, 15):
        expert = f"{stem}.mlp.experts.{e}"
        gate_up = written.matrix("hidden.2", "layers.1.moe.gate_up", "gate_up_", e)
        assert np.array_equal(gate_up, written.want(f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"))
        down = written.matrix("hidden.2", "layers.1.moe.down", "down_", e)
        assert np.array_equal(down, written.want(f"{expert}.down_proj.weight"))
    assert np.array_equal(written.matrix("logits", "lm_head.weight"), written.want("lm_head.weight"))
    router = np.frombuffer(written.bytes_of(f"{stem}.mlp.gate.weight"), np.float32)
    assert np.array_equal(router.reshape(16, -1), written.want(f"{stem}.mlp.gate.weight"))


def test_is_a_tied_table_stored_once_and_are_gate_and_up_one_matrix(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    written = Written(tmp_path, checkpoint("fox", tie_word_embeddings=True), Recipe.load("int4"))
    table = "model.embed_tokens.weight"
    assert written.nodes["logits"].input(1) == table == written.nodes["hidden.0"].input(1)
    assert np.array_equal(written.matrix("logits", table), written.want(table))
    stem = "model.layers.0.mlp"
    found = written.matrix("layers.0.mlp.gate_up", "layers.0.mlp.gate_up.weight")
    assert np.array_equal(found, written.want(f"{stem}.gate_proj.weight", f"{stem}.up_proj.weight"))


def test_are_integers_stacked_with_those_of_more_bits_but_not_with_floats(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def recipe(scheme: str) -> Recipe:
        rule = FEWER_BITS_V.format(scheme)
        return Recipe.from_toml(f'name = "test"\ndefault = "int8-g64-sym"\n{rule}{ROUTER}')

    written = Written(tmp_path, checkpoint("olmoe"), recipe("int4-g32-asym"))
    attributes = written.attributes("layers.0.attn.qkv")
    assert (attributes["kind"], attributes["group"], attributes["zeros"]) == ("int8", 32, 1)
    qkv = written.matrix("layers.0.attn.qkv", "layers.0.attn.qkv.weight")
    assert np.array_equal(qkv, written.want(*(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv")))
    with pytest.raises(ExportError, match=r"int8-g64-sym, float for .*q_proj.* are one matmul on a GPU"):
        planned(checkpoint("olmoe"), recipe("float"))


def test_does_the_debug_program_differ_only_in_types(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    main = Written(tmp_path, checkpoint("olmoe"), Recipe.load("int8")).program
    debug = main.debug()
    assert {"hidden.0", "hidden.1", "hidden.2", "router_logits.0", "router_logits.1"} <= set(debug.values)
    assert debug.weights == main.weights
    for node, exact in zip(main.nodes, debug.nodes, strict=True):
        assert replace(node, attrs={}) == replace(exact, attrs={})
        changed = {key: value for key, value in exact.attrs.items() if value != node.attrs[key]}
        assert (changed and set(changed) <= {"activation", "output", "kv"}) or node.op in (
            "QuantEmbedding",
            "LastToken",
        )
        assert set(changed.values()) <= {"f32", "float32"}


@pytest.mark.parametrize(
    ("dtype", "activation", "kind"), [("auto", "bf16", GpuKind.BFLOAT16), ("fp16", "f16", GpuKind.FLOAT16)]
)
def test_are_values_and_float_matrices_of_the_type_that_was_asked_for(
    checkpoint: MakeCheckpoint, tmp_path: Path, dtype: str, activation: str, kind: GpuKind
) -> None:
    written = Written(tmp_path, checkpoint("fox"), Recipe.load("none"), dtype)
    attributes = written.attributes("layers.0.attn.qkv")
    assert (attributes["activation"], attributes["output"], attributes["kind"]) == (
        activation,
        activation,
        kind,
    )


def test_has_a_bundle_kernels_for_the_devices_asked_and_does_inspect_say_so(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The bundle with the fewest kernels is compiled here; tests/cuda/test_kernels_compile.py compiles all."""
    out = tmp_path / "bundle"
    line = [str(checkpoint("fox")), "-o", str(out), "--target", "tensorrt", "--sm", "86", "--no-engines"]
    done = CliRunner().invoke(export_command, [*line, "--recipe", "none", "--greedy-tokens", "0"])
    assert done.exit_code == 0, done.output
    program = Program.read(out / "program.json")
    folder = KernelFolder(out / "kernels")
    assert set(folder.files) == {"sm_86", "compute_80"}
    assert set(folder.argument_bytes) == set(bundle_kernels(program))
    said = CliRunner().invoke(inspect_command, [str(out), "--verify"])
    assert said.exit_code == 0, said.output
    assert "sm_86" in said.output
    document = json.loads(CliRunner().invoke(inspect_command, [str(out), "--json"]).stdout)
    assert set(document["kernels"]["targets"]) == {"sm_86", "compute_80"}


def test_do_the_kernels_of_a_moe_compile_and_does_inspect_group_its_weights(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()

    def compile_one(names: Sequence[str], *rest: Any) -> None:
        asked.update(names)
        compile_bundle_kernels(list(names)[:1], *rest)

    monkeypatch.setattr(gpu_target, "compile_bundle_kernels", compile_one)
    options = ExportOptions(target="tensorrt", sms=(86,), engines=EngineOptions(build=False), golden=SHORT)
    bundle = export_bundle(checkpoint("olmoe"), tmp_path / "bundle", recipe="int4", options=options)
    assert (bundle.manifest.target, bundle.manifest.ops, bundle.manifest.graph.kv_dtype) == (
        "tensorrt",
        "gpu",
        "float16",
    )
    program = Program.read(bundle.file("program.json"))
    assert (bundle.manifest.graph.file, bundle.manifest.graph.debug_file) == ("program.json", "program.json")
    assert [path.name for path in bundle.path.glob("*.onnx")] == ["model.tensorrt.onnx"]
    assert asked == set(bundle_kernels(program)) <= set(sources.kernels())
    said = CliRunner().invoke(inspect_command, [str(bundle.path), "--verbose"])
    assert said.exit_code == 0, said.output
    assert "16 of 128 x 128 int4-g32, gate and up, 4.50 bits per weight" in said.output
    document = json.loads(CliRunner().invoke(inspect_command, [str(bundle.path), "--json"]).stdout)
    assert sum(group["count"] for group in document["weights"]) == 2 + 2 * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sms": (70,)}, "--sm 70: the kernels need SM 80 or later"),
        ({"sms": (81,)}, r"no NVRTC here compiles for sm_81: .* does for SM .*86"),
        ({"sms": ()}, "the kernels need SM 80 or later"),
        ({"ops": "portable"}, "portable operators run only with ONNX Runtime"),
        ({"dtype": "fp32"}, "the GPU kernels compute in bfloat16 or float16, not float32"),
        ({"target": "cpu", "sms": (86,)}, "--sm is for --target tensorrt"),
    ],
)
def test_are_impossible_options_refused_before_anything_is_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(EdgeLMError, match=said):
        export_bundle(
            checkpoint("fox"),
            tmp_path / "out",
            options=ExportOptions(**{"target": "tensorrt", "sms": (86,), **options}),
        )
    assert not (tmp_path / "out").exists()


def test_is_a_missing_nvrtc_reported_before_hours_of_quantising(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_NVRTC", str(tmp_path / "libnvrtc.so"))
    with pytest.raises(EdgeLMError, match=r"EDGELM_NVRTC=.*not an NVRTC library"):
        export_bundle(checkpoint("fox"), tmp_path / "out", options=ExportOptions(target="tensorrt"))


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('default = "fp8e5m2-row"', "the GPU kernels support only E4M3"),
        ('default = "int4-g32-sym"\nkv = "float32"', 'kv = "float32", which is not supported on GPUs'),
    ],
)
def test_is_a_recipe_that_the_kernels_do_not_support_named(checkpoint: MakeCheckpoint, toml: str, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        planned(checkpoint("olmoe"), Recipe.from_toml(f'name = "test"\n{toml}\n{ROUTER}'))


def test_are_rows_that_tiles_do_not_divide_refused_by_name(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint("fox", hidden_size=128, intermediate_size=96)
    with pytest.raises(ExportError, match=r"down_proj.weight is int4-g32-sym with rows of 96.*multiple of 64"):
        planned(path, Recipe.load("int4"))


def test_does_every_target_have_an_exporter() -> None:
    assert set(NAMES) == set(TARGETS)


def test_is_an_sm_that_is_no_number_a_usage_error(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    line = [str(checkpoint("fox")), "-o", str(tmp_path / "out"), "--target", "tensorrt", "--sm", "ampere"]
    done = CliRunner().invoke(export_command, line)
    assert done.exit_code == 2
    assert "is not a list of compute capabilities" in done.output
