"""Whether a bundle has an engine for the GPU and the TensorRT that are here; imports neither TensorRT nor kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.driver import find_devices
from edgelm.runtimes.tensorrt.engine import unfit
from edgelm.runtimes.tensorrt.engine_info import engines
from edgelm.runtimes.tensorrt.library import installed

if TYPE_CHECKING:
    from edgelm.bundle import Bundle


def fits(bundle: Bundle) -> bool:
    """Whether one of its engines fits. False too where there is no GPU at all."""
    found = engines(bundle)
    if not found:
        return False
    try:
        device = find_devices()[0]
    except DeviceError:
        return False
    versions = installed()
    return any(unfit(info, device, versions) is None for info in found)
