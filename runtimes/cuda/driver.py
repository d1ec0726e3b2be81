"""A GPU through the NVIDIA driver library: memory, kernels, streams, CUDA graphs. No CUDA toolkit is needed."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import statistics
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import DeviceError, DeviceMemoryError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch
from edgelm.runtimes.cuda.driver_library import OUT_OF_MEMORY, VISIBLE_VARIABLE, Driver, LaunchConfig
from edgelm.runtimes.cuda.kernels.images import Image
from edgelm.sizes import format_size

__all__ = [
    "INDEX_VARIABLE",
    "CudaDevice",
    "Graph",
    "KernelSource",
    "chosen_device",
    "chosen_index",
    "current_gpu",
    "find_devices",
]

INDEX_VARIABLE = "EDGELM_GPU"
"""Environment variable: the number of the GPU to use, counted from 0 among those that CUDA_VISIBLE_DEVICES shows. Empty
is the same as unset; the driver takes an empty CUDA_VISIBLE_DEVICES for no GPU."""
PDL_VARIABLE = "EDGELM_GPU_PDL"
"""Environment variable: 1 enables programmatic dependent launch (PDL) from SM 90 on: a kernel may start before the
previous one has ended. Not yet tested on a GPU."""
OLDEST = (8, 0)
"""The lowest compute capability that the kernels support."""

# Constants of the driver API.
_MULTIPROCESSORS, _MAJOR, _MINOR, _MOST_SHARED = 16, 75, 76, 97
_DYNAMIC_SHARED = 8
_NON_BLOCKING, _NO_TIMING, _CAPTURE_THIS_THREAD = 1, 2, 1
_JIT_ERROR_LOG, _JIT_ERROR_LOG_SIZE = 5, 6
# Bytes of shared memory that a kernel may use without setting an attribute.
_SHARED = 48 << 10
# Copies pass through two pinned buffers of this size: while one is copied to the GPU, the other is filled.
_STAGING = 8 << 20


class KernelSource(Protocol):
    """A source of compiled kernels: a bundle's folder, or the compiler."""

    def image(self, names: Sequence[str], capability: tuple[int, int], driver: tuple[int, int]) -> Image:
        """Return an image that has these kernels and runs on the device; see `KernelFolder.image`."""


@dataclass
class _Function:
    handle: int
    argument_bytes: int
    pdl: bool
    shared: int = _SHARED


class Graph:
    """A CUDA graph. Calling it launches all captured kernels."""

    def __init__(self, device: CudaDevice, handle: int) -> None:
        self._device, self._handle = device, handle

    def __call__(self) -> None:
        """Launch the graph on the device's own stream."""
        self._device.call("cuGraphLaunch", self._handle, self._device.stream)

    def close(self) -> None:
        """Free the graph. Closing the device does so too."""
        if self._handle:
            self._device.call("cuGraphExecDestroy", self._handle)
            self._handle = 0


