"""Dry run of a GPU benchmark: a device that computes nothing, to test measurements with real shapes without a GPU.

Launches are planned as for an H200 and checked: their kernels are loaded, shared memory and grid are within the limits,
and all buffers fit into the memory. Results are ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import DeviceError, DeviceMemoryError
from edgelm.runtimes.cuda.device import Device, DeviceInfo, Launch

_MOST_SHARED = 227 << 10
_MOST_THREADS = 1024
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)


class DryDevice(Device):
    """A device with the properties of an H200; its memory is only counted."""

    pdl = False

    def __init__(self) -> None:
        self.info = DeviceInfo("nothing (dry run)", (9, 0), 132, 143_771 << 20, (13, 0))
        self._buffers: dict[int, int] = {}
        self._next = 1 << 40
        self._loaded: set[str] = set()
        self.launched = 0

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
        return self.info.memory - sum(self._buffers.values()), self.info.memory

    def allocate(self, nbytes: int) -> int:
        """Count memory; raise DeviceMemoryError if an H200 has not enough."""
        if nbytes > self.memory()[0]:
            raise DeviceMemoryError(f"{nbytes} bytes do not fit an H200, which has {self.memory()[0]} free")
        address, self._next = self._next, self._next + -(-nbytes // 256) * 256 + 256
        self._buffers[address] = nbytes
        return address

    def free(self, address: int) -> None:
        """Count memory as free."""
        del self._buffers[address]

    def upload(self, address: int, data: NDArray[Any] | bytes) -> None:
        """Check that the data fits into a buffer."""
        nbytes = len(data) if isinstance(data, bytes) else data.nbytes
        if not any(start <= address and address + nbytes <= start + size for start, size in self._buffers.items()):
            raise DeviceError(f"{nbytes} bytes at {address:#x} are in no buffer")

    def download(self, address: int, out: NDArray[Any]) -> None:
        """Fill `out` with ones."""
        out.fill(1)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Return ordinary memory."""
        return np.zeros(nbytes, np.uint8)

    def unpin(self, pinned: NDArray[np.uint8]) -> None:
        """Do nothing."""

    def start_upload(self, address: int, pinned: NDArray[Any]) -> None:
        """Check that the data fits into a buffer."""
        self.upload(address, pinned)

    def start_download(self, pinned: NDArray[Any], address: int) -> None:
        """Leave zeros."""

    def wait(self) -> None:
        """Do nothing."""

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Do nothing."""

    def load(self, names: Sequence[str]) -> None:
        """Record the names of the kernels."""
        self._loaded |= set(names)

    def launch(self, launch: Launch, stream: int = 0) -> None:
        """Check the launch as a driver does."""
        if launch.kernel not in self._loaded:
            raise DeviceError(f"the kernel {launch.kernel} was not loaded")
        if launch.shared > _MOST_SHARED or not 0 < launch.block <= _MOST_THREADS:
            raise DeviceError(f"{launch.kernel}: {launch.block} threads with {launch.shared} bytes of shared memory")
        if not all(0 < size <= most for size, most in zip(launch.grid, _MOST_BLOCKS, strict=True)):
            raise DeviceError(f"{launch.kernel}: a grid of {launch.grid}")
        self.launched += 1

    def synchronize(self) -> None:
        """Do nothing."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the function unchanged."""
        return work

    def elapsed(self, work: Callable[[], None], repeat: int = 1) -> list[float]:
        """Run the function once; report a millisecond per run."""
        work()
        return [1e-3] * repeat

    def close(self) -> None:
        """Free everything."""
        self._buffers.clear()
