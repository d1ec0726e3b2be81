"""Python's side of harness.cc: a stand-in for TensorRT that calls plugins as TensorRT does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.tensorrt.plugin_spec import PREFIX

TYPES = {"f32": 0, "f16": 1, "int8": 2, "int32": 3, "uint8": 5, "bf16": 7}
NAMES = {number: name for name, number in TYPES.items()}
BUILD, RUNTIME = 0, 1
STREAM = 1
Described = tuple[str, tuple[int, ...]]
"""A tensor: type and dimensions."""


class TensorDesc(ctypes.Structure):
    """`TensorDesc` of abi.h."""

    class Dims(ctypes.Structure):
        _fields_ = (("rank", ctypes.c_int32), ("d", ctypes.c_int64 * 8))

    _fields_ = (
        ("dims", Dims),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


def descs(tensors: Sequence[Described], layout: int = 0) -> ctypes.Array[TensorDesc]:
    """Return the tensors as an array of `TensorDesc`."""
    made = (TensorDesc * len(tensors))()
    for one, (kind, dims) in zip(made, tensors, strict=True):
        one.dims.rank, one.type, one.format = len(dims), TYPES[kind], layout
        one.dims.d[: len(dims)] = dims
    return made


class Plugins:
    """A library of plugins that is loaded."""

    def __init__(self, harness: ctypes.CDLL, path: Path, major: int = 11) -> None:
        self.harness = harness
        self.handle = harness.harness_load(str(path).encode(), major)
        assert self.handle, path

    def create(self, op: str, text: str | bytes, phase: int = BUILD) -> Plugin | None:
        """Create a plugin from its field."""
        data = text.encode() if isinstance(text, str) else text
        creator = self.harness.harness_creator(self.handle, f"{PREFIX}{op}".encode())
        made = self.harness.harness_create(creator, data, len(data), phase)
        return Plugin(self.harness, made) if made else None

    def loaded(self, op: str, text: str) -> Plugin:
        """Create the plugin of a graph, then as TensorRT does that of an engine from its serialised field, for a
        context."""
        built = self.create(op, text)
        assert built is not None, self.log
        again = self.create(op, built.serialized, RUNTIME)
        assert again is not None, self.log
        return again.attached()

    @property
    def log(self) -> list[str]:
        """The lines of TensorRT's log."""
        return str(self.harness.harness_log().decode()).splitlines()


class Plugin:
    """A plugin."""

    def __init__(self, harness: ctypes.CDLL, address: int) -> None:
        self.harness, self.address = harness, address

    def attached(self) -> Plugin:
        """Return the plugin of an execution context."""
        return Plugin(self.harness, self.harness.harness_attach(self.address))

    def cloned(self) -> Plugin:
        """Return a clone."""
        return Plugin(self.harness, self.harness.harness_clone(self.address))

    def delete(self) -> None:
        """Delete the plugin, as TensorRT does when an engine or a context is closed."""
        self.harness.harness_delete(self.address)

    @property
    def serialized(self) -> bytes:
        """The serialised field."""
        length = ctypes.c_int32()
        data = self.harness.harness_serialized(self.address, ctypes.byref(length))
        return ctypes.string_at(data, length.value)

    def outputs(self, inputs: Sequence[Described]) -> list[Described] | None:
        """Return types and dimensions of the outputs; None if the plugin fails."""
        results = (TensorDesc * self.harness.harness_output_count(self.address))()
        if self.harness.harness_outputs(self.address, descs(inputs), len(inputs), results):
            return None
        return [(NAMES[one.type], tuple(one.dims.d[: one.dims.rank])) for one in results]

    def aliases(self) -> list[int]:
        """Return the input that each output aliases, -1 for none."""
        count = self.harness.harness_output_count(self.address)
        return [self.harness.harness_aliased(self.address, i) for i in range(count)]

    def supports(self, tensors: Sequence[Described], inputs: int, at: int, layout: int = 0) -> bool:
        """Whether the plugin takes a tensor with those before it."""
        made = descs(tensors)
        made[at].format = layout
        return bool(self.harness.harness_supports(self.address, made, inputs, len(tensors) - inputs, at))

    def workspace(self, inputs: Sequence[Described]) -> int:
        """Return the bytes of scratch memory for inputs of at most these dimensions."""
        return int(self.harness.harness_workspace(self.address, descs(inputs), len(inputs)))

    def enqueue(
        self,
        inputs: Sequence[Described],
        addresses: Sequence[int],
        results: Sequence[int],
        workspace: int,
        stream: int = STREAM,
    ) -> int:
        """Run the plugin; return its status."""
        given = (ctypes.c_void_p * len(addresses))(*addresses)
        outputs = (ctypes.c_void_p * len(results))(*results)
        return int(
            self.harness.harness_enqueue(
                self.address, descs(inputs), len(inputs), None, given, outputs, workspace, stream
            )
        )


