"""A stand-in for an engine: it calls a program's plugins in order, with memory for every value.

The plugins are called through harness.cc; their driver is tests/cuda/fake_driver.c, which runs emulated kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from harness import Plugins

from edgelm.bundle import Bundle
from edgelm.export.tensorrt.graph import cache_row_bytes, plugin_field
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.cuda.weights import DeviceWeights
from edgelm.runtimes.tensorrt.engine import Tensor

WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "int32": 4, "int8": 1}
Place = tuple[int, tuple[int, ...]]


class PlayedGraph:
    """A bundle's program as plugins, its weights on a device."""

    def __init__(self, bundle: Bundle, device: CudaDevice, plugins: Plugins) -> None:
        self.program = Program.read(bundle.file(PROGRAM_FILE))
        self.model = bundle.manifest.model
        self.row = cache_row_bytes(self.program)
        self.device = device
        self._weights = DeviceWeights(device, self.program, bundle.file(bundle.manifest.graph.weights_file))
        values = self.program.values
        self.plugins = [plugins.loaded(node.op, plugin_field(node, values)) for node in self.program.nodes]
        self._log = plugins
        self._memory: dict[object, int] = {}

    def run(self, bound: Mapping[str, Place], stream: int) -> None:
        """Run a step with inputs and outputs at the bound addresses."""
        program = self.program
        at: dict[str, tuple[int, tuple[int, ...], str]] = {
            name: (self._weights.address(name), weight.dims, "f32" if weight.type == "f32" else "int8")
            for name, weight in program.weights.items()
        }
        for name, (address, shape) in bound.items():
            at[name] = (address, shape, "int8" if name.startswith("past_key_values") else "int32")
        for node, plugin in zip(program.nodes, self.plugins, strict=True):
            given = [at[name] for name in node.inputs if name]
            described = [(kind, shape) for _, shape, kind in given]
            results, aliases = plugin.outputs(described), plugin.aliases()
            assert results is not None, self._log.log
            for name, (kind, shape), alias in zip(node.outputs, results, aliases, strict=True):
                if name in bound:
                    place = bound[name][0]
                elif alias >= 0:
                    place = given[alias][0]
                else:
                    place = self._place((name, shape), int(np.prod(shape)) * WIDTHS[kind])
                at[name] = (place, shape, kind)
            workspace = self._place(tuple(described), plugin.workspace(described))
            places = [at[name][0] for name in node.outputs]
            assert plugin.enqueue(described, [address for address, _, _ in given], places, workspace) == 0, (
                self._log.log
            )

    def _place(self, key: object, nbytes: int) -> int:
        """Return memory, the same for the same key: a captured graph keeps its address."""
        if key not in self._memory:
            self._memory[key] = self.device.allocate(nbytes)
        return self._memory[key]

    def close(self) -> None:
        """Delete the plugins."""
        for plugin in self.plugins:
            plugin.delete()


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
        self.graph.close()


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
        self._engine.graph.run(self._bound, stream)

    def capturable(self, stream: int) -> bool:
        return self._engine.capturable

    def keep_compiled(self) -> None:
        pass

    def close(self) -> None:
        pass
