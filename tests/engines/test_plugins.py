"""Do our plugins describe the operators to TensorRT correctly, launch what the executor does, and report their errors?

`harness.cc` calls them as TensorRT does; TensorRT-RTX itself parses and builds with them too.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import onnx
import pytest
from harness import BUILD, RUNTIME, Described, Plugin, Plugins, RecordingDriver
from kernel_folders import argument_bytes, index_only
from programs import WEIGHTS, C, D, E, F, G, H, S, SmallProgram, V

from edgelm.errors import BundleError, DeviceError, EdgeLMError, RuntimeUnavailableError
from edgelm.export.tensorrt.engines import tensorrt_graph
from edgelm.export.tensorrt.graph import plugin_node
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.kernels.images import KernelFolder
from edgelm.runtimes.cuda.program import Node, Value
from edgelm.runtimes.tensorrt.builder import BuildOptions, build_engine
from edgelm.runtimes.tensorrt.engine_info import EMBEDDED, LIBRARY, plugins_in
from edgelm.runtimes.tensorrt.library import Library, messages
from edgelm.runtimes.tensorrt.plugin_spec import FIELD, NAMESPACE, PluginSpec, plugin_text
from edgelm.runtimes.tensorrt.plugins import PluginLibrary, library_name, write_library

SMS = (86,)
PLUGINS = EngineOptions(matmul="plugin")
CACHE = (3, G, C, 2 * S)
COUNTERS = 0x123456789ABCDE00
INPUTS = {
    "QuantEmbedding": ("ids", "table"), "QuantLinear": ("x", "weights", "norm", "residual", "bias"),
    "SparseMoE": ("x", "router", "gate_up", "down", "norm"), "RMSNorm": ("x", "weight", "residual"),
    "GroupQueryAttention": ("qkv", "key_cache", "value_cache", "past_lengths", "cos", "sin", "q_norm", "k_norm"),
    "LastToken": ("x",),
}  # fmt: skip


def fields_of(model: onnx.ModelProto) -> list[str]:
    """Return the fields of a graph's plugins, in order."""
    found = [{a.name: a.s for a in node.attribute} for node in model.graph.node if node.domain == NAMESPACE]
    return [attributes[FIELD].decode() for attributes in found]


def fields(folder: Path, *, moe: bool = True, after: bool = False) -> list[str]:
    made = SmallProgram(folder, layers=1, moe=moe, after=after)
    return fields_of(tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS).model)


