"""What tests of kernels run on: the emulator, or a GPU where EDGELM_TEST_GPU is 1 (tests/gpu/check.py sets it)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.kernels.images import KernelCompiler

ON_GPU = os.environ.get("EDGELM_TEST_GPU") == "1"


def kernel_device(*parts: Sequence[str], capability: tuple[int, int] = (8, 0), seed: int = 0) -> Device:
    """A device with kernels loaded, part after part: each part is compiled, and kept, by itself.

    `capability` and `seed` are the emulator's. A GPU is what it is, and one serves all tests; `release` it.
    """
    device: Device = _gpu() if ON_GPU else EmulatedDevice(capability, seed)
    for names in parts:
        device.load(names)
    return device


def order_threads(device: Device, seed: int) -> None:
    """Choose the order in which the emulator runs warps; a GPU has its own."""
    if isinstance(device, EmulatedDevice):
        device.seed = seed


def release(device: Device) -> None:
    """Close an emulated device, whose buffers' canaries are looked at then."""
    if isinstance(device, EmulatedDevice):
        device.close()


@functools.cache
def _gpu() -> CudaDevice:
    return CudaDevice(KernelCompiler())
