"""Runs the nodes of plugins, with the executor's launch code on memory that TensorRT provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.operators import Scratch, device_fields, tensor_field
from edgelm.runtimes.tensorrt.plugin_spec import PluginSpec
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
    fields = {**_fields(spec, shapes, types, inputs, outputs), **device_fields(device)}
    return planning.launches("node_launches", {**fields, **asdict(scratch)})


def scratch_bytes(
    device: DeviceInfo, spec: PluginSpec, shapes: Sequence[Sequence[int]], types: Sequence[str]
) -> tuple[int, int]:
    """Return a node's bytes of workspace and of counters for inputs of at most these shapes."""
    batch, tokens = int(shapes[0][0]), int(shapes[0][1])
    fields = _fields(spec, shapes, types, [0] * len(shapes), ())
    sizes = {"batch": batch, "tokens": batch * tokens}
    workspace, counters = planning.call("node_scratch", {**fields, **device_fields(device), **sizes}).split()
    return int(workspace), int(counters)


def counter_bytes(device: DeviceInfo, specs: Sequence[PluginSpec], batch: int, tokens: int, capacity: int) -> int:
    """Return the largest bytes of counters of these nodes, for prefill of one sequence and decoding of all."""
    most = 0
    # Only these dimensions of attention's inputs matter.
    cache = (batch, 1, capacity, 1)
    behind = (cache, cache, (batch,), (capacity, 1), (capacity, 1))
    for spec in (spec for spec in specs if spec.op in ("GroupQueryAttention", "SparseMoE")):
        for sequences, new in ((batch, 1), (1, tokens)):
            found = ((sequences, new, 1), *behind)
            shapes = (*found, *((1,),) * sum(spec.present))[: sum(spec.present)]
            most = max(most, scratch_bytes(device, spec, shapes, ["f32"] * len(shapes))[1])
    return most


def _fields(
    spec: PluginSpec,
    shapes: Sequence[Sequence[int]],
    types: Sequence[str],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> dict[str, planning.Field]:
    """Return the description of a node that the planning in C++ reads; see `Operators`."""
    found: dict[str, planning.Field] = {**spec.attrs, "op": spec.op, "name": spec.name}
    places = (i for i, there in enumerate(spec.present) if there)
    for index, shape, kind, address in zip(places, shapes, types, inputs, strict=True):
        found[f"input.{index}"] = tensor_field(address, kind, shape)
    for index, address in enumerate(outputs):
        found[f"output.{index}"] = tensor_field(address, "f32", ())  # only its address counts
    return found


def _any_device(sm: int) -> DeviceInfo:
    return DeviceInfo(f"SM {sm}", divmod(sm, 10), _MULTIPROCESSORS, 0, (0, 0))
