"""What runs the plugins' nodes: the launch code that the executor has too, on the memory that TensorRT gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Device, DeviceInfo
from edgelm.runtimes.cuda.launch import Launch
from edgelm.runtimes.cuda.operators import Operators, Scratch, Step
from edgelm.runtimes.cuda.program import Node, Program, Weight
from edgelm.runtimes.tensorrt.operators import OPERATORS, PluginSpec

_MULTIPROCESSORS = 256
"""More than any GPU has: scratch memory is reserved before the device is known, and more of them never need less."""
_KEPT = 4096
"""Launches are planned once for each node, shape and place; of more the oldest are forgotten."""


class BuildHost:
    """Sizes only: what an engine is built with, where there may be no GPU.

    Args:
        sms: the devices that the engine is for.
    """

    def __init__(self, sms: Sequence[int]) -> None:
        self._capabilities = [divmod(sm, 10) for sm in sms]

    def workspace(self, spec: PluginSpec, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of scratch memory for inputs of at most these shapes, on any of the devices."""
        fixed = tuple(tuple(shape) for shape in shapes)
        return max(
            operators_of(spec, fixed, _MULTIPROCESSORS, capability).workspace_bytes(node_of(spec), step_of(spec, fixed))
            for capability in self._capabilities
        )

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
        """Refuse: there are no kernels."""
        raise DeviceError(f"{spec.name}: this process builds engines, it cannot run one")


class DeviceHost:
    """Launches on a device whose kernels are loaded.

    Args:
        device: the device.
        counters: address of zeros, for counters that kernels leave as zeros; see `counter_bytes`.
    """

    def __init__(self, device: Device, counters: int) -> None:
        self._device = device
        self._counters = counters
        self._planned: dict[tuple[object, ...], list[Launch]] = {}

    def workspace(self, spec: PluginSpec, shapes: Sequence[Sequence[int]]) -> int:
        """Not asked of an engine that is built."""
        raise DeviceError(f"{spec.name}: this process runs an engine, it does not build one")

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
        key = (spec.op, spec.name, tuple(shapes), tuple(inputs), tuple(outputs), workspace)
        launches = self._planned.get(key)
        if launches is None:
            launches = plan(self._device.info, spec, shapes, inputs, outputs, Scratch(workspace, self._counters))
            if len(self._planned) >= _KEPT:
                del self._planned[next(iter(self._planned))]
            self._planned[key] = launches
        for launch in launches:
            self._device.launch(launch, stream)


def plan(
    device: DeviceInfo,
    spec: PluginSpec,
    shapes: Sequence[tuple[int, ...]],
    inputs: Sequence[int],
    outputs: Sequence[int],
    scratch: Scratch,
) -> list[Launch]:
    """A node's launches for the shapes and addresses of the inputs that it has."""
    node = node_of(spec)
    addresses = {"": 0}
    addresses |= dict(zip((name for name in node.inputs if name), inputs, strict=True))
    addresses |= dict(zip(node.outputs, outputs, strict=True))
    fixed = tuple(shapes)
    operators = operators_of(spec, fixed, device.multiprocessors, device.capability)
    return operators.launches(node, step_of(spec, fixed), addresses, scratch)


def counter_bytes(specs: Sequence[PluginSpec], batch: int, tokens: int, capacity: int) -> int:
    """Bytes of counters that any of these nodes wants in steps of at most so many sequences and tokens."""
    most = 0
    for spec in specs:
        if spec.op != "GroupQueryAttention":
            continue
        # Of the shapes only these dimensions count; the width is not looked at.
        cache, lengths = (batch, 1, capacity, 1), (batch,)
        for sequences, new in ((batch, 1), (1, tokens)):
            shapes = ((sequences, new, 1), cache, cache, lengths, (capacity, 1), (capacity, 1))
            found = shapes + ((1,),) * (sum(spec.present) - len(shapes))
            operators = operators_of(spec, found, _MULTIPROCESSORS, (8, 0))
            most = max(most, operators.counter_bytes(node_of(spec), step_of(spec, found)))
    return most


@lru_cache(maxsize=8192)
def _node(text: str) -> Node:
    spec = PluginSpec.from_text(text)
    operator = OPERATORS[spec.op]
    inputs = tuple(name if there else "" for name, there in zip(operator.inputs, spec.present, strict=True))
    outputs = (*(f"result.{i}" for i in range(len(spec.results))), *(f"present.{i}" for i in operator.aliases))
    return Node(spec.op, spec.name, inputs, outputs, spec.attrs)


def node_of(spec: PluginSpec) -> Node:
    """The node of a program that a plugin is; its values are named as in the operator's description."""
    return _node(spec.to_text())


def step_of(spec: PluginSpec, shapes: Sequence[Sequence[int]]) -> Step:
    """Sequences and new tokens of each, of the shapes of the inputs that a node has."""
    first = shapes[0]
    return Step(int(first[0]), int(first[1]) if len(first) > 1 and spec.op != "Argmax" else 1)


def operators_of(
    spec: PluginSpec, shapes: Sequence[tuple[int, ...]], multiprocessors: int, capability: tuple[int, int]
) -> Operators:
    """The launch code for a program of this node alone."""
    node, capacity = node_of(spec), 0
    weights = {
        name: Weight("f32", tuple(shape), 0, 1)
        for name, shape in zip((name for name in node.inputs if name), shapes, strict=True)
    }
    if spec.op == "GroupQueryAttention":
        capacity = int(weights["key_cache"].dims[2])
    kv = str(spec.attrs.get("kv", "float16"))
    return Operators(Program((node,), {}, weights), kv, capacity, multiprocessors, capability)