def inputs_of(field: str, batch: int, tokens: int) -> dict[str, Described]:
    """Return type and shape of the inputs of a plugin of `SmallProgram`, by the operator's name for each."""
    spec = PluginSpec.from_text(field)
    widths = {"layers.0.attn.qkv.weight": D, "layers.0.mlp.gate_up.weight": D, "embed": D, "hidden.1.weight": F}
    width = widths.get(spec.name, H * S)
    first = (batch, 1 if spec.name == "embed" and spec.op == "QuantLinear" else tokens)
    known = {
        "ids": ("int32", first), "table": ("int8", (1,)), "weights": ("int8", (1,)), "norm": ("f32", (width,)),
        "x": ("f32", (*first, D if spec.op != "QuantLinear" else width)), "residual": ("f32", (*first, D)),
        "router": ("f32", (E, D)), "gate_up": ("int8", (1,)), "down": ("int8", (1,)),
        "qkv": ("bf16", (*first, (H + 2 * G) * S)), "key_cache": ("int8", (batch, *CACHE[1:])),
        "value_cache": ("int8", (batch, *CACHE[1:])), "past_lengths": ("int32", (batch,)),
        "cos": ("f32", (C, S // 2)), "sin": ("f32", (C, S // 2)), "q_norm": ("f32", (H * S,)),
        "k_norm": ("f32", (G * S,)), "bias": ("f32", ((H + 2 * G) * S,)), "weight": ("f32", (D,)),
    }  # fmt: skip
    present = spec.fields["present"]
    return {name: known[name] for name, there in zip(INPUTS[spec.op], present, strict=False) if there == "1"}


@pytest.fixture
def library(tmp_path: Path) -> PluginLibrary:
    """A library with the kernels of a bundle."""
    index_only([], SMS, tmp_path / "kernels")
    write_library(KernelFolder(tmp_path / "kernels"), tmp_path / "plugins.so")
    return PluginLibrary(tmp_path / "plugins.so")


@pytest.fixture
def plugins(harness: ctypes.CDLL, library: PluginLibrary) -> Plugins:
    return Plugins(harness, library.path)


def created(plugins: Plugins, field: str) -> Plugin:
    return plugins.loaded(PluginSpec.from_text(field).op, field)


# -- what TensorRT asks when it builds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [True, False])
def test_shapes_and_types_of_results(tmp_path: Path, plugins: Plugins, moe: bool) -> None:
    found = {}
    for field in fields(tmp_path, moe=moe):
        spec = PluginSpec.from_text(field)
        found[spec.op, spec.name] = created(plugins, field).outputs(list(inputs_of(field, 3, 5).values()))
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


def test_caches_are_written_in_place_and_tensors_are_row_major(tmp_path: Path, plugins: Plugins) -> None:
    for field in fields(tmp_path):
        plugin, spec = created(plugins, field), PluginSpec.from_text(field)
        inputs = list(inputs_of(field, 3, 5).values())
        results = plugin.outputs(inputs)
        assert plugin.aliases() == ([-1, 1, 2] if spec.op == "GroupQueryAttention" else [-1] * len(results))
        tensors = [*inputs, *results]
        for at, (kind, dims) in enumerate(tensors):
            assert plugin.supports(tensors, len(inputs), at)
            assert not plugin.supports(tensors, len(inputs), at, layout=1)
            if at >= len(inputs):
                other = [*tensors[:at], ("f16" if kind == "f32" else "f32", dims), *tensors[at + 1 :]]
                assert not plugin.supports(other, len(inputs), at), (spec.name, at)


def test_scratch_memory_is_that_of_the_planning(tmp_path: Path, plugins: Plugins) -> None:
    """It is sized for the largest device, since the engine's is not known."""
    for field in fields(tmp_path):
        spec, inputs = PluginSpec.from_text(field), inputs_of(field, 4, 24)
        request = {**spec.fields, **numbered(spec, inputs), "sm": 90, "multiprocessors": 256}
        first = next(iter(inputs.values()))[1]
        request |= {"batch": first[0], "tokens": first[0] * first[1]}
        expected, _ = planning.call("node_scratch", request).split()
        assert created(plugins, field).workspace(list(inputs.values())) == int(expected), spec.name


def numbered(spec: PluginSpec, inputs: dict[str, Described], addresses: dict[str, int] | None = None) -> dict[str, str]:
    """Return the inputs as the planning's fields (csrc/cuda/host/node.h)."""
    places = {name: i for i, name in enumerate(INPUTS[spec.op])}
    return {
        f"input.{places[name]}": f"{(addresses or {}).get(name, 0)}:{kind}:{','.join(map(str, dims))}"
        for name, (kind, dims) in inputs.items()
    }


@pytest.mark.parametrize("after", [True, False])
def test_tensorrt_infers_the_same(tmp_path: Path, rtx: Library, library: PluginLibrary, after: bool) -> None:
    made = SmallProgram(tmp_path, after=after)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    log = messages(rtx).logger
    builder = rtx.api.Builder(log)
    library.load_into(builder.get_plugin_registry(), "this TensorRT")
    network = builder.create_network(1 << int(rtx.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.api.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "g.onnx"))
    types = {"f32": rtx.api.float32, "bf16": rtx.api.bfloat16}
    layers = [layer for layer in map(network.get_layer, range(network.num_layers)) if "PLUGIN" in str(layer.type)]
    assert len(layers) == len(made.program.nodes)
    for layer, node in zip(layers, made.program.nodes, strict=True):
        for i, name in enumerate(node.outputs):
            tensor = layer.get_output(i)
            if name in made.program.values:
                value = made.program.values[name]
                rows = (-1,) if name.startswith("router") else (-1, 1) if name in ("head_input", "logits") else (-1, -1)
                assert (tuple(tensor.shape), tensor.dtype) == ((*rows, value.width), types[value.type]), name
            else:
                assert (tuple(tensor.shape), tensor.dtype) == ((-1, G, -1, 2 * S), rtx.api.int8), name


@pytest.mark.parametrize(("moe", "embed"), [(True, False), (False, False), (True, True)])
def test_plugins_come_back_from_an_engine_as_they_went_in(
    tmp_path: Path, rtx: Library, library: PluginLibrary, harness: ctypes.CDLL, moe: bool, embed: bool
) -> None:
    made = SmallProgram(tmp_path, moe=moe)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    options = BuildOptions(SMS, max_batch=4, chunk=16, embed_plugins=embed)
    info = build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, options, library, SMS)
    found = plugins_in(tmp_path / "e")
    (built_by,) = {spec.fields["library"] for spec in found}
    assert len(built_by) == 12
    went_in = [PluginSpec.from_text(f"{field.rstrip()}\nlibrary={built_by}\n\n") for field in fields_of(graph.model)]
    by_name = lambda spec: (spec.op, spec.name)  # noqa: E731
    assert sorted(found, key=by_name) == sorted(went_in, key=by_name)
    assert sum(info.operators.values()) == len(made.program.nodes)
    assert info.plugins == (EMBEDDED if embed else LIBRARY)
    # An embedded library is in the engine as it is in its file, kernels included, and works from there.
    data, whole = (tmp_path / "e").read_bytes(), library.path.read_bytes()
    place = data.find(whole)
    assert (place >= 0) == embed
    if embed:
        (tmp_path / "extracted.so").write_bytes(data[place : place + len(whole)])
        again = Plugins(harness, tmp_path / "extracted.so").create(found[0].op, (field_in(data)), RUNTIME)
        assert again is not None


def field_in(engine: bytes) -> bytes:
    """Return the bytes of the first serialised field in an engine."""
    spec = next(part for part in engine.split(b"edgelm_plugin=2\n")[1:] if b"\0" not in part.split(b"\n\n")[0])
    return b"edgelm_plugin=2\n" + spec.split(b"\n\n")[0] + b"\n\n"


def test_tensorrt_loads_a_library_from_inside_an_engine(
    tmp_path: Path, rtx: Library, library: PluginLibrary, harness: ctypes.CDLL, recorder: RecordingDriver
) -> None:
    """Without a GPU the engine itself is refused after that. The kernels are in the file that TensorRT extracts."""
    made = SmallProgram(tmp_path, layers=1)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    options = BuildOptions(SMS, max_batch=4, chunk=16, embed_plugins=True)
    build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, options, library, SMS)
    runtime = rtx.api.Runtime(messages(rtx).logger)
    runtime.temporary_directory = str(tmp_path)
    runtime.tempfile_control_flags = 1 << int(rtx.api.TempfileControlFlag.ALLOW_TEMPORARY_FILES)
    runtime.deserialize_cuda_engine((tmp_path / "e").read_bytes())
    messages(rtx).take()
    names = {creator.name for creator in runtime.get_plugin_registry().all_creators}
    assert names >= {f"EdgeLM{op}" for op in INPUTS}
    extracted = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    (path,) = extracted - {str(library.path)}
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    assert run_one(Plugins(harness, Path(path)), field) == 0
    assert len(recorder.launches) == 1
    # A library that is there already is refused.
    loaded = rtx.api.Runtime(messages(rtx).logger)
    library.load_into(loaded.get_plugin_registry(), "this TensorRT")
    assert loaded.deserialize_cuda_engine((tmp_path / "e").read_bytes()) is None
    assert "EdgeLMQuantEmbedding exists already" in messages(rtx).take()


