"""Images and the library of the emulated driver (fake_driver.c): emulated kernels in place of cubins.

So the code around the driver runs as on a GPU: modules, functions, launches, graphs, and C++ that opens the driver
itself. A test sets EDGELM_CUDA_DRIVER to `driver_library`, and FAKE_CUDA_MULTIPROCESSORS to 4, as `EmulatedDevice` has,
if results shall be equal to the last bit.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgelm.progress import Progress
from edgelm.runtimes.cuda.emulated import compiled_library, launcher
from edgelm.runtimes.cuda.kernels.cubin import Resources
from edgelm.runtimes.cuda.kernels.images import Image
from edgelm.runtimes.cuda.kernels.nvrtc import Compiled

VERSION = (13, 0)
"""The version of CUDA that the images and the driver have."""


def driver_library(folder: Path) -> Path:
    """Compile the driver into a folder; return its path."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "these tests need a C compiler"
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_driver.c")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, source, "-o", path], check=True)
    return path


class EmulatedKernels:
    """The source of kernels for `CudaDevice` with the emulated driver."""

    def image(self, names: Sequence[str], capability: tuple[int, int], driver: tuple[int, int]) -> Image:
        """Return a library of these kernels, compiled or from the emulator's cache."""
        del driver
        library = compiled_library(names, capability)
        target = "sm_{}{}".format(*capability)
        return Image(target, library.read_bytes(), argument_bytes(library, names), VERSION)


def compile_images(
    names: Sequence[str], targets: Sequence[str], progress: Progress | None = None
) -> dict[str, Compiled]:
    """Stand in for `images.compile_images`, so that bundles get images for the emulated driver."""
    del progress
    found = {}
    for target in targets:
        library = compiled_library(names, divmod(int(target.rpartition("_")[2]), 10))
        sizes = argument_bytes(library, names)
        used = {name: Resources(0, 0, 0, size) for name, size in sizes.items()}
        found[target] = Compiled(target, library.read_bytes(), sizes, frozenset(), used, "", VERSION)
    return found


def argument_bytes(library: Path, names: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each kernel's arguments: the emulator says them when it refuses a launch without any."""
    run, found = launcher(library), {}
    for name in names:
        said = run(name.encode(), (ctypes.c_int * 3)(1, 1, 1), 32, 0, None, (1 << 64) - 1, 0)
        assert said is not None
        match = re.search(r"its arguments are (\d+) bytes", said.decode())
        assert match is not None, said
        found[name] = int(match[1])
    return found
