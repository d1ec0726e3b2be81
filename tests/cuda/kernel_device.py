"""What tests of kernels run on: the emulator, or a GPU where EDGELM_TEST_GPU is 1 (tests/gpu/check.py sets it)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from edgelm.runtimes.cuda.device import Device
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.kernels_file import KernelCompiler


def kernel_device(*parts: Sequence[str]) -> Device:
    """A device with kernels loaded, part after part: each part is compiled, and kept, by itself."""
    device: Device = CudaDevice(KernelCompiler()) if os.environ.get("EDGELM_TEST_GPU") == "1" else EmulatedDevice()
    for names in parts:
        device.load(names)
    return device


def order_threads(device: Device, seed: int) -> None:
    """Choose the order in which the emulator runs warps; a GPU has its own."""
    if isinstance(device, EmulatedDevice):
        device.seed = seed
