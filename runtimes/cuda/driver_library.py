"""libcuda.so.1, the NVIDIA driver's library, through ctypes: loading, calls, and errors with what to do about them.

The library comes with the driver, so that a device needs no part of the CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Container
from typing import NoReturn

from edgelm.errors import DeviceError, DeviceMemoryError

__all__ = ["LIBRARY_VARIABLE", "Driver", "LaunchConfig"]

LIBRARY = "libcuda.so.1"
LIBRARY_VARIABLE = "EDGELM_CUDA_DRIVER"
"""Environment variable: path of the driver library to use in place of the system's."""

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable of the driver: the GPUs to show, as numbers, UUIDs or MIG UUIDs, up to the first that does not
exist. Empty: none."""

OUT_OF_MEMORY = 2
_NO_DEVICE = 100
_NO_DEVICE_HELP = "check that nvidia-smi lists a GPU, and that a container was started with its GPUs (--gpus all)"
# What to do, by the driver's error number. For other errors the message has the driver's own text.
_HELP = {
    2: "end what else uses the GPU (nvidia-smi shows it), or use a shorter context, a smaller batch or int4 weights",
    3: "the process forked after it used the GPU: load the model in the child process",
    34: "this is the toolkit's stub of the driver: install the driver, or take the stubs' folder off LD_LIBRARY_PATH",
    46: "another process has the GPU for itself: end it, or change the GPU's compute mode",
    100: _NO_DEVICE_HELP,
    101: "no GPU has this number: nvidia-smi lists them; choose one with EDGELM_GPU or CUDA_VISIBLE_DEVICES",
    200: "the bundle's kernels are damaged, or too new for this driver: copy the bundle again, or update the driver",
    201: "another library in this process reset the GPU: load the model again",
    209: "the bundle has no kernels for this GPU: export with --sm and its number",
    214: "the GPU's memory has uncorrectable errors: restart the machine, and have the GPU checked",
    218: "the driver cannot compile the bundle's PTX: update the driver, or export with --sm and this GPU's number",
    222: "the bundle's PTX is newer than the driver: update the driver, or export with --sm and this GPU's number",
    700: "a kernel accessed invalid memory, a bug in EdgeLM: report it; restart this process to use the GPU again",
    701: "the kernel needs more registers or shared memory than this GPU has: a bug in EdgeLM, report it",
    702: "a kernel ran for too long for a GPU that also drives a display: use another GPU or turn its watchdog off",
    719: "a kernel failed, a bug in EdgeLM or a fault of the GPU: report it; restart this process to use the GPU again",
    802: "the system is still starting its GPUs: start nvidia-fabricmanager, then try again",
    803: "the driver's library and its kernel module are of different versions: restart the machine",
    804: "the compatibility libraries of a newer CUDA do not run on this GPU: take them off LD_LIBRARY_PATH",
}
_I, _U, _L, _Z, _P, _S = (
    *(ctypes.c_int, ctypes.c_uint, ctypes.c_ulonglong),
    *(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p),
)
# Symbol and parameters. Addresses and handles have 64 bits; ctypes would truncate them to int without a declared type.
# If a function has several versions, that of CUDA 11 is used, which every later driver keeps.
_FUNCTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    "cuDriverGetVersion": ("cuDriverGetVersion", (_P,)),
    "cuInit": ("cuInit", (_U,)),
    "cuGetErrorName": ("cuGetErrorName", (_I, _P)),
    "cuGetErrorString": ("cuGetErrorString", (_I, _P)),
    "cuDeviceGetCount": ("cuDeviceGetCount", (_P,)),
    "cuDeviceGet": ("cuDeviceGet", (_P, _I)),
    "cuDeviceGetName": ("cuDeviceGetName", (_S, _I, _I)),
    "cuDeviceGetAttribute": ("cuDeviceGetAttribute", (_P, _I, _I)),
    "cuDeviceTotalMem": ("cuDeviceTotalMem_v2", (_P, _I)),
    "cuDevicePrimaryCtxRetain": ("cuDevicePrimaryCtxRetain", (_P, _I)),
    "cuDevicePrimaryCtxRelease": ("cuDevicePrimaryCtxRelease_v2", (_I,)),
    "cuCtxSetCurrent": ("cuCtxSetCurrent", (_P,)),
    "cuCtxSynchronize": ("cuCtxSynchronize", ()),
    "cuMemGetInfo": ("cuMemGetInfo_v2", (_P, _P)),
    "cuMemAlloc": ("cuMemAlloc_v2", (_P, _Z)),
    "cuMemFree": ("cuMemFree_v2", (_L,)),
    "cuMemHostAlloc": ("cuMemHostAlloc", (_P, _Z, _U)),
    "cuMemFreeHost": ("cuMemFreeHost", (_P,)),
    "cuMemcpyHtoDAsync": ("cuMemcpyHtoDAsync_v2", (_L, _P, _Z, _P)),
    "cuMemcpyDtoHAsync": ("cuMemcpyDtoHAsync_v2", (_P, _L, _Z, _P)),
    "cuMemcpyDtoDAsync": ("cuMemcpyDtoDAsync_v2", (_L, _L, _Z, _P)),
    "cuMemsetD8Async": ("cuMemsetD8Async", (_L, ctypes.c_ubyte, _Z, _P)),
    "cuModuleLoadDataEx": ("cuModuleLoadDataEx", (_P, _S, _U, _P, _P)),
    "cuModuleUnload": ("cuModuleUnload", (_P,)),
    "cuModuleGetFunction": ("cuModuleGetFunction", (_P, _P, _S)),
    "cuFuncLoad": ("cuFuncLoad", (_P,)),
    "cuFuncSetAttribute": ("cuFuncSetAttribute", (_P, _I, _I)),
    "cuLaunchKernel": ("cuLaunchKernel", (_P, _U, _U, _U, _U, _U, _U, _U, _P, _P, _P)),
    "cuLaunchKernelEx": ("cuLaunchKernelEx", (_P, _P, _P, _P)),
    "cuStreamCreate": ("cuStreamCreate", (_P, _U)),
    "cuStreamDestroy": ("cuStreamDestroy_v2", (_P,)),
    "cuStreamSynchronize": ("cuStreamSynchronize", (_P,)),
    "cuStreamBeginCapture": ("cuStreamBeginCapture_v2", (_P, _I)),
    "cuStreamEndCapture": ("cuStreamEndCapture", (_P, _P)),
    "cuGraphInstantiate": ("cuGraphInstantiateWithFlags", (_P, _P, _L)),
    "cuGraphUpload": ("cuGraphUpload", (_P, _P)),
    "cuGraphLaunch": ("cuGraphLaunch", (_P, _P)),
    "cuGraphDestroy": ("cuGraphDestroy", (_P,)),
    "cuGraphExecDestroy": ("cuGraphExecDestroy", (_P,)),
    "cuEventCreate": ("cuEventCreate", (_P, _U)),
    "cuEventRecord": ("cuEventRecord", (_P, _P)),
    "cuEventSynchronize": ("cuEventSynchronize", (_P,)),
    "cuEventElapsedTime": ("cuEventElapsedTime", (_P, _P, _P)),
    "cuEventDestroy": ("cuEventDestroy_v2", (_P,)),
}


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig with one attribute, for programmatic dependent launch."""

    class _Attribute(ctypes.Structure):
        _fields_ = (("id", _I), ("pad", _I), ("value", _I), ("rest", ctypes.c_ubyte * 60))

    _fields_ = (
        ("grid", _U * 3),
        ("block", _U * 3),
        ("shared", _U),
        ("stream", _P),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", _U),
    )

    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: the kernel itself waits for the previous one.
    _pdl = _Attribute(id=6, value=1)

    @classmethod
    def with_pdl(cls, grid: tuple[int, int, int], block: int, shared: int, stream: int) -> LaunchConfig:
        """Return the configuration for a kernel that waits for the previous one itself."""
        return cls(grid, (block, 1, 1), shared, stream, ctypes.pointer(cls._pdl), 1)


