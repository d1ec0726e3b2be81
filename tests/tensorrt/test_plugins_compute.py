"""Do the plugins, called as TensorRT calls them, compute what our own executor does?

Kernels run on the emulator here; TensorRT's part, memory and the order of calls, is played by the test.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgelm.bundle import Bundle
from edgelm.export.tensorrt_graph import plugin_spec
from edgelm.runtimes import open_runtime
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.operators import Operators
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.cuda.weights import DeviceWeights
from edgelm.runtimes.tensorrt.host import BuildHost, DeviceHost, counter_bytes
from edgelm.runtimes.tensorrt.library import Library
from edgelm.runtimes.tensorrt.operators import output_shapes, output_types
from edgelm.runtimes.tensorrt.plugins import STATE, element_types, plugin_class

os.environ.setdefault("EDGELM_EMULATOR_CACHE", str(Path(__file__).parents[2] / "build" / "emulated"))
CAPACITY = 64
WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "int32": 4, "int8": 1}


class Calls:
    """Calls a program's plugins in order, with memory that is each value's own."""

    def __init__(self, bundle: Bundle, rtx: Library) -> None:
        self.program = Program.read(bundle.file(PROGRAM_FILE))
        self.info, self.kv = bundle.manifest.model, bundle.manifest.graph.kv_dtype
        self.device = EmulatedDevice()
        self.device.load(Operators(self.program, self.kv, CAPACITY, self.device.info).kernels())
        self.weights = DeviceWeights(self.device, self.program, bundle.file(bundle.manifest.graph.weights_file))
        self.specs = [plugin_spec(node, self.program.values) for node in self.program.nodes]
        counters = counter_bytes(self.device.info, self.specs, 1, 16, CAPACITY)
        place = self.device.allocate(counters)
        self.device.fill(place, 0, counters)
        STATE.host = DeviceHost(self.device, place)
        self.plugins = [plugin_class(rtx.api)(spec).attach_to_context(None) for spec in self.specs]
        self.types = {ours: theirs for theirs, ours in element_types(rtx.api).items()}
        self.sizes = BuildHost((80,))
        self.caches: dict[str, int] = {}
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        device, program, count = self.device, self.program, len(tokens)
        at: dict[str, tuple[int, tuple[int, ...], str]] = {}
        for name, values in (("input_ids", [tokens]), ("past_lengths", [self.length])):
            array = np.asarray(values, np.int32)
            at[name] = (device.allocate(array.nbytes), array.shape, "int32")
            device.upload(at[name][0], array)
        for name, weight in program.weights.items():
            kind = "f32" if weight.type == "f32" else "int8"
            at[name] = (self.weights.address(name), weight.dims, kind)
        for node, spec, plugin in zip(program.nodes, self.specs, self.plugins, strict=True):
            if node.op == "GroupQueryAttention":
                for name in node.inputs[1:3]:
                    row = Operators(program, self.kv, 1, device.info).cache_bytes(node, 1) // self.info.num_kv_heads
                    shape = (1, self.info.num_kv_heads, CAPACITY, row)
                    if name not in self.caches:
                        self.caches[name] = device.allocate(int(np.prod(shape)))
                    at[name] = (self.caches[name], shape, "int8")
            given = [at[name] for name in node.inputs if name]
            shapes, kinds = [shape for _, shape, _ in given], [kind for _, _, kind in given]
            results = list(zip(output_shapes(spec, shapes), output_types(spec, kinds), strict=True))
            for i, (name, (shape, kind)) in enumerate(zip(node.outputs, results, strict=True)):
                aliased = plugin.get_aliased_input(i)
                place = given[aliased][0] if aliased >= 0 else device.allocate(int(np.prod(shape)) * WIDTHS[kind])
                at[name] = (place, shape, kind)
            size = self.sizes.workspace(spec, shapes, kinds)
            workspace = device.allocate(size)
            described = [SimpleNamespace(dims=shape, type=self.types[kind]) for _, shape, kind in given]
            plugin.enqueue(described, [], [a for a, _, _ in given], [at[n][0] for n in node.outputs], workspace, 0)
            device.free(workspace)
        device.synchronize()
        self.length += count
        out = np.empty(program.values["logits"].width, np.float32)
        device.download(at["logits"][0], out)
        return out


@pytest.mark.parametrize(("checkpoint", "recipe"), [("fox-tiny", "int8"), ("olmoe-tiny", "none")])
def test_plugins_compute_what_the_executor_does(export, rtx: Library, checkpoint: str, recipe: str) -> None:
    bundle = export(checkpoint, recipe)
    before = STATE.host
    calls = Calls(bundle, rtx)
    try:
        with open_runtime(bundle, "cuda-emulated", context_length=CAPACITY) as model:
            for tokens in ([3, 4, 5], [6], [7]):
                want = model.prefill(tokens).copy()
                found = calls.step(tokens)
                np.testing.assert_array_equal(found, want)
                assert np.isfinite(found).all()
    finally:
        calls.device.close()
        STATE.host = before
