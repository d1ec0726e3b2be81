"""A stand-in for TensorRT on the emulator: it calls a program's plugins in order, with memory for every value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgelm.bundle import Bundle
from edgelm.bundle.kv_cache import row_bytes
from edgelm.export.tensorrt.graph import plugin_spec
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.cuda.weights import DeviceWeights
from edgelm.runtimes.tensorrt.engine import Tensor
from edgelm.runtimes.tensorrt.host import BuildHost
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.plugin_spec import Dim, PluginSpec, Term, output_types, result_terms
from edgelm.runtimes.tensorrt.plugins import FIELD, PREFIX, Host, creator_class, element_types, serving

WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "int32": 4, "int8": 1}
Place = tuple[int, tuple[int, ...]]


def output_shapes(spec: PluginSpec, shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the shapes of a node's outputs, given the shapes of its inputs."""
    places = spec.spread(shapes)

    def value(term: Term) -> int:
        if isinstance(term, int):
            return term
        dims = (term,) if isinstance(term, Dim) else term
        return math.prod(int(places[dim.input][dim.axis]) for dim in dims)

    return [tuple(map(value, terms)) for terms in result_terms(spec)]


class PlayedGraph:
    """A bundle's program as plugins, its weights on an emulated device."""

    def __init__(self, bundle: Bundle, device: EmulatedDevice, rtx: Library, host: Host) -> None:
        self.program = Program.read(bundle.file(PROGRAM_FILE))
        self.model = bundle.manifest.model
        self.row = row_bytes(bundle.manifest.graph.kv_dtype, self.model.head_dim, "gpu")
        self.device = device
        self.specs = [plugin_spec(node, self.program.values) for node in self.program.nodes]
        self._weights = DeviceWeights(device, self.program, bundle.file(bundle.manifest.graph.weights_file))
        with serving(rtx, host):
            self._plugins = [_loaded(rtx, spec).attach_to_context(None) for spec in self.specs]
        self._types = {ours: theirs for theirs, ours in element_types(rtx.api).items()}
        self._sizes = BuildHost((80,))

    def run(self, bound: Mapping[str, Place]) -> None:
        """Run a step with inputs and outputs at the bound addresses."""
        program, device = self.program, self.device
        at: dict[str, tuple[int, tuple[int, ...], str]] = {
            name: (self._weights.address(name), weight.dims, "f32" if weight.type == "f32" else "int8")
            for name, weight in program.weights.items()
        }
        for name, (address, shape) in bound.items():
            at[name] = (address, shape, "int8" if name.startswith("past_key_values") else "int32")
        mine = []
        for node, spec, plugin in zip(program.nodes, self.specs, self._plugins, strict=True):
            given = [at[name] for name in node.inputs if name]
            shapes, kinds = [shape for _, shape, _ in given], [kind for _, _, kind in given]
            results = list(zip(output_shapes(spec, shapes), output_types(spec, kinds), strict=True))
            for i, (name, (shape, kind)) in enumerate(zip(node.outputs, results, strict=True)):
                if name in bound:
                    place = bound[name][0]
                else:
                    aliased = plugin.get_aliased_input(i)
                    place = given[aliased][0] if aliased >= 0 else device.allocate(int(np.prod(shape)) * WIDTHS[kind])
                    mine += [place] if aliased < 0 else []
                at[name] = (place, shape, kind)
            workspace = device.allocate(self._sizes.workspace(spec, shapes, kinds))
            described = [SimpleNamespace(dims=shape, type=self._types[kind]) for _, shape, kind in given]
            plugin.enqueue(
                described, [], [a for a, _, _ in given], [at[name][0] for name in node.outputs], workspace, 1
            )
            for place in (workspace, *(mine if node is program.nodes[-1] else ())):
                device.free(place)


def _loaded(rtx: Library, spec: PluginSpec) -> Any:
    """Create a plugin as TensorRT does when it loads an engine: from its serialised field alone."""
    field = SimpleNamespace(name=FIELD, data=np.frombuffer(spec.to_text().encode(), np.int8))
    return creator_class(rtx.api)(spec.op).create_plugin(f"{PREFIX}{spec.op}", [field], None)


class PlayedDevice(EmulatedDevice):
    """The emulator with the other functions that a session needs. Its single stream runs everything at once."""

    stream = 1

    def __init__(self) -> None:
        super().__init__((8, 6))
        self.captured = 0

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def start_upload(self, address: int, pinned: np.ndarray, stream: int = 0) -> None:
        self.upload(address, pinned)

    def start_download(self, pinned: np.ndarray, address: int, stream: int = 0) -> None:
        self.download(address, pinned)

    def capture(self, work: Any) -> Any:
        self.captured += 1
        return work


class PlayedEngine:
    """Stand-in for `edgelm.runtimes.tensorrt.engine.Engine`."""

    def __init__(self, graph: PlayedGraph, path: Any, *, capturable: bool = True) -> None:
        self.graph, self.path, self.capturable = graph, path, capturable
        names = ["input_ids", "past_lengths"]
        caches = [f"{i}.{which}" for i in range(graph.model.num_layers) for which in ("key", "value")]
        names += [f"past_key_values.{cache}" for cache in caches]
        self.tensors = [Tensor(name, True, 1 if "past_key" in name else 4) for name in names]
        self.tensors.append(Tensor("logits", False, 4))
        self.tensors += [Tensor(f"present.{cache}", False, 1) for cache in caches]

    def input_shape(self, name: str) -> tuple[int, ...]:
        shapes = {"input_ids": (-1, -1), "past_lengths": (-1,)}
        return shapes.get(name, (-1, self.graph.model.num_kv_heads, -1, self.graph.row))

    def activation_bytes(self) -> int:
        return 0

    def context(self, profile: int, *_: Any) -> PlayedContext:
        return PlayedContext(self)

    def close(self) -> None:
        pass


class PlayedContext:
    """Stand-in for `edgelm.runtimes.tensorrt.engine.Context`."""

    def __init__(self, engine: PlayedEngine) -> None:
        self._engine = engine
        self._bound: dict[str, Place] = {}

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        self._bound[name] = (address, tuple(shape) if shape is not None else self._bound.get(name, (0, ()))[1])

    def run(self, stream: int) -> None:
        missing = {tensor.name for tensor in self._engine.tensors} - self._bound.keys()
        assert not missing, missing
        for name, place in self._bound.items():
            if name.startswith("present."):
                assert place[0] == self._bound[name.replace("present", "past_key_values")][0]
        self._engine.graph.run(self._bound)

    def capturable(self, stream: int) -> bool:
        return self._engine.capturable

    def keep_compiled(self) -> None:
        pass

    def close(self) -> None:
        pass
