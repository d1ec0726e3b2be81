"""Does TensorRT compute exactly the parts that the options assign to it? TensorRT-RTX builds everything here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from programs import WEIGHTS, C, G, S, SmallProgram

from edgelm.checkpoint import Checkpoint
from edgelm.errors import ExportError
from edgelm.export.activations import static_scale
from edgelm.export.tensorrt.engines import TensorRtGraph, tensorrt_graph
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.planning import library_path
from edgelm.runtimes.tensorrt import rowmajor
from edgelm.runtimes.tensorrt.build import ROWS_FILE
from edgelm.runtimes.tensorrt.builder import BuildOptions, GraphShape, build_engine, profiles
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.plugins import PluginLibrary


def built(folder: Path, rtx: Library, graph: TensorRtGraph, sms: tuple[int, ...]) -> dict[str, int]:
    """Build an engine of the graph; return its number of plugins by operator."""
    (folder / "g.onnx").write_bytes(graph.model.SerializeToString())
    rowmajor.write(graph.recipe.rows, folder / WEIGHTS, folder / ROWS_FILE)
    options, plugins = BuildOptions(sms, max_batch=4, chunk=16), PluginLibrary(library_path())
    return build_engine(
        rtx, folder / "g.onnx", folder / "e", graph.recipe.shape, options, plugins, sms
    ).operators  # fmt: skip


def with_static_scales(made: SmallProgram) -> SmallProgram:
    nodes = tuple(
        dataclasses.replace(node, attrs={**node.attrs, "input_scale": 0.02}) if node.op == "QuantLinear" else node
        for node in made.program.nodes
    )
    made.program = dataclasses.replace(made.program, nodes=nodes)
    return made


@pytest.mark.parametrize("sm", [86, 89, 120])
@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("moe", [True, False])
def test_dense_matmuls_are_the_engines_where_it_has_them(tmp_path, rtx, moe, kind, sm) -> None:
    made = with_static_scales(SmallProgram(tmp_path, layers=1, moe=moe, kind=kind))
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(), (sm,))
    fp8_on_ampere = kind == "fp8" and sm < 89
    assert graph.recipe.fp8 == (kind == "fp8" and not fp8_on_ampere)
    dense = 2 if moe else 4
    assert built(tmp_path, rtx, graph, (sm,))["QuantLinear"] == (1 + dense if fp8_on_ampere else 1)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_a_bias_is_added_in_float32_before_the_result_is_rounded_to_its_type(tmp_path, rtx, kind: str) -> None:
    made = with_static_scales(SmallProgram(tmp_path, layers=1, moe=False, kind=kind, biased=True))
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(), (89,))
    nodes = {name: node for node in graph.model.graph.node for name in node.output}
    last = nodes["layers.0.attn.qkv"]
    (add,) = (node for node in nodes.values() if "bias.0" in node.input)
    assert (add.op_type, nodes[add.input[0]].op_type, last.op_type) == ("Add", "Cast", "Cast")
    assert list(last.input) == list(add.output)
    assert built(tmp_path, rtx, graph, (89,))["QuantLinear"] == 1


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_without_a_calibrated_scale_plugins_compute_quantised_matmuls(tmp_path: Path, kind: str) -> None:
    made = SmallProgram(tmp_path, layers=1, moe=False, kind=kind)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(), (89,))
    assert graph.recipe.rows == []
    assert sum(node.op_type == "EdgeLMQuantLinear" for node in graph.model.graph.node) == 5


def test_plugins_compute_everything_where_that_is_asked(tmp_path: Path) -> None:
    made = SmallProgram(tmp_path, layers=1, moe=False)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(matmul="plugin"), (89,))
    assert {node.domain for node in graph.model.graph.node} == {"edgelm"}
    assert len(graph.model.graph.node) == len(made.program.nodes)


@pytest.mark.parametrize("kv", ["float16", "bfloat16"])
@pytest.mark.parametrize("moe", [True, False])
def test_attention_can_be_the_engines(tmp_path: Path, rtx: Library, moe: bool, kv: str) -> None:
    made = SmallProgram(tmp_path, layers=2, moe=moe, kv=kv)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(attention="engine"), (86, 89, 120))
    assert "GroupQueryAttention" not in built(tmp_path, rtx, graph, (86, 89, 120))
    dims = [
        [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
        for value in graph.model.graph.input
        if value.name.startswith("past_key")
    ]
    assert dims == [[G, C, S]] * 4  # TensorRT fixes the capacity of its own caches


@pytest.mark.parametrize("per_head", [True, False])
def test_the_engines_norm_spans_what_its_weight_does(tmp_path: Path, rtx: Library, per_head: bool) -> None:
    made = SmallProgram(tmp_path, layers=1, per_head=per_head)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(attention="engine"), (86,))
    makers = {name: node for node in graph.model.graph.node for name in node.output}
    norms = [
        node for node in graph.model.graph.node if node.op_type == "RMSNormalization" and "_norm." in node.input[1]
    ]
    assert [node.input[1] for node in norms] == ["q_norm.0", "k_norm.0"]
    for node in norms:  # heads are separated before a norm per head, but after a norm over all heads
        assert makers[node.input[0]].op_type == ("Transpose" if per_head else "Cast")
    assert "GroupQueryAttention" not in built(tmp_path, rtx, graph, (86,))


def test_attention_of_the_engine_has_no_int8_cache(tmp_path: Path) -> None:
    made = SmallProgram(tmp_path, layers=1, kv="int8")
    with pytest.raises(
        ExportError, match="TensorRT's own attention does not support int8 caches: leave --attention out"
    ):
        tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(attention="engine"), (86,))


@pytest.mark.parametrize("kv", ["int8", "fp8", "float16", "bfloat16"])
def test_every_cache_is_built_with_the_plugin(tmp_path: Path, rtx: Library, kv: str) -> None:
    made = SmallProgram(tmp_path, layers=1, kv=kv)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, EngineOptions(), (86,))
    assert built(tmp_path, rtx, graph, (86,))["GroupQueryAttention"] == 1


def test_matmul_is_engine_or_plugin() -> None:
    with pytest.raises(ExportError, match="matmul is 'x': it can be engine or plugin"):
        EngineOptions(matmul="x")


def test_ranges_of_shapes() -> None:
    """One token of many sequences, or many tokens of one; caches of any capacity up to the model's context."""
    inputs = {"input_ids": (-1, -1), "past_lengths": (-1,), "past_key_values.0.key": (-1, 2, -1, 64)}
    decode, prefill = profiles(inputs, GraphShape(4096, "float16"), BuildOptions((86,), max_batch=8, chunk=256))
    assert decode["input_ids"] == ((1, 1), (1, 1), (8, 1))
    assert prefill["input_ids"] == ((1, 1), (1, 256), (1, 256))
    assert decode["past_lengths"] == ((1,), (1,), (8,))
    assert decode["past_key_values.0.key"] == ((1, 2, 64, 64), (1, 2, 4096, 64), (8, 2, 4096, 64))
    assert prefill["past_key_values.0.key"] == ((1, 2, 64, 64), (1, 2, 4096, 64), (1, 2, 4096, 64))


def test_the_calibrated_scale_of_stacked_matrices_is_their_largest() -> None:
    checkpoint = Checkpoint.open(Path(__file__).parents[2] / "examples" / "checkpoints" / "fox-tiny")
    text = 'name = "static"\ndefault = "int8-row-sym"\nactivations = "int8-static"\n'
    source = WeightSource(checkpoint, Recipe.from_toml(text), threads=1)
    names = [f"model.layers.0.self_attn.{which}_proj.weight" for which in "qkv"]
    assert static_scale(source, names) == {}  # no calibration has found any
    scales = dict(zip(names, (0.1, 0.3, 0.2), strict=True))
    source.input_scale = scales.get  # type: ignore[method-assign]
    assert static_scale(source, names) == {"input_scale": 0.3}
    del scales[names[1]]
    assert static_scale(source, names) == {}
    other = WeightSource(checkpoint, Recipe.load("int8"), threads=1)
    other.input_scale = lambda name: 0.1  # type: ignore[method-assign]
    assert static_scale(other, names) == {}
