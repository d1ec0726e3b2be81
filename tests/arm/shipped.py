"""The wheel and the C archive for aarch64, unpacked for the emulated machine: `make test-arm` packs and checks both."""

from __future__ import annotations

import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from root import PLATFORM, REPOSITORY, ArmRoot

PACKED = REPOSITORY / "build" / "dist" / "packed"


@dataclass(frozen=True)
class Shipped:
    """The unpacked files.

    Attributes:
        root: the emulated machine.
        site: the folder of Python packages with `edgelm`.
        archive: the folder of the C archive: bin/, lib/, include/.
    """

    root: ArmRoot
    site: Path
    archive: Path

    @property
    def onnxruntime(self) -> Path:
        """ONNX Runtime's shared library for aarch64."""
        (path,) = self.root.folder.glob("env/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime.so.*")
        return path

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Python finds the package, and the library ONNX Runtime."""
        return {"PYTHONPATH": str(self.site), "EDGELM_ONNXRUNTIME": str(self.onnxruntime)}


def packed(pattern: str) -> Path:
    """Return the one packed file of this name pattern.

    Raises:
        AssertionError: there is none, or there are several.
    """
    found = list(PACKED.glob(pattern))
    assert len(found) == 1, f"{PACKED} has {len(found)} files {pattern}: remove the folder, and run `make test-arm`"
    return found[0]


def install(root: ArmRoot, folder: Path) -> Shipped:
    """Unpack the wheel as pip does, and the C archive as a user does, to a folder."""
    site = folder / "site"
    with zipfile.ZipFile(packed(f"*{PLATFORM.wheel_tag}.whl")) as wheel:
        wheel.extractall(site)
    archive = packed(f"*-{PLATFORM.name}.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return Shipped(root, site, folder / archive.name.removesuffix(".tar.gz"))


def zig() -> str:
    """Return the compiler of the ziglang wheel."""
    given = os.environ.get("EDGELM_ZIG")
    if given:
        return given
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")
