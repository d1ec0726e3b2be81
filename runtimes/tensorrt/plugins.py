"""The library of our plugins: a bundle's copy of libedgelm_plugins.so, with the bundle's kernels behind it.

TensorRT loads it into the registry of one builder or runtime, so that a process may have engines of several bundles.
The archive of kernels is described in csrc/cuda/driver/kernel_archive.h.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

from edgelm.errors import EdgeLMError, RuntimeUnavailableError
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.kernels.images import KernelFolder

_FOOTER = struct.Struct("<QQ8s")
_MAGIC = b"EDGELMK1"
_ALIGNMENT = 64


class PluginLibrary:
    """A library of plugins in a file.

    Args:
        path: its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def load_into(self, registry: Any, what: str) -> None:
        """Let TensorRT load the library into a registry. `what`: the edition and version of TensorRT, for messages.

        Raises:
            RuntimeUnavailableError: TensorRT refuses it.
        """
        if registry.load_library(str(self.path)) is None:
            raise RuntimeUnavailableError(
                f"{what} does not load {self.path}: it may be for another kind of machine, or damaged; run "
                "`edgelm build` on this machine"
            )

    def take_failure(self) -> EdgeLMError | None:
        """Return the first error of a plugin since the last call, which TensorRT does not report to its caller."""
        try:
            planning.call("take_failure", {}, self.path)
        except EdgeLMError as error:
            return error
        return None


def write_library(kernels: KernelFolder, out: Path) -> None:
    """Write the installed library with a bundle's kernels.

    Raises:
        DeviceError: this installation has no compiled parts.
        BundleError: an image of the kernels cannot be read.
    """
    data = bytearray(planning.library_path().read_bytes())
    lines = [f"images={' '.join(kernels.files)}"]
    lines += [f"arguments.{name}={size}" for name, size in kernels.argument_bytes.items()]
    for target in kernels.files:
        data += bytes(-len(data) % _ALIGNMENT)
        image = kernels.read(target)
        lines += [
            f"{target}.offset={len(data)}",
            f"{target}.bytes={len(image.data)}",
            f"{target}.compiler={'.'.join(map(str, image.compiler))}",
            f"{target}.pdl={' '.join(sorted(image.pdl))}",
        ]
        data += image.data
    index = "".join(f"{line}\n" for line in lines).encode()
    out.write_bytes(bytes(data) + index + _FOOTER.pack(len(data), len(index), _MAGIC))
    out.chmod(0o755)


def library_name(library: Path) -> str:
    """Return a file name for a library: engines of one bundle may need several, of several machines or versions."""
    return f"libedgelm_plugins-{hashlib.sha256(library.read_bytes()).hexdigest()[:8]}.so"
