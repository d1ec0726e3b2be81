"""Loads a bundle's program to a device: opens the device, checks that memory suffices, uploads the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm.errors import DeviceMemoryError, RuntimeUnavailableError
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.executor import Executor, Layout, Sizes
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.kernels.images import FOLDER, KernelFolder
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.cuda.weights import DeviceWeights, check_weights_file
from edgelm.sizes import format_size

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

OpenDevice = Callable[[Path], Device]
"""Opens a device, given a bundle's folder of kernels."""


def open_gpu(kernels: Path) -> Device:
    """Open the GPU, with the bundle's compiled kernels."""
    return CudaDevice(KernelFolder(kernels))


def open_emulator(kernels: Path) -> Device:
    """Open the emulator, which compiles the kernels from source."""
    del kernels
    return EmulatedDevice(lazy=True)


class LoadedProgram:
    """A program with its weights on a device.

    Args:
        bundle: exported for `tensorrt`.
        open_device: opens the device.
        sizes: sizes to reserve memory for, for `executor`. None: only `new_executor` is used.
        debug: load the debug program.

    Raises:
        RuntimeUnavailableError, DeviceError: there is no device that the bundle has kernels for.
        DeviceMemoryError: there is not enough memory; the message says how much is needed and free.
        BundleError: a file is damaged.
    """

    def __init__(
        self, bundle: Bundle, open_device: OpenDevice, sizes: Sizes | None = None, *, debug: bool = False
    ) -> None:
        program = Program.read(bundle.file(PROGRAM_FILE))
        self.program = program.debug() if debug else program
        self._name = str(bundle.path)
        file = bundle.file(bundle.manifest.graph.weights_file)
        check_weights_file(program, file)
        self.device = open_device(bundle.file(FOLDER))
        try:
            layout = None if sizes is None else Layout(self.program, self._possible(sizes), self.device.info)
            self._require_memory(program.weight_bytes, layout)
            self.weights = DeviceWeights(self.device, program, file)
            self._executor = None if layout is None else self._execute(layout)
        except BaseException:
            self.device.close()
            raise

    @property
    def executor(self) -> Executor:
        """The executor for `sizes`."""
        assert self._executor is not None
        return self._executor

    def new_executor(self, sizes: Sizes, kept: Iterable[str]) -> Executor:
        """Return another executor over the same weights, which keeps the values `kept`. Call its `free`. Raises
        DeviceMemoryError."""
        layout = Layout(self.program, self._possible(sizes), self.device.info, kept)
        self._require_memory(0, layout)
        return self._execute(layout)

    def close(self) -> None:
        """Free all memory on the device."""
        self.device.close()

    def _possible(self, sizes: Sizes) -> Sizes:
        """Return the sizes, without memory for sampling if the bundle is from before its kernels."""
        if sizes.samples:
            try:
                self.device.load(sampling.kernels())
            except RuntimeUnavailableError:  # one of any other reason is raised for the kernels of the program as well
                return replace(sizes, samples=False)
        return sizes

    def _execute(self, layout: Layout) -> Executor:
        self.device.load(layout.operators.kernels())
        return Executor(self.device, self.weights, layout)

    def _require_memory(self, weights: int, layout: Layout | None) -> None:
        """Raise DeviceMemoryError, before anything is copied, if it will not fit."""
        caches, rest = (0, 0) if layout is None else (layout.plan.caches, layout.plan.values + layout.plan.workspace)
        free, total = self.device.memory()
        if weights + caches + rest > free:
            raise DeviceMemoryError(
                f"{self._name} does not fit: {self.device.info.name} has {format_size(free)} of {format_size(total)} "
                f"free, and {format_size(weights + caches + rest)} are needed ({format_size(weights)} weights, "
                f"{format_size(caches)} cache, {format_size(rest)} values): end what else uses the GPU, take a smaller "
                "context_length or a cache of int8, or export with a smaller recipe"
            )