_POINTERS = ("load", "creator", "create", "clone", "attach", "serialized")


def open_harness(path: Path) -> ctypes.CDLL:
    """Load harness.cc's library."""
    harness = ctypes.CDLL(str(path))
    for name in _POINTERS:
        getattr(harness, f"harness_{name}").restype = ctypes.c_void_p
    harness.harness_log.restype = ctypes.c_char_p
    harness.harness_supports.restype = ctypes.c_bool
    harness.harness_workspace.restype = ctypes.c_size_t
    pointer, number, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    harness.harness_creator.argtypes = [pointer, text]
    harness.harness_create.argtypes = [pointer, text, number, number]
    for name in ("clone", "attach", "delete", "output_count"):
        getattr(harness, f"harness_{name}").argtypes = [pointer]
    harness.harness_serialized.argtypes = [pointer, pointer]
    harness.harness_aliased.argtypes = [pointer, number]
    harness.harness_outputs.argtypes = [pointer, pointer, number, pointer]
    harness.harness_supports.argtypes = [pointer, pointer, number, number, number]
    harness.harness_workspace.argtypes = [pointer, pointer, number]
    harness.harness_enqueue.argtypes = [pointer, pointer, number, pointer, pointer, pointer, pointer, pointer]
    return harness


_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p
)


class RecordingDriver:
    """The driver of recording_driver.c, which notes launches and runs none.

    Args:
        path: its library.
        argument_bytes: bytes of the arguments of each kernel.

    Attributes:
        launches: all launches.
    """

    def __init__(self, path: Path, argument_bytes: dict[str, int]) -> None:
        self.launches: list[Launch] = []
        self._argument_bytes = argument_bytes
        self._callback = _LAUNCH(self._launch)
        self._library = ctypes.CDLL(str(path))
        self._library.recording_driver.argtypes = [_LAUNCH, *[ctypes.c_int] * 3]
        for name in ("allocated", "early"):
            getattr(self._library, f"recording_driver_{name}").restype = ctypes.c_long
        self.show()

    def show(self, *, sm: int = 86, version: int = 13000, capturing: bool = False) -> None:
        """Have a device of this SM, a driver of this version of CUDA, and streams that are captured or not."""
        self._library.recording_driver(self._callback, sm, version, capturing)

    @property
    def allocated(self) -> int:
        """The number of buffers that were not freed."""
        return int(self._library.recording_driver_allocated())

    @property
    def early(self) -> int:
        """The number of launches that may start before the previous kernel has ended."""
        return int(self._library.recording_driver_early())

    def _launch(self, kernel: bytes, grid: ctypes.Array[ctypes.c_uint], block: int, shared: int, args: int) -> None:
        name = kernel.decode()
        data = ctypes.string_at(args, self._argument_bytes[name])
        self.launches.append(Launch(name, (grid[0], grid[1], grid[2]), block, shared, data))
