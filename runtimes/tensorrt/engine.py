"""An engine on a device. Whether it can run there is checked before it is loaded."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import BundleError, DeviceError, DeviceMemoryError, EdgeLMError, RuntimeUnavailableError
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.driver import chosen_device
from edgelm.runtimes.tensorrt.engine_info import EMBEDDED, PYTHON, EngineInfo, engines
from edgelm.runtimes.tensorrt.library import FULL, RTX, TITLES, Library, installed, messages
from edgelm.runtimes.tensorrt.plugins import PluginLibrary

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

DECODE, PREFILL = 0, 1
"""Optimisation profiles, in the order of `builder.profiles`."""
_OLDEST_CUDA = 12
# Messages for the flags of TensorRT-RTX's check of an engine.
_INVALID = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it: build it again with `edgelm build BUNDLE`",
    "UNSUPPORTED_CC": "it was not built for this GPU: build it with `edgelm build BUNDLE --sm` and its number",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: update TensorRT-RTX",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has not enough free memory: end what else uses it, or give --weight-memory",
    "CUDA_ERROR": "the driver failed: check that nvidia-smi works",
    "MALFORMED_ENGINE": "the file is damaged: copy the bundle again, or run `edgelm build`",
}


def incompatible(info: EngineInfo, device: DeviceInfo, versions: dict[str, str]) -> str | None:
    """Return why an engine cannot run on a device with these installed editions of TensorRT; None if it can."""
    if info.plugins == PYTHON:
        return "was built by an older EdgeLM, whose plugins were written in Python"
    have = versions.get(info.edition)
    if have is None:
        return f"needs {info.edition} {info.version}, which is not installed"
    if have != info.version:
        return f"was built by {info.edition} {info.version}, and {have} is installed"
    if device.sm not in info.sms:
        return f"was built for {info.devices}, and {device.name} is SM {device.sm}"
    if device.driver[0] < _OLDEST_CUDA:
        spoken = "{}.{}".format(*device.driver)
        return f"needs a driver for CUDA {_OLDEST_CUDA} or newer, and this one supports {spoken}"
    return None


def compatible(bundle: Bundle) -> bool:
    """Whether a bundle has an engine for the local GPU and TensorRT. False if there is no GPU.

    Does not import TensorRT.
    """
    found = engines(bundle)
    if not found:
        return False
    try:
        device = chosen_device()
    except DeviceError:
        return False
    versions = installed()
    return any(incompatible(info, device, versions) is None for info in found)


def choose(found: Sequence[EngineInfo], device: DeviceInfo, versions: dict[str, str], where: Path) -> EngineInfo:
    """Return the engine to run; if both editions are compatible, that of full TensorRT.

    Raises:
        RuntimeUnavailableError: none is compatible; the message says why, and what to do.
    """
    reasons = {info.file: incompatible(info, device, versions) for info in found}
    fitting = [info for info in found if reasons[info.file] is None]
    if fitting:
        return min(fitting, key=lambda info: (info.edition != FULL, info.file))
    how = f"run `edgelm build {where}` on this device, or use the runtime cuda-kernels, which needs no engine"
    if not found:
        raise RuntimeUnavailableError(f"{where} has no engine: {how}")
    lines = "; ".join(f"{file} {reason}" for file, reason in reasons.items())
    raise RuntimeUnavailableError(f"no engine of {where} can run here: {lines}. So {how}")


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: as in the graph.
        is_input: whether it is an input.
        element_bytes: bytes per element.
    """

    name: str
    is_input: bool
    element_bytes: int