def test_a_matmul_plugin_has_a_bias_only_where_there_is_one(tmp_path: Path, rtx: Library, library, plugins) -> None:
    for biased in (False, True):
        made = SmallProgram(tmp_path, layers=1, moe=False, biased=biased)
        graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
        field = next(one for one in fields_of(graph.model) if "\nname=layers.0.attn.qkv.weight\n" in one)
        assert PluginSpec.from_text(field).fields["present"] == ("11101" if biased else "111")
        assert list(inputs_of(field, 1, 40)) == ["x", "weights", "norm", *(["bias"] if biased else [])]
    (tmp_path / "g.onnx").write_bytes(graph.model.SerializeToString())
    info = build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, BuildOptions(SMS), library, SMS)
    assert info.operators["QuantLinear"] == 5


# -- what it launches --------------------------------------------------------------------------------------------------


def enqueued(plugin: Plugin, field: str, inputs: dict[str, Described], workspace: int = 0x7000000000) -> int:
    """Run a plugin with made-up addresses; return its status."""
    addresses = [0x10000 * (i + 1) for i in range(len(inputs))]
    results = [0x1000000 * (i + 1) for i in range(len(plugin.aliases()))]
    for i, alias in enumerate(plugin.aliases()):
        if alias >= 0:
            results[i] = addresses[alias]
    return plugin.enqueue(list(inputs.values()), addresses, results, workspace)


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_plugin_launches_what_the_planning_says(
    tmp_path: Path, plugins: Plugins, recorder: RecordingDriver, moe: bool, tokens: int
) -> None:
    """The counters are the plugin's own; all other addresses are TensorRT's."""
    batch = (3, 1)[tokens > 1]
    for field in fields(tmp_path, moe=moe, after=tokens == 40):
        spec, inputs = PluginSpec.from_text(field), inputs_of(field, batch, tokens)
        plugin = created(plugins, field)
        recorder.launches.clear()
        assert enqueued(plugin, field, inputs) == 0, plugins.log
        addresses = {name: 0x10000 * (i + 1) for i, name in enumerate(inputs)}
        held = b"".join(launch.args for launch in recorder.launches)
        for address in addresses.values():
            assert address.to_bytes(8, "little") in held, (spec.name, hex(address))
        outputs = {f"output.{i}": f"{0x1000000 * (i + 1)}:f32:1" for i in range(len(plugin.aliases()))}
        request = {**spec.fields, **numbered(spec, inputs, addresses), **outputs, "sm": 86, "multiprocessors": 4}
        expected = planning.launches("node_launches", {**request, "workspace": 0x7000000000, "counters": COUNTERS})
        assert [(one.kernel, one.grid, one.block, one.shared) for one in recorder.launches] == [
            (one.kernel, one.grid, one.block, one.shared) for one in expected
        ]
        counters = COUNTERS.to_bytes(8, "little")
        for one, other in zip(recorder.launches, expected, strict=True):
            place = other.args.find(counters)
            mine = one.args[:place] + counters + one.args[place + 8 :] if place >= 0 else one.args
            assert mine == other.args, spec.name
        plugin.delete()


