"""A bundle's weights in device memory: one allocation with the contents of the weights file, uploaded block by
block."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgelm.errors import BundleError
from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.program import Program

_BLOCK = 16 << 20


class DeviceWeights:
    """The weights of a program on a device, until `free`.

    Args:
        device: the device.
        program: the program whose weights they are.
        path: the weights file.

    Raises:
        BundleError: the file is too short.
        DeviceMemoryError: there is not enough memory.
    """

    def __init__(self, device: Device, program: Program, path: Path) -> None:
        self._device = device
        self._program = program
        self.nbytes = program.weight_bytes
        self._base = device.allocate(self.nbytes)
        try:
            self._upload(path)
        except BaseException:
            device.free(self._base)
            raise

    def address(self, name: str) -> int:
        """Return the address of a weight."""
        return self._base + self._program.weights[name].offset

    def free(self) -> None:
        """Free the memory."""
        self._device.free(self._base)

    def _upload(self, path: Path) -> None:
        # Read rather than mmap: mapping a file larger than host memory would evict everything else from the page cache.
        memory = bytearray(min(_BLOCK, self.nbytes))
        buffer, view = np.frombuffer(memory, np.uint8), memoryview(memory)
        done = 0
        with path.open("rb", buffering=0) as stream:
            while done < self.nbytes:
                count = stream.readinto(view[: self.nbytes - done])
                if not count:
                    raise BundleError(f"{path} is too short, it ends at byte {done}: copy or export the bundle again")
                self._device.upload(self._base + done, buffer[:count])
                done += count
        self._device.synchronize()


def check_weights_file(program: Program, path: Path) -> None:
    """Check that a weights file is as large as a program needs.

    Raises:
        BundleError: it is too short.
    """
    size = path.stat().st_size
    if size < program.weight_bytes:
        raise BundleError(
            f"{path} has {size} bytes, the program's weights end at {program.weight_bytes}: copy or export the bundle "
            "again"
        )