class CudaDevice(Device):
    """One GPU. It uses the process's primary context, so that other libraries can share its memory.

    Args:
        kernels: the source of compiled kernels.
        index: number of the GPU among those that CUDA_VISIBLE_DEVICES shows; default EDGELM_GPU, otherwise 0.
        library: path of the driver library, if not the system's.
        pdl: use programmatic dependent launch for kernels that support it: they start before the previous kernel has
            ended and wait for its results themselves; default EDGELM_GPU_PDL, otherwise off.

    Attributes:
        pdl: as above; applies to all later launches and captures.

    Raises:
        DeviceError: there is no driver, no GPU of this number, or the GPU is too old.
    """

    def __init__(
        self, kernels: KernelSource, index: int | None = None, library: str | None = None, pdl: bool | None = None
    ) -> None:
        self._driver = Driver(library)
        self._kernels = kernels
        self.pdl = os.environ.get(PDL_VARIABLE) == "1" if pdl is None else pdl
        self.index = chosen_index(_count(self._driver), index)
        ordinal = _integer(self._driver, "cuDeviceGet", self.index)
        self.info = _describe(self._driver, ordinal)
        if self.info.capability < OLDEST:
            raise DeviceError(
                f"{self.info.name} has compute capability {'{}.{}'.format(*self.info.capability)}, and the kernels "
                f"need {'{}.{}'.format(*OLDEST)} (Ampere, 2020) or newer: use --target cuda or cpu"
            )
        self._most_shared = _integer(self._driver, "cuDeviceGetAttribute", _MOST_SHARED, ordinal)
        self._ordinal: int | None = ordinal
        self._context = self._handle("cuDevicePrimaryCtxRetain", ordinal, doing="making a context")
        self._thread: int | None = None
        self._capturing = False
        self._modules: list[tuple[int, Image]] = []
        self._functions: dict[str, _Function] = {}
        self._buffers: dict[int, int] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self._graphs: list[Graph] = []
        self._staging: list[tuple[NDArray[np.uint8], int]] = []
        self.stream = self._handle("cuStreamCreate", _NON_BLOCKING)
        """The handle of the device's own stream, for other libraries."""

    def call(self, function: str, *args: object, allowed: Container[int] = (), doing: str = "") -> int:
        """Call a driver function in this device's context; see `Driver.call`."""
        thread = threading.get_ident()
        if thread != self._thread:
            self._driver.call("cuCtxSetCurrent", self._context)
            self._thread = thread
        return self._driver.call(function, *args, allowed=allowed, doing=doing)

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of the GPU's memory, counting all processes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    @property
    def allocated(self) -> int:
        """Bytes that were allocated and not freed."""
        return sum(self._buffers.values())

    def allocate(self, nbytes: int) -> int:
        """See `Device.allocate`."""
        assert not self._capturing, "allocate memory before launches are captured"
        address = ctypes.c_ulonglong()
        status = self.call("cuMemAlloc", ctypes.byref(address), max(nbytes, 1), allowed=(OUT_OF_MEMORY,))
        if status == OUT_OF_MEMORY:
            free, total = self.memory()
            raise DeviceMemoryError(
                f"{self.info.name} has {format_size(free)} of {format_size(total)} free, "
                f"{format_size(self.allocated)} are this model's, and {format_size(nbytes)} more are needed: "
                "end what else uses the GPU, or use a shorter context, a smaller batch or int4 weights"
            )
        self._buffers[address.value] = nbytes
        return address.value

    def free(self, address: int) -> None:
        """Free memory."""
        del self._buffers[address]
        self.call("cuMemFree", address)

    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Copy to the device in stream order. `data` may be changed when this returns."""
        assert not self._capturing, "a captured copy would read this memory later: use start_upload"
        source = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        start, left = source.ctypes.data, source.nbytes
        if 0 < left <= _STAGING // 64:  # small enough for the driver's own buffer
            self.call("cuMemcpyHtoDAsync", address, start, left, self.stream)
            return
        turn = 0
        while left > 0:
            buffer, copied = self._staged()[turn]
            self.call("cuEventSynchronize", copied)
            part = min(left, _STAGING)
            ctypes.memmove(buffer.ctypes.data, start, part)
            self.start_upload(address, buffer[:part])
            self.call("cuEventRecord", copied, self.stream)
            start, address, left, turn = start + part, address + part, left - part, 1 - turn

    def _staged(self) -> list[tuple[NDArray[np.uint8], int]]:
        """Return two pinned buffers, each with an event that is recorded after its last upload."""
        if not self._staging:
            self._staging = [(self.pinned(_STAGING), self._event(_NO_TIMING)) for _ in range(2)]
        return self._staging

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy from the device into `out`, which must be contiguous; return when the copy is done."""
        assert not self._capturing, "a capture cannot wait: use start_download"
        assert out.flags.c_contiguous
        parts = [(begin, min(_STAGING, out.nbytes - begin)) for begin in range(0, out.nbytes, _STAGING)]

        def start(number: int) -> None:
            begin, size = parts[number]
            # In stream order: after any upload from this buffer.
            self.start_download(self._staged()[number % 2][0][:size], address + begin)

        if parts:
            start(0)
        for number, (begin, size) in enumerate(parts):
            self.wait()
            if number + 1 < len(parts):
                start(number + 1)
            ctypes.memmove(out.ctypes.data + begin, self._staged()[number % 2][0].ctypes.data, size)

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `value`."""
        if nbytes:
            self.call("cuMemsetD8Async", address, value, nbytes, self.stream)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copy within the device, in stream order. The two ranges must not overlap."""
        if nbytes:
            self.call("cuMemcpyDtoDAsync", destination, source, nbytes, self.stream)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """See `Device.pinned`."""
        address = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(address), max(nbytes, 1), 0, doing="pinning host memory")
        assert address.value is not None
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address.value))
        array.fill(0)
        self._pinned[address.value] = array
        return array

    def unpin(self, pinned: NDArray[np.uint8]) -> None:
        """See `Device.unpin`."""
        address = pinned.ctypes.data
        del self._pinned[address]
        self.call("cuMemFreeHost", address)

    def start_upload(self, address: int, pinned: NDArray[Any]) -> None:
        """See `Device.start_upload`."""
        self.call("cuMemcpyHtoDAsync", address, pinned.ctypes.data, pinned.nbytes, self.stream)

    def start_download(self, pinned: NDArray[Any], address: int) -> None:
        """See `Device.start_download`."""
        self.call("cuMemcpyDtoHAsync", pinned.ctypes.data, address, pinned.nbytes, self.stream)

    # -- kernels -------------------------------------------------------------------------------------------------------

    def load(self, names: Sequence[str]) -> None:
        """Load kernels; see `Device.load`.

        Raises:
            RuntimeUnavailableError: no image runs on this GPU with this driver.
            DeviceError: the driver rejects the image.
        """
        have = {name for _, image in self._modules for name in image.argument_bytes}
        missing = [name for name in dict.fromkeys(names) if name not in have]
        if missing:
            image = self._kernels.image(missing, self.info.capability, self.info.driver)
            self._modules.append((self._module(image), image))
        for name in names:
            if name not in self._functions:
                module, image = next(found for found in self._modules if name in found[1].argument_bytes)
                handle = self._handle("cuModuleGetFunction", module, name.encode(), doing=f"looking for {name}")
                # Drivers load a kernel when it is first used and wait then, which is not allowed during a capture.
                if self._driver.has("cuFuncLoad"):
                    self.call("cuFuncLoad", handle, doing=f"loading {name}")
                self._functions[name] = _Function(handle, image.argument_bytes[name], name in image.pdl)

    def _module(self, image: Image) -> int:
        module, log = ctypes.c_void_p(), ctypes.create_string_buffer(4096)
        keys = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_SIZE)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        data = image.data + b"\0"  # PTX text must end with a zero byte
        try:
            self.call(
                "cuModuleLoadDataEx", ctypes.byref(module), data, 2, keys, values, doing=f"loading {image.target}"
            )
        except DeviceError as error:
            said = log.value.decode(errors="replace").strip()
            raise type(error)(f"{error} ({said.splitlines()[0]})" if said else str(error)) from error
        assert module.value is not None
        return module.value

    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Launch a kernel.

        Raises:
            DeviceError: the kernel was not loaded, another version of EdgeLM compiled it, or this GPU has too little
            shared memory.
        """
        function = self._functions.get(launch.kernel)
        if function is None:
            raise DeviceError(f"the kernel {launch.kernel} was not loaded: call load() first")
        if len(launch.args) != function.argument_bytes:
            raise DeviceError(
                f"the bundle's kernel {launch.kernel} takes {function.argument_bytes} bytes of arguments, this version "
                f"of EdgeLM has {len(launch.args)}: another version compiled it; export the bundle again"
            )
        if launch.shared > function.shared:
            if launch.shared > self._most_shared:
                raise DeviceError(
                    f"{launch.kernel} needs {launch.shared} bytes of shared memory, and a block on {self.info.name} "
                    f"has {self._most_shared}: a bug in EdgeLM, report it"
                )
            self.call("cuFuncSetAttribute", function.handle, _DYNAMIC_SHARED, launch.shared)
            function.shared = launch.shared
        arguments = ctypes.c_char_p(launch.args)
        parameters = ctypes.cast(arguments, ctypes.c_void_p)  # pointer to the struct's bytes, which the driver copies
        how = (launch.shared, stream or self.stream)
        if function.pdl and self.pdl:
            config = LaunchConfig.with_pdl(launch.grid, launch.block, *how)
            arguments_ex = (ctypes.byref(config), function.handle, ctypes.byref(parameters), None)
            self.call("cuLaunchKernelEx", *arguments_ex, doing=f"launching {launch.kernel}")
            return
        sizes = (*launch.grid, launch.block, 1, 1)
        self.call(
            "cuLaunchKernel", function.handle, *sizes, *how, ctypes.byref(parameters), None,
            doing=f"launching {launch.kernel}",
        )  # fmt: skip

    # -- order and time ------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """See `Device.wait`."""
        self.call("cuStreamSynchronize", self.stream, doing="waiting for a copy and the kernels before it")

    def synchronize(self) -> None:
        """Wait for all work. An error of an earlier kernel is raised here."""
        self.call("cuCtxSynchronize", doing="waiting for kernels")

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture the launches and started copies of `work`, which must neither wait nor allocate."""
        self.call("cuStreamBeginCapture", self.stream, _CAPTURE_THIS_THREAD)
        self._capturing = True
        graph, done = ctypes.c_void_p(), False
        try:
            work()
            done = True
        finally:
            self._capturing = False
            # If `work` failed, its error is the one to raise.
            status = self._driver.call("cuStreamEndCapture", self.stream, ctypes.byref(graph), allowed=range(1, 10000))
            if status and done:
                self._driver.fail("cuStreamEndCapture", status, "capturing launches")
            if graph.value and not done:
                self.call("cuGraphDestroy", graph)
        handle = self._handle("cuGraphInstantiate", graph, 0, doing="making a graph of launches")
        self.call("cuGraphDestroy", graph)
        self.call("cuGraphUpload", handle, self.stream)
        self._graphs.append(Graph(self, handle))
        return self._graphs[-1]

    def elapsed(self, work: Callable[[], None], repeat: int = 1) -> list[float]:
        """Measure the seconds of device time of each of `repeat` runs of `work` on the device's own stream."""
        events = [self._event(0) for _ in range(repeat + 1)]
        self.call("cuEventRecord", events[0], self.stream)
        for event in events[1:]:
            work()
            self.call("cuEventRecord", event, self.stream)
        self.call("cuEventSynchronize", events[-1], doing="waiting for what is timed")
        times = []
        for start, end in itertools.pairwise(events):
            milliseconds = ctypes.c_float()
            self.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
            times.append(milliseconds.value / 1000)
        for event in events:
            self.call("cuEventDestroy", event)
        return times

    def copy_bandwidth(self) -> float | None:
        """Measure the bytes per second that a copy of 256 MiB reads and writes (median of ten); None if memory is too
        small."""
        nbytes = 256 << 20
        try:
            source, target = self.allocate(nbytes), self.allocate(nbytes)
        except DeviceMemoryError:
            return None
        self.fill(source, 0x5A, nbytes)
        times = self.elapsed(lambda: self.copy(target, source, nbytes), 12)[2:]
        self.free(source)
        self.free(target)
        return 2 * nbytes / statistics.median(times)

    def close(self) -> None:
        """Free everything. Closing twice is harmless. After a kernel error only the context is released."""
        if self._ordinal is None:
            return
        ordinal, self._ordinal = self._ordinal, None
        try:
            self.synchronize()
            for graph in self._graphs:
                graph.close()
            for _, copied in self._staging:
                self.call("cuEventDestroy", copied)
            self.call("cuStreamDestroy", self.stream)
            for module, _ in self._modules:
                self.call("cuModuleUnload", module)
            for address in list(self._buffers):
                self.free(address)
            for host in self._pinned:
                self.call("cuMemFreeHost", host)
        finally:
            self._driver.call("cuDevicePrimaryCtxRelease", ordinal)

    def _handle(self, function: str, *args: object, doing: str = "") -> int:
        handle = ctypes.c_void_p()
        # This call creates the context, so there is none to make current yet.
        call = self._driver.call if function == "cuDevicePrimaryCtxRetain" else self.call
        call(function, ctypes.byref(handle), *args, doing=doing)
        assert handle.value is not None, function
        return handle.value

    def _event(self, flags: int) -> int:
        return self._handle("cuEventCreate", flags)


