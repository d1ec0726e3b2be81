"""Interface of a device for executors and plugins. The driver and the emulator implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name of the kernel.
        grid: blocks in x, y, z.
        block: threads per block, in x only.
        shared: bytes of dynamic shared memory.
        args: bytes of the kernel's only parameter, a struct (little-endian, naturally aligned).
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    args: bytes


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the driver describes it.

    Attributes:
        name: the device's name, as nvidia-smi prints it.
        capability: compute capability, e.g. (9, 0).
        multiprocessors: number of multiprocessors (SMs).
        memory: total bytes.
        driver: the CUDA version that the driver supports, e.g. (13, 0).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    driver: tuple[int, int]

    @property
    def sm(self) -> int:
        """The compute capability as a number, e.g. 90."""
        return 10 * self.capability[0] + self.capability[1]


class Device(ABC):
    """Memory, kernels and streams of one device. Addresses are integers. Only one thread at a time may use it."""

    info: DeviceInfo

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes of memory, counting all processes."""
        return self.info.memory, self.info.memory

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Reserve memory, aligned to 256 bytes, with undefined contents; return its address.

        Raises:
            DeviceMemoryError: there is not enough free memory.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Free memory that `allocate` returned."""

    @abstractmethod
    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Copy to the device, in stream order."""

    @abstractmethod
    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy `out.nbytes` bytes from the device into `out`; return when the copy is done."""

    @abstractmethod
    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Return pinned host memory, zeros, for `start_upload` and `start_download`, until `unpin` or `close`."""

    @abstractmethod
    def unpin(self, pinned: NDArray[np.uint8]) -> None:
        """Free memory that `pinned` returned; its array must not be used any more."""

    @abstractmethod
    def start_upload(self, address: int, pinned: NDArray[Any]) -> None:
        """Start a copy from pinned memory, which must not change until the copy is done. Can be captured."""

    @abstractmethod
    def start_download(self, pinned: NDArray[Any], address: int) -> None:
        """Start a copy into pinned memory. Can be captured."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for the copies and launches on the device's own stream."""

    @abstractmethod
    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set `nbytes` bytes to `value`."""

    @abstractmethod
    def load(self, names: Sequence[str]) -> None:
        """Load kernels so that they can be launched.

        Raises:
            RuntimeUnavailableError: a kernel does not run on this device; the message says why.
        """

    @abstractmethod
    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Launch a kernel. `stream` 0 is the device's own stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all launches and copies."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches and started copies of `work` as a CUDA graph. Calling the result starts them all, with
        the same arguments."""

    def copy_bandwidth(self) -> float | None:
        """Measure the bytes per second that a large copy within the device reads and writes; None if not supported."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free all memory."""