def test_counters_are_zeros_of_each_context_and_freed_with_it(
    tmp_path: Path, plugins: Plugins, recorder: RecordingDriver
) -> None:
    field = next(one for one in fields(tmp_path) if "op=SparseMoE" in one)
    inputs = inputs_of(field, 1, 1)
    before = recorder.allocated
    contexts = [created(plugins, field), created(plugins, field)]
    contexts.append(contexts[0].cloned())
    for plugin in contexts:
        for _ in range(2):
            assert enqueued(plugin, field, inputs) == 0
    assert recorder.allocated == before + 3
    routed = {launch.args for launch in recorder.launches if launch.kernel.startswith("moe_route")}
    assert len(routed) == 3  # each has its own
    for plugin in contexts:
        plugin.delete()
    assert recorder.allocated == before


def test_a_first_call_in_a_capture_does_without_counters(
    tmp_path: Path, plugins: Plugins, recorder: RecordingDriver
) -> None:
    field = next(one for one in fields(tmp_path) if "op=GroupQueryAttention" in one)
    inputs, plugin = inputs_of(field, 3, 1), created(plugins, field)
    counts = []
    for capturing in (True, False, True):
        recorder.show(capturing=capturing)
        recorder.launches.clear()
        assert enqueued(plugin, field, inputs) == 0, plugins.log
        counts.append(len(recorder.launches))
    assert counts == [2, 1, 1]
    plugin.delete()


