"""What an executor and a plugin need of a device; the driver and the emulator implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the name under which it was instantiated.
        grid: blocks in x, y, z.
        block: threads of a block, in x alone.
        shared: bytes of dynamic shared memory.
        args: the kernel's only parameter, a struct, as bytes in the device's layout (little-endian, naturally aligned).
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
        name: as printed by the vendor's tools.
        capability: compute capability, e.g. (9, 0).
        multiprocessors: how many blocks can run at the same time at least.
        memory: bytes in all.
        driver: the CUDA version that the driver speaks, e.g. (13, 0).
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    driver: tuple[int, int]

    @property
    def sm(self) -> int:
        """The compute capability as compilers name it, e.g. 90."""
        return 10 * self.capability[0] + self.capability[1]


class Device(ABC):
    """Memory, kernels and streams of one device. Addresses are plain integers. One thread at a time may use it."""

    info: DeviceInfo

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes now, whoever holds the rest; a device without others has all of it free."""
        return self.info.memory, self.info.memory

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Reserve memory, aligned to 256 bytes, with undefined contents; return its address.

        Raises:
            DeviceMemoryError: the device has not that much free.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Give back what `allocate` returned."""

    @abstractmethod
    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Copy to the device, in the order of the launches."""

    @abstractmethod
    def download(self, address: int, out: NDArray[Any]) -> None:
        """Copy `out.nbytes` bytes from the device into `out`; returns when they are there."""

    @abstractmethod
    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Set bytes."""

    @abstractmethod
    def load(self, names: Sequence[str]) -> None:
        """Make kernels ready.

        Raises:
            RuntimeUnavailableError: naming what this device lacks.
        """

    @abstractmethod
    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Start a kernel; `stream` 0 is the device's own."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything that was started."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the launches of `work` (CUDA graph); the result starts them all, with the same arguments."""

    def copy_bandwidth(self) -> float | None:
        """Bytes a second read and written by a large copy within the device, measured now; None where none is."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free everything."""