def find_devices(library: str | None = None) -> tuple[DeviceInfo, ...]:
    """Describe every GPU of this machine that CUDA_VISIBLE_DEVICES shows. Creates no context.

    Raises:
        DeviceError: there is no driver, or no GPU.
    """
    driver = Driver(library)
    return tuple(_describe(driver, _integer(driver, "cuDeviceGet", index)) for index in range(_count(driver)))


def chosen_device(library: str | None = None) -> DeviceInfo:
    """Describe the GPU that every runtime uses. Creates no context.

    Raises:
        DeviceError: there is no driver, no GPU, or not the one that EDGELM_GPU names.
    """
    found = find_devices(library)
    return found[chosen_index(len(found))]


@contextlib.contextmanager
def current_gpu(library: str | None = None) -> Iterator[None]:
    """Make the chosen GPU's context current in this thread, for libraries that use the current one, as TensorRT does.

    Raises:
        DeviceError: as `chosen_device`.
    """
    driver = Driver(library)
    ordinal = _integer(driver, "cuDeviceGet", chosen_index(_count(driver)))
    context = ctypes.c_void_p()
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal, doing="making a context")
    try:
        driver.call("cuCtxSetCurrent", context)
        yield
        driver.call("cuCtxSetCurrent", None)
    finally:
        driver.call("cuDevicePrimaryCtxRelease", ordinal)