class Engine:
    """A deserialised engine.

    Args:
        library: the TensorRT to run it with.
        info: its description.
        path: its file.
        plugins: the library that it was built with.
        weight_memory: bytes of weights that may be in the GPU's memory; None: all.

    Raises:
        RuntimeUnavailableError: it is not compatible with the device or the library.
        DeviceMemoryError: the GPU has not enough memory.
        BundleError: the file is damaged.
    """

    def __init__(
        self,
        library: Library,
        info: EngineInfo,
        path: Path,
        plugins: PluginLibrary,
        weight_memory: int | None = None,
    ) -> None:
        if weight_memory is not None and not info.weight_streaming:
            raise EdgeLMError(
                f"{path} was built without weight streaming, so all its weights must be in the GPU's memory: build it "
                "again with `edgelm build BUNDLE --weight-streaming`, or leave --weight-memory out"
            )
        self.library = library
        self.info = info
        self.path = path
        self._plugins = plugins
        self._log = messages(library)
        self._runtime = library.api.Runtime(self._log.logger)
        if info.plugins == EMBEDDED:
            self._runtime.engine_host_code_allowed = True
        else:
            plugins.load_into(self._runtime.get_plugin_registry(), f"{TITLES[library.edition]} {library.version}")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if library.edition == RTX:
                self._check(data)
            engine = self._taking("loading it", self._runtime.deserialize_cuda_engine, data)
        self._engine: Any = engine
        if weight_memory is not None:
            engine.weight_streaming_budget_v2 = min(weight_memory, int(engine.streamable_weights_size))
        self.tensors = [self._tensor(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)]

    def _check(self, data: mmap.mmap) -> None:
        """Let TensorRT-RTX check the engine's header against this device."""
        api = self.library.api
        header = data[: self._runtime.engine_header_size]
        validity, flags = self._runtime.get_engine_validity(header)
        self._log.take()
        if validity == api.EngineValidity.INVALID:
            raise RuntimeUnavailableError(f"{self.path} does not run here: {diagnosis(api, int(flags))}")

    def _taking(self, doing: str, call: Any, *args: Any) -> Any:
        self._log.take()
        self._plugins.take_failure()
        result = call(*args)
        if result is None:
            raise self._failed(doing)
        return result

    def _failed(self, doing: str) -> EdgeLMError:
        failure, said = self._plugins.take_failure(), self._log.take()
        return failure or failed(f"{self.library.edition} {self.library.version}: {doing} ({self.path}) failed", said)

    def _tensor(self, name: str) -> Tensor:
        engine = self._engine
        is_input = engine.get_tensor_mode(name) == self.library.api.TensorIOMode.INPUT
        return Tensor(name, is_input, int(engine.get_tensor_dtype(name).itemsize))

    def input_shape(self, name: str) -> tuple[int, ...]:
        """Return an input's shape, with -1 for variable dimensions."""
        return tuple(self._engine.get_tensor_shape(name))

    def activation_bytes(self) -> int:
        """Return the bytes of scratch memory of the larger profile."""
        engine = self._engine
        return max(int(engine.get_device_memory_size_for_profile_v2(i)) for i in (DECODE, PREFILL))

    def context(self, profile: int, stream: int, scratch: int, scratch_bytes: int, cache: Path | None) -> Context:
        """Create an execution context for a profile. Contexts may share `scratch` if they do not run at the same time.

        `cache`: file for the kernels that TensorRT-RTX compiles for this device; read if it exists, and written.
        """
        api = self.library.api
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.library.edition == RTX:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            compiled = config.create_runtime_cache()
            if cache is not None and cache.is_file():
                compiled.deserialize(cache.read_bytes())
            config.set_runtime_cache(compiled)
            made = self._taking("making a context", self._engine.create_execution_context, config)
        else:
            compiled = None
            made = self._taking("making a context", self._engine.create_execution_context, strategy)
        if not made.set_optimization_profile_async(profile, stream):
            raise self._failed("choosing a profile")
        if scratch_bytes:
            made.set_device_memory(scratch, scratch_bytes)
        return Context(self, made, compiled, cache)

    def close(self) -> None:
        """Free the engine. Close its contexts first."""
        self._engine = None
        self._runtime = None


class Context:
    """An execution context: bind shapes and addresses, then run on a stream."""

    def __init__(self, engine: Engine, made: Any, compiled: Any, cache: Path | None) -> None:
        self._engine, self._made, self._compiled, self._cache = engine, made, compiled, cache

    def bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        """Set a tensor's address, and for an input its shape."""
        if shape is not None and not self._made.set_input_shape(name, tuple(shape)):
            raise self._engine._failed(f"setting the shape of {name} to {tuple(shape)}")
        if not self._made.set_tensor_address(name, address):
            raise self._engine._failed(f"setting the address of {name}")

    def run(self, stream: int) -> None:
        """Launch the engine.

        Raises:
            DeviceError: the launch failed. An error of a plugin is raised as it is.
        """
        self._engine._plugins.take_failure()
        if not self._made.execute_async_v3(stream):
            raise self._engine._failed("running it")

    def capturable(self, stream: int) -> bool:
        """Whether a run can be captured as a CUDA graph."""
        ask = getattr(self._made, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))

    def keep_compiled(self) -> None:
        """Write the kernels that TensorRT-RTX compiled, for a faster next start. A full disk is ignored."""
        if self._compiled is None or self._cache is None:
            return
        from edgelm.files import atomic_file

        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._cache) as path:
                path.write_bytes(bytes(self._compiled.serialize()))
        except (OSError, EdgeLMError):
            return

    def close(self) -> None:
        """Free the context."""
        self._made = None


def diagnosis(api: Any, flags: int) -> str:
    """Return the message of TensorRT-RTX's diagnostic flags of an engine.

    No flag is set if TensorRT-RTX finds no GPU at all.
    """
    found = [
        text
        for name, text in _INVALID.items()
        if (flag := getattr(api.EngineInvalidityDiagnostics, name, None)) is not None and flags & int(flag)
    ]
    return "; ".join(found) or "TensorRT-RTX finds no GPU that it can use: check that nvidia-smi lists one"


def failed(what: str, said: str) -> EdgeLMError:
    """Return the error for a failure that TensorRT's log describes."""
    lower = said.lower()
    if "out of memory" in lower or "outofmemory" in lower or "cudaerror 2)" in lower:
        return DeviceMemoryError(
            f"{what}: the GPU has not enough free memory ({said}); end what else uses it, use a shorter context, or "
            "build with --weight-streaming and give --weight-memory"
        )
    if "insufficient for cuda runtime version" in lower:
        return DeviceError(
            f"{what}: there is no NVIDIA driver, or it is too old for this TensorRT; install or update the driver, and "
            f"check that nvidia-smi lists a GPU ({said})"
        )
    if "serialization" in lower or "magic" in lower or "corrupt" in lower:
        return BundleError(f"{what}: {said}; copy the bundle again, or run `edgelm build`")
    return DeviceError(f"{what}: {said}")
