"""Do our plugins describe the operators to TensorRT correctly: shapes, types, aliased caches, attributes?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from played import output_shapes
from programs import WEIGHTS, C, D, E, F, G, H, S, SmallProgram, V

from edgelm.errors import DeviceError, EdgeLMError, ExportError
from edgelm.export.tensorrt.engines import tensorrt_graph
from edgelm.export.tensorrt.graph import plugin_node
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.operators import Scratch
from edgelm.runtimes.cuda.program import Node, Value
from edgelm.runtimes.tensorrt.builder import BuildOptions, build_engine
from edgelm.runtimes.tensorrt.engine_info import plugins_in
from edgelm.runtimes.tensorrt.host import BuildHost, DeviceHost, _any_device, plan
from edgelm.runtimes.tensorrt.library import Library, messages
from edgelm.runtimes.tensorrt.plugin_spec import NAMESPACE, OPERATORS, PluginSpec, output_types
from edgelm.runtimes.tensorrt.plugins import FIELD, plugin_class, serving

SMS = (86,)
PLUGINS = EngineOptions(matmul="plugin")
CACHE = (3, G, C, 2 * S)


def plugins_of(model: onnx.ModelProto) -> list[PluginSpec]:
    """Return the specs of a graph's plugins, in order."""
    found = [{a.name: a.s for a in node.attribute} for node in model.graph.node if node.domain == NAMESPACE]
    return [PluginSpec.from_text(attributes[FIELD].decode()) for attributes in found]


def specs(folder: Path, *, moe: bool = True, after: bool = False) -> list[PluginSpec]:
    made = SmallProgram(folder, layers=1, moe=moe, after=after)
    return plugins_of(tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS).model)