def test_other_shapes_or_addresses_are_planned_anew(
    tmp_path: Path, plugins: Plugins, recorder: RecordingDriver
) -> None:
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    plugin = created(plugins, field)
    for batch, workspace in ((1, 1), (1, 1), (2, 1), (2, 2), (1, 1)):
        assert enqueued(plugin, field, inputs_of(field, batch, 1), workspace) == 0
    assert [launch.grid[0] for launch in recorder.launches] == [1, 1, 2, 2, 1]


@pytest.mark.parametrize("asked", ["1", "0"])
def test_kernels_that_wait_themselves_are_launched_early_where_asked(
    tmp_path: Path, harness: ctypes.CDLL, recorder: RecordingDriver, monkeypatch, asked: str
) -> None:
    monkeypatch.setenv("EDGELM_GPU_PDL", asked)
    field = next(one for one in fields(tmp_path) if "op=SparseMoE" in one)
    index_only([], SMS, tmp_path / "kernels")
    index = tmp_path / "kernels" / "kernels.json"
    waits = [name for name in argument_bytes() if name.startswith("moe_route")]
    index.write_text(index.read_text().replace('"resources": {}', f'"waits": {json.dumps(waits)}, "resources": {{}}'))
    write_library(KernelFolder(tmp_path / "kernels"), tmp_path / "early.so")
    before = recorder.early
    assert run_one(Plugins(harness, tmp_path / "early.so"), field) == 0
    routes = [launch for launch in recorder.launches if launch.kernel in waits]
    assert len(recorder.launches) > len(routes) > 0
    assert recorder.early - before == (len(routes) if asked == "1" else 0)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def failure(library: PluginLibrary) -> EdgeLMError:
    """Return the error that the library has kept for Python."""
    found = library.take_failure()
    assert found is not None
    assert library.take_failure() is None
    return found


def test_a_field_is_checked_when_a_graph_is_exported() -> None:
    values = {"x": Value("f32", 8), "y": Value("f32", 8)}
    with pytest.raises(BundleError, match="there is no TensorRT plugin for Softmax, only for QuantEmbedding, QuantL"):
        plugin_node(Node("Softmax", "n", ("x",), ("y",), {}), values)
    with pytest.raises(BundleError, match=r"n: QuantEmbedding takes ids, table, and needs the first 2; the node has 1"):
        plugin_node(Node("QuantEmbedding", "n", ("x", ""), ("y",), {}), values)
    with pytest.raises(BundleError, match="LastToken takes x"):
        plugin_node(Node("LastToken", "n", ("x", "x", "x"), ("y",), {}), values)