class Driver:
    """The loaded and initialised library."""

    def __init__(self, library: str | None = None) -> None:
        """Load and initialise the library.

        Args:
            library: its path; default EDGELM_CUDA_DRIVER, otherwise the system's.

        Raises:
            DeviceError: there is no driver, or no usable GPU.
        """
        self.path = library or os.environ.get(LIBRARY_VARIABLE) or LIBRARY
        try:
            self._library = ctypes.CDLL(self.path)
        except OSError as error:
            why = str(error).removeprefix(f"{self.path}: ")
            raise DeviceError(
                f"no NVIDIA driver: {self.path} cannot be loaded ({why}); install the driver, and start a container "
                "with its GPUs (--gpus all). Without a GPU, export with --target cpu"
            ) from error
        self._functions: dict[str, Callable[..., int]] = {}
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.version = (version.value // 1000, version.value % 1000 // 10)
        """The CUDA version that the driver supports, e.g. (13, 0)."""
        self.call("cuInit", 0)

    def has(self, function: str) -> bool:
        """Whether this driver has a function."""
        return hasattr(self._library, _FUNCTIONS[function][0])

    def call(self, function: str, *args: object, allowed: Container[int] = (), doing: str = "") -> int:
        """Call a function of the driver and return its status: 0 or one of `allowed`.

        Args:
            function: its name without version suffix.
            args: integers for addresses and handles, byref() for outputs.
            allowed: error numbers that the caller handles.
            doing: what the call is for, in error messages.

        Raises:
            DeviceMemoryError: the GPU has not enough memory.
            DeviceError: any other failure.
        """
        found = self._functions.get(function) or self._find(function)
        status = found(*args)
        if status and status not in allowed:
            self.fail(function, status, doing)
        return status

    def _find(self, function: str) -> Callable[..., int]:
        symbol, parameters = _FUNCTIONS[function]
        try:
            found = self._library[symbol]
        except AttributeError as error:
            raise DeviceError(f"the NVIDIA driver ({self.path}) is too old: it lacks {symbol}; update it") from error
        found.argtypes, found.restype = parameters, ctypes.c_int
        self._functions[function] = found
        return found

    def fail(self, function: str, status: int, doing: str = "") -> NoReturn:
        """Raise the error of a status, with what to do."""
        visible = os.environ.get(VISIBLE_VARIABLE)
        if status == _NO_DEVICE and visible is not None:
            raise DeviceError(
                f"{VISIBLE_VARIABLE}={visible} shows no GPU: unset it, or name GPUs of `nvidia-smi -L` by numbers from "
                "0, by UUID, or by the UUID of a MIG device"
            )
        said = f"{self._name(status)} from {function}{f' while {doing}' if doing else ''}"
        kind = DeviceMemoryError if status == OUT_OF_MEMORY else DeviceError
        raise kind(f"the GPU or its driver failed, {said}: {_HELP.get(status, self._words(status))}")

    def _name(self, status: int) -> str:
        return self._text("cuGetErrorName", status) or f"error {status}"

    def _words(self, status: int) -> str:
        return self._text("cuGetErrorString", status) or "the driver does not say why"

    def _text(self, function: str, status: int) -> str:
        text = ctypes.c_char_p()
        (self._functions.get(function) or self._find(function))(status, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else ""