def shapes_of(spec: PluginSpec, batch: int, tokens: int) -> list[tuple[int, ...]]:
    """Return the shapes of the inputs of a plugin of `SmallProgram`."""
    widths = {"QuantLinear": {"layers.0.attn.qkv.weight": D, "layers.0.mlp.gate_up.weight": D, "embed": D}}
    width = widths.get(spec.op, {}).get(spec.name, {"hidden.1.weight": F}.get(spec.name, H * S))
    first = (batch, 1 if spec.name == "embed" and spec.op == "QuantLinear" else tokens)
    known = {
        "ids": first, "table": (1,), "x": (*first, D if spec.op != "QuantLinear" else width), "weights": (1,),
        "norm": (width,), "residual": (*first, D), "router": (E, D), "gate_up": (1,), "down": (1,),
        "qkv": (*first, (H + 2 * G) * S), "key_cache": (batch, *CACHE[1:]), "value_cache": (batch, *CACHE[1:]),
        "past_lengths": (batch,), "cos": (C, S // 2), "sin": (C, S // 2), "q_norm": (H * S,), "k_norm": (G * S,),
        "bias": ((H + 2 * G) * S,), "weight": (D,),
    }  # fmt: skip
    names = (name for name, there in zip(OPERATORS[spec.op].inputs, spec.present, strict=False) if there)
    return [known[name] for name in names]


@pytest.mark.parametrize("moe", [True, False])
def test_shapes_and_types_of_results(tmp_path: Path, moe: bool) -> None:
    found = {}
    for spec in specs(tmp_path, moe=moe):
        shapes = shapes_of(spec, 3, 5)
        types = ["bf16" if spec.op == "GroupQueryAttention" and i == 0 else "int8" for i in range(len(shapes))]
        found[spec.op, spec.name] = list(zip(output_types(spec, types), output_shapes(spec, shapes), strict=True))
    assert found["QuantEmbedding", "embed"] == [("f32", (3, 5, D))]
    assert found["QuantLinear", "layers.0.attn.qkv.weight"] == [("bf16", (3, 5, (H + 2 * G) * S))]
    assert found["QuantLinear", "layers.0.attn_sum.weight"] == [("f32", (3, 5, D))]
    assert found["GroupQueryAttention", "layers.0.attn"] == [("bf16", (3, 5, H * S)), ("int8", CACHE), ("int8", CACHE)]
    assert found["LastToken", "head_input"] == [("f32", (3, 1, D))]
    assert found["QuantLinear", "embed"] == [("f32", (3, 1, V))]
    if moe:
        assert found["SparseMoE", "layers.0.moe"] == [("f32", (3, 5, D)), ("f32", (15, E))]
    else:
        assert found["QuantLinear", "layers.0.mlp.gate_up.weight"] == [("bf16", (3, 5, F))]


@pytest.mark.parametrize("after", [True, False])
def test_tensorrt_infers_the_same(tmp_path: Path, rtx: Library, after: bool) -> None:
    made = SmallProgram(tmp_path, after=after)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    log = messages(rtx).logger
    builder = rtx.api.Builder(log)
    network = builder.create_network(1 << int(rtx.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.api.OnnxParser(network, log)
    with serving(rtx, BuildHost(SMS)):
        assert parser.parse_from_file(str(tmp_path / "g.onnx"))
    types = {"f32": rtx.api.float32, "bf16": rtx.api.bfloat16}
    plugins = [layer for layer in map(network.get_layer, range(network.num_layers)) if "PLUGIN" in str(layer.type)]
    assert len(plugins) == len(made.program.nodes)
    for layer, node in zip(plugins, made.program.nodes, strict=True):
        for i, name in enumerate(node.outputs):
            tensor = layer.get_output(i)
            if name in made.program.values:
                value = made.program.values[name]
                rows = (-1,) if name.startswith("router") else (-1, 1) if name in ("head_input", "logits") else (-1, -1)
                assert (tuple(tensor.shape), tensor.dtype) == ((*rows, value.width), types[value.type]), name
            else:
                assert (tuple(tensor.shape), tensor.dtype) == ((-1, G, -1, 2 * S), rtx.api.int8), name


@pytest.mark.parametrize("moe", [True, False])
def test_plugins_come_back_from_an_engine_as_they_went_in(tmp_path: Path, rtx: Library, moe: bool) -> None:
    made = SmallProgram(tmp_path, moe=moe)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    options = BuildOptions(SMS, max_batch=4, chunk=16)
    info = build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, options, BuildHost(SMS), SMS)
    by_name = lambda spec: (spec.op, spec.name)  # noqa: E731
    assert sorted(plugins_in(tmp_path / "e"), key=by_name) == sorted(plugins_of(graph.model), key=by_name)
    assert sum(info.operators.values()) == len(made.program.nodes)


def test_a_spec_survives_as_text_and_others_are_refused() -> None:
    spec = PluginSpec("layers.3.attn", "LastToken", {"a": 1, "b": 0.1, "c": 'x"\u00e9'}, (True, False), (("f32", 8),))
    assert PluginSpec.from_text(spec.to_text()) == spec
    with pytest.raises(
        EdgeLMError, match=r"the engine has the operator Other, this EdgeLM supports .*: upgrade edgelm"
    ):
        PluginSpec.from_text(spec.to_text().replace("LastToken", "Other"))
    for text in (
        "{}",
        "no",
        spec.to_text().replace('plugin": 1', 'plugin": 2'),
        '{"edgelm_plugin": 1}',
        spec.to_text()[:-1] + ', "deep": ' + "[" * 9999,
    ):
        with pytest.raises(EdgeLMError, match=r"build the engine again|upgrade edgelm"):
            PluginSpec.from_text(text)


def test_a_node_that_is_none_of_ours_is_refused() -> None:
    values = {"x": Value("f32", 8), "y": Value("f32", 8)}
    with pytest.raises(ExportError, match="n: there is no TensorRT plugin for Softmax"):
        plugin_node(Node("Softmax", "n", ("x",), ("y",), {}), values)
    with pytest.raises(ExportError, match=r"n: QuantEmbedding takes ids, table, and needs the first 2"):
        plugin_node(Node("QuantEmbedding", "n", ("x", ""), ("y",), {}), values)
    with pytest.raises(ExportError, match="LastToken takes x"):
        plugin_node(Node("LastToken", "n", ("x", "x", "x"), ("y",), {}), values)


class Failing(BuildHost):
    def workspace(self, spec, shapes, types) -> int:
        raise EdgeLMError(f"{spec.name} cannot be sized")


def test_what_a_plugin_raises_while_building_is_what_the_builder_raises(tmp_path: Path, rtx: Library) -> None:
    made = SmallProgram(tmp_path, layers=1)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    host = Failing(SMS)
    with pytest.raises(EdgeLMError, match=r"^\S+ cannot be sized$"):
        build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, BuildOptions(SMS), host, SMS)
    assert not (tmp_path / "e").exists()
    assert not host.failed


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_plugin_launches_what_the_executor_would(tmp_path: Path, moe: bool, tokens: int) -> None:
    """The launch code is the same. All of TensorRT's addresses occur in the launches, and no others."""
    batch, device = (3, 1)[tokens > 1], _any_device(86)
    for spec in specs(tmp_path, moe=moe, after=tokens == 40):
        shapes = shapes_of(spec, batch, tokens)
        types = ["bf16" if spec.op == "GroupQueryAttention" and not i else "f32" for i in range(len(shapes))]
        inputs = [0x10000 * (i + 1) for i in range(len(shapes))]
        outputs = [0x1000000 * (i + 1) for i in range(spec.outputs)]
        if spec.op == "GroupQueryAttention":
            outputs[1:] = inputs[1:3]
        launches = plan(device, spec, shapes, types, inputs, outputs, Scratch(0x7000000000, 0x7F00000000))
        assert launches
        held = b"".join(launch.args for launch in launches)
        for address in (*inputs, outputs[0]):
            assert address.to_bytes(8, "little") in held, (spec.name, hex(address))


def test_a_norm_plugin_takes_the_type_of_the_matmul_before_it(tmp_path: Path) -> None:
    spec = next(spec for spec in specs(tmp_path, after=True) if spec.op == "RMSNorm")
    shapes = [(3, 5, D), (D,), (3, 5, D)]
    assert spec.present == (True, True, True)
    assert list(zip(output_types(spec, ["bf16", "f32", "f32"]), output_shapes(spec, shapes), strict=True)) == [
        ("f32", (3, 5, D))
    ]
    for kind in ("bf16", "f32"):
        (launch,) = plan(_any_device(86), spec, shapes, [kind, "f32", "f32"], [1, 2, 3], [4], Scratch(5, 0))
        assert (launch.kernel, launch.grid) == (f"rms_norm_{kind}_f32", (15, 1, 1))


def test_a_matmul_plugin_has_a_bias_in_its_spec_only_where_there_is_one(tmp_path: Path, rtx: Library) -> None:
    """So engines without a bias stay unchanged, and old ones can be read."""
    for biased in (False, True):
        made = SmallProgram(tmp_path, layers=1, moe=False, biased=biased)
        graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
        spec = next(spec for spec in plugins_of(graph.model) if spec.name == "layers.0.attn.qkv.weight")
        assert spec.present == ((True, True, True, False, True) if biased else (True, True, True, False))
        shapes, types = shapes_of(spec, 1, 40), ["f32", "uint8", "f32", "f32"][: sum(spec.present)]
        inputs = [0x10000 * (i + 1) for i in range(len(shapes))]
        launches = plan(_any_device(86), spec, shapes, types, inputs, [1], Scratch(0x7000000000, 0))
        assert (0x40000).to_bytes(8, "little") in launches[-1].args or not biased
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    info = build_engine(
        rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, BuildOptions(SMS), BuildHost(SMS), SMS
    )
    assert info.operators["QuantLinear"] == 5
    assert spec in plugins_in(tmp_path / "e")


@pytest.mark.parametrize("per_head", [True, False])
def test_a_norms_shape_says_whether_it_is_per_head(tmp_path: Path, per_head: bool) -> None:
    made = SmallProgram(tmp_path, layers=1, per_head=per_head)
    found = plugins_of(tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS).model)
    spec = next(spec for spec in found if spec.op == "GroupQueryAttention")
    shapes = shapes_of(spec, 1, 40)
    if per_head:
        shapes[6:] = [(S,), (S,)]
    (last,) = {
        launch.args[-4:]
        for launch in plan(_any_device(86), spec, shapes, ["bf16"] * 8, [*range(1, 9)], [9, 2, 3], Scratch(1, 0))
    }
    assert int.from_bytes(last, "little") == (3 if per_head else 0)  # AttentionArgs.per_head_norms


