"""The device for kernel tests: the emulator, or a GPU if EDGELM_TEST_GPU is 1 (tests/gpu/check.py sets it)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.kernels.images import KernelCompiler

ON_GPU = os.environ.get("EDGELM_TEST_GPU") == "1"


def kernel_device(
    *parts: Sequence[str], capability: tuple[int, int] = (8, 0), seed: int = 0, lazy: bool = False
) -> Device:
    """Return a device with kernels loaded. Each part is compiled and cached separately.

    `capability`, `seed` and `lazy` are for the emulator; with `lazy` each kernel is compiled when it is first launched.
    All tests share one GPU. Call `release` at the end.
    """
    device: Device = _gpu() if ON_GPU else EmulatedDevice(capability, seed, lazy=lazy)
    for names in parts:
        device.load(names)
    return device


def order_threads(device: Device, seed: int) -> None:
    """Set the order in which the emulator runs warps. No effect on a GPU."""
    if isinstance(device, EmulatedDevice):
        device.seed = seed


def release(device: Device) -> None:
    """Close an emulated device, which checks its buffers' canaries."""
    if isinstance(device, EmulatedDevice):
        device.close()


@functools.cache
def _gpu() -> CudaDevice:
    return CudaDevice(KernelCompiler())
