"""The runtime `cuda-emulated`: `cuda-kernels` with its kernels emulated on the processor.

For checks where there is no GPU: the sources, launches and arithmetic are those of a GPU, the speed is not. It needs a
C++ compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelm.runtimes.cuda.loading import emulator
from edgelm.runtimes.cuda.model import CudaBatch, CudaRuntime, CudaTracing

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

NAME = "cuda-emulated"


def open(bundle: Bundle, **options: Any) -> CudaRuntime:  # noqa: A001 - the name the registry calls
    """Load the bundle's program; the options are those of `CudaRuntime`."""
    model = CudaRuntime(bundle, opener=emulator, **options)
    model.name = NAME
    return model


def open_batch(bundle: Bundle, batch: int, **options: Any) -> CudaBatch:
    """Load the bundle's program for several sequences; the options are those of `CudaBatch`."""
    model = CudaBatch(bundle, batch, opener=emulator, **options)
    model.name = NAME
    return model


def open_tracing(bundle: Bundle, *, threads: int | None = None) -> CudaTracing:
    """Load the bundle's debug program."""
    return CudaTracing(bundle, threads=threads, opener=emulator)