def test_a_cache_that_is_not_written_in_place_is_refused(tmp_path: Path, rtx: Library) -> None:
    spec = next(spec for spec in specs(tmp_path) if spec.op == "GroupQueryAttention")
    host = DeviceHost(EmulatedDevice())
    plugin = plugin_class(rtx.api)(spec, host)
    assert [plugin.get_aliased_input(i) for i in range(3)] == [-1, 1, 2]
    with pytest.raises(DeviceError, match="did not alias the cache's output"):
        plugin.enqueue([], [], list(range(8)), [100, 1, 77], 0, 0)
    assert "did not alias" in str(host.take_failure())


def test_a_failure_is_reported_to_the_engine_of_the_failed_plugin(tmp_path: Path, rtx: Library) -> None:
    spec = specs(tmp_path)[0]
    hosts = [BuildHost(SMS), DeviceHost(EmulatedDevice())]
    plugins = []
    for host in hosts:
        with serving(rtx, host):
            plugins.append(plugin_class(rtx.api)(spec, host))
    with serving(rtx, BuildHost(SMS)):  # a third model is loaded meanwhile
        plugins = [plugin.clone().attach_to_context(None) for plugin in plugins]
    hosts[1].close()
    described = [SimpleNamespace(dims=(1, 1), type=rtx.api.int32)] * 2
    for plugin, said in zip(plugins, ("cannot run one", "was closed"), strict=True):
        with pytest.raises(DeviceError, match=said):
            plugin.enqueue(described, [], [1, 2], [3], 0, 0)
    for host, said in zip(hosts, ("cannot run one", "was closed"), strict=True):
        assert said in str(host.take_failure())
        assert host.take_failure() is None