def test_a_field_survives_as_text_and_others_are_refused(plugins: Plugins, library: PluginLibrary) -> None:
    lines = {"op": "LastToken", "name": 'x"\u00e9=', "present": "10", "results": "f32:8", "a": 1, "b": 0.1}
    text = plugin_text(lines)
    spec = PluginSpec.from_text(text)
    assert spec.fields == {name: str(value) for name, value in lines.items()}
    for damaged, said in (
        (text.replace("plugin=2", "plugin=1"), "has the field edgelm_plugin=1, not that of this version"),
        ("", "has the field , not that of this version of EdgeLM: build the engine again"),
        ("edgelm_plugin=2\n\n", "name is missing"),
        (text.replace("LastToken", "Other"), "there is no TensorRT plugin for Other"),
        (text.replace("f32:8", "f64:8"), "has the result f64:8"),
        (text.replace("f32:8", "f32:0"), "has the result f32:0"),
        (text.replace("f32:8", "f32:8,f32:8"), "has 2 results"),
        (text.replace("present=10", "present=1x"), "the node has 1x"),
        (text.replace("LastToken", "RMSNorm").replace("=10", "=11"), "EdgeLMLastToken has the field of a RMSNorm"),
    ):
        assert plugins.create("LastToken", damaged) is None
        assert said in str(failure(library)), damaged
    with pytest.raises(EdgeLMError, match="build the engine again"):
        PluginSpec.from_text(text.replace("op=", "po="))


def test_an_engine_of_another_library_is_refused(plugins: Plugins, library: PluginLibrary) -> None:
    text = plugin_text({"op": "LastToken", "name": "n", "present": "1", "results": "f32:8"})
    built = plugins.create("LastToken", text)
    assert built is not None
    again = plugins.create("LastToken", built.serialized, RUNTIME)
    assert again is not None
    assert again.serialized == built.serialized
    other = text.rstrip() + "\nlibrary=0123456789ab\n\n"
    for phase in (BUILD, RUNTIME):
        assert plugins.create("LastToken", other, phase) is None
        assert "n: the engine was built with another libedgelm_plugins.so (0123456789ab, this one is " in str(
            failure(library)
        )
    assert plugins.create("LastToken", text, RUNTIME) is None
    assert "(none, this one is" in str(failure(library))


@pytest.mark.parametrize("major", [10, 11])
def test_errors_are_in_tensorrts_log(harness: ctypes.CDLL, library: PluginLibrary, major: int) -> None:
    """TensorRT 11 has another interface of its log than 10."""
    plugins = Plugins(harness, library.path, major)
    assert plugins.create("LastToken", "nonsense") is None
    (line,) = plugins.log
    assert line.startswith(f"{major}: edgelm: a plugin has the field nonsense")
    failure(library)


def test_without_a_log_errors_are_on_standard_error(harness: ctypes.CDLL, library: PluginLibrary, capfd) -> None:
    """A TensorRT of unknown version may have any interface."""
    plugins = Plugins(harness, library.path, 9)
    assert plugins.create("LastToken", "nonsense") is None
    assert plugins.log == []
    assert "edgelm: a plugin has the field nonsense" in capfd.readouterr().err
    failure(library)


def test_a_plugin_that_fails_while_building_is_what_the_builder_raises(tmp_path: Path, rtx: Library, library) -> None:
    made = SmallProgram(tmp_path, layers=1)
    graph = tensorrt_graph(made.program, made.info, WEIGHTS, PLUGINS, SMS)
    options = BuildOptions(SMS)
    data = graph.model.SerializeToString()
    last = data.rindex(b"kind=bf16")
    # One is refused when the graph is parsed, one when its scratch memory is sized.
    for damaged, said in (
        (data.replace(b"present=11", b"present=x1", 1), "the node has x1"),
        (data[:last] + b"kind=xx16" + data[last + 9 :], "weights of the kind xx16"),
    ):
        (tmp_path / "g.onnx").write_bytes(damaged)
        with pytest.raises(BundleError, match=said):
            build_engine(rtx, tmp_path / "g.onnx", tmp_path / "e", graph.recipe.shape, options, library, SMS)
        assert not (tmp_path / "e").exists()
        assert library.take_failure() is None


def test_a_library_that_tensorrt_cannot_load_is_named(tmp_path: Path, rtx: Library) -> None:
    (tmp_path / "x.so").write_bytes(b"nothing")
    registry = rtx.api.Builder(messages(rtx).logger).get_plugin_registry()
    with pytest.raises(RuntimeUnavailableError, match=r"this TensorRT does not load .*x\.so: .*`edgelm build`"):
        PluginLibrary(tmp_path / "x.so").load_into(registry, "this TensorRT")


