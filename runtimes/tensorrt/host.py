"""Runs the nodes of plugins, with the executor's launch code on memory that TensorRT provides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda import sparse_moe
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.operators import Operators, Scratch, Step
from edgelm.runtimes.cuda.program import Node, Program, Value, Weight
from edgelm.runtimes.tensorrt.plugin_spec import OPERATORS, PluginSpec
from edgelm.runtimes.tensorrt.plugins import Host

_MULTIPROCESSORS = 256
"""More multiprocessors than any GPU has: scratch memory is sized before the device is known, and never shrinks with
more."""
_KEPT = 4096
"""Number of cached launch plans, one per node, shape and addresses; the oldest are dropped."""


class BuildHost(Host):
    """Computes sizes only, for building an engine without a GPU.

    Args:
        sms: the devices that the engine is for.
    """

    def __init__(self, sms: Sequence[int]) -> None:
        super().__init__()
        self._devices = [_any_device(sm) for sm in sms]
        self._known: dict[tuple[object, ...], int] = {}

    def workspace(self, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]) -> int:
        """Return the bytes of scratch memory for inputs of at most these shapes, on any of the devices."""
        # TensorRT calls this several times for every layer, profile and tactic.
        fixed = tuple(tuple(map(int, shape)) for shape in shapes)
        key = (spec.op, tuple(spec.attrs.items()), spec.present, spec.results, fixed, tuple(types))
        if key not in self._known:
            self._known[key] = max(scratch_bytes(device, spec, fixed, types)[0] for device in self._devices)
        return self._known[key]


class DeviceHost(Host):
    """Launches on a device whose kernels are loaded.

    Args:
        device: the device.

    Attributes:
        counters: address of zeros, for counters that kernels reset to zeros; see `counter_bytes`. Set after the engine
            is loaded, since the size is known only then.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device: Device | None = device
        self.counters = 0
        self._planned: dict[tuple[object, ...], list[Launch]] = {}

    def run(
        self,
        spec: PluginSpec,
        shapes: Sequence[tuple[int, ...]],
        types: Sequence[str],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch a node's kernels on TensorRT's stream."""
        if self._device is None:
            raise DeviceError(f"{spec.name}: the model of this engine was closed: load the bundle again")
        key = (spec.op, spec.name, tuple(shapes), tuple(inputs), tuple(outputs), workspace)
        launches = self._planned.get(key)
        if launches is None:
            launches = plan(self._device.info, spec, shapes, types, inputs, outputs, Scratch(workspace, self.counters))
            if len(self._planned) >= _KEPT:
                del self._planned[next(iter(self._planned))]
            self._planned[key] = launches
        for launch in launches:
            self._device.launch(launch, stream)

    def close(self) -> None:
        """Release the device. Plugins live as long as the process and still refer to this object."""
        self._device = None
        self._planned.clear()


def plan(
    device: DeviceInfo,
    spec: PluginSpec,
    shapes: Sequence[Sequence[int]],
    types: Sequence[str],
    inputs: Sequence[int],
    outputs: Sequence[int],
    scratch: Scratch,
) -> list[Launch]:
    """Return a node's launches for the shapes, types and addresses of its inputs."""
    node = node_of(spec)
    addresses = {"": 0}
    addresses |= dict(zip((name for name in node.inputs if name), inputs, strict=True))
    addresses |= dict(zip(node.outputs, outputs, strict=True))
    return operators_of(device, spec, shapes, types).launches(node, step_of(shapes), addresses, scratch)


def scratch_bytes(
    device: DeviceInfo, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]
) -> tuple[int, int]:
    """Return a node's bytes of workspace and of counters for inputs of at most these shapes."""
    step = step_of(shapes)
    return operators_of(device, spec, shapes, types).scratch_bytes(step.batch, step.rows)


def counter_bytes(device: DeviceInfo, specs: Sequence[PluginSpec], batch: int, tokens: int, capacity: int) -> int:
    """Return the largest bytes of counters of these nodes, for prefill of one sequence and decoding of all."""
    most = 0
    for spec in specs:
        if spec.op == "GroupQueryAttention":
            # Only these dimensions of the shapes matter.
            cache = (batch, 1, capacity, 1)
            behind = (cache, cache, (batch,), (capacity, 1), (capacity, 1))
            for sequences, new in ((batch, 1), (1, tokens)):
                found = ((sequences, new, 1), *behind)
                shapes = (*found, *((1,),) * (sum(spec.present) - len(found)))
                most = max(most, scratch_bytes(device, spec, shapes, ["f32"] * len(shapes))[1])
        elif spec.op == "SparseMoE":
            most = max(most, sparse_moe.COUNTER_BYTES)
    return most


@lru_cache(maxsize=8192)
def _node(text: str) -> Node:
    spec = PluginSpec.from_text(text)
    operator = OPERATORS[spec.op]
    inputs = tuple(name if there else "" for name, there in zip(operator.inputs, spec.present, strict=False))
    outputs = (*(f"result.{i}" for i in range(len(spec.results))), *(f"present.{i}" for i in operator.aliases))
    return Node(spec.op, spec.name, inputs, outputs, spec.attrs)


def node_of(spec: PluginSpec) -> Node:
    """Return a plugin's node as in a program; its values have the names in the operator's description."""
    return _node(spec.to_text())


def step_of(shapes: Sequence[Sequence[int]]) -> Step:
    """Return the number of sequences and of new tokens per sequence, from the shapes of a node's inputs."""
    return Step(int(shapes[0][0]), int(shapes[0][1]))


def operators_of(
    device: DeviceInfo, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]
) -> Operators:
    """Return the launch code for a program of this single node."""
    node = node_of(spec)
    names = [name for name in node.inputs if name]
    weights = {name: Weight("f32", tuple(map(int, shape)), 0, 1) for name, shape in zip(names, shapes, strict=True)}
    values = {name: Value(kind, int(shape[-1])) for name, shape, kind in zip(names, shapes, types, strict=True)}
    results = [Value(kind, width) for kind, width in spec.results]
    values |= dict(zip(node.outputs, results, strict=False))
    # `Operators` expects a value "logits"; here it is the node's own result.
    values["logits"] = results[0]
    capacity = weights["key_cache"].dims[2] if spec.op == "GroupQueryAttention" else 0
    return Operators(Program((node,), values, weights), str(spec.attrs.get("kv", "float16")), capacity, device)


def _any_device(sm: int) -> DeviceInfo:
    return DeviceInfo(f"SM {sm}", divmod(sm, 10), _MULTIPROCESSORS, 0, (0, 0))