def _count(driver: Driver) -> int:
    count = _integer(driver, "cuDeviceGetCount")
    if not count:
        driver.fail("cuDeviceGetCount", 100)
    return count


def chosen_index(count: int, index: int | None = None) -> int:
    """Return the number of the GPU to use: `index`, by default EDGELM_GPU, by default 0.

    Raises:
        DeviceError: it is not below `count`.
    """
    named = os.environ.get(INDEX_VARIABLE)
    if index is None and named:
        if not (named.isascii() and named.isdigit()):
            raise DeviceError(
                f"{INDEX_VARIABLE}={named} is not the number of a GPU: set it to 0 to {count - 1}; UUIDs and MIG "
                f"devices go into {VISIBLE_VARIABLE}"
            )
        index = int(named)
    index = index or 0
    if not 0 <= index < count:
        visible = os.environ.get(VISIBLE_VARIABLE)
        shows = "this machine shows" if visible is None else f"{VISIBLE_VARIABLE}={visible} shows"
        raise DeviceError(
            f"there is no GPU {index}: {shows} {count}, numbered from 0; choose one with {INDEX_VARIABLE}"
        )
    return index


def _describe(driver: Driver, ordinal: int) -> DeviceInfo:
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.call("cuDeviceGetName", name, len(name), ordinal)
    driver.call("cuDeviceTotalMem", ctypes.byref(memory), ordinal)
    major, minor, multiprocessors = (
        _integer(driver, "cuDeviceGetAttribute", attribute, ordinal) for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS)
    )
    return DeviceInfo(
        name.value.decode(errors="replace"), (major, minor), multiprocessors, memory.value, driver.version
    )


def _integer(driver: Driver, function: str, *args: object) -> int:
    value = ctypes.c_int()
    driver.call(function, ctypes.byref(value), *args)
    return value.value