def test_a_cache_that_is_not_written_in_place_is_refused(tmp_path: Path, plugins: Plugins, library, recorder) -> None:
    field = next(one for one in fields(tmp_path) if "op=GroupQueryAttention" in one)
    plugin, inputs = created(plugins, field), list(inputs_of(field, 3, 1).values())
    assert plugin.enqueue(inputs, list(range(8)), [100, 1, 77], 0) == 1
    assert "layers.0.attn: TensorRT did not alias the cache's output with its input" in str(failure(library))
    assert recorder.launches == []


def run_one(plugins: Plugins, field: str) -> int:
    return enqueued(created(plugins, field), field, inputs_of(field, 1, 1))


def test_what_a_device_lacks_is_said(tmp_path: Path, harness: ctypes.CDLL, library, recorder) -> None:
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    plugins = Plugins(harness, library.path)
    recorder.show(sm=90)
    assert run_one(plugins, field) == 1
    error = failure(library)
    assert isinstance(error, DeviceError)
    assert "this GPU is SM 90, and the bundle has kernels for sm_86: export with --sm 90" in str(error)
    assert plugins.log[-1].endswith(str(error))


def test_a_kernel_of_another_version_is_refused(tmp_path: Path, harness, recorder) -> None:
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    index_only([], SMS, tmp_path / "kernels")
    index = tmp_path / "kernels" / "kernels.json"
    whole = index.read_text()
    kernel = "quant_embedding_bf16_f32"
    size = argument_bytes()[kernel]
    for name, changed, said in (
        ("a.so", whole.replace(f'"{kernel}": {size}', f'"{kernel}": 8'), f"{kernel} takes 8 bytes of arguments, and"),
        ("b.so", whole.replace(f'"{kernel}"', '"other"'), f"the bundle lacks the kernel {kernel}"),
    ):
        assert changed != whole
        index.write_text(changed)
        write_library(KernelFolder(tmp_path / "kernels"), tmp_path / name)
        other = PluginLibrary(tmp_path / name)
        assert run_one(Plugins(harness, other.path), field) == 1
        assert said in str(failure(other))
    assert recorder.launches == []


def test_the_installed_library_has_no_kernels(tmp_path: Path, harness, recorder) -> None:
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    installed = PluginLibrary(planning.library_path())
    assert run_one(Plugins(harness, installed.path), field) == 1
    assert "has no kernels: load the one in the bundle's folder engines" in str(failure(installed))


def test_damaged_kernels_are_an_error(tmp_path: Path, harness, library: PluginLibrary, recorder) -> None:
    field = next(one for one in fields(tmp_path) if "op=QuantEmbedding" in one)
    whole = library.path.read_bytes()
    place = int.from_bytes(whole[-24:-16], "little")
    footer = place.to_bytes(8, "little") + (len(whole)).to_bytes(8, "little") + whole[-8:]
    for name, data, said in (
        ("a.so", whole[:-24] + footer, "its index lies outside the file"),
        ("b.so", whole.replace(b"sm_86.offset=", b"sm_86.offset=9"), "its kernels are damaged (sm_86)"),
        (
            "c.so",
            whole.replace(b"compiler=12.6", b"compiler=12-6"),
            "a version of CUDA is 12-6, expected one like 13.0",
        ),
    ):
        (tmp_path / name).write_bytes(data)
        other = PluginLibrary(tmp_path / name)
        assert run_one(Plugins(harness, other.path), field) == 1
        assert said in str(failure(other))


def test_a_library_is_named_by_its_contents(library: PluginLibrary, tmp_path: Path) -> None:
    name = library_name(library.path)
    assert name == library_name(library.path)
    (tmp_path / "other").write_bytes(library.path.read_bytes() + b"x")
    assert library_name(tmp_path / "other") != name
