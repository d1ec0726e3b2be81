"""What the wheel and the C archive for aarch64 hold, put on the emulated machine: from the build folder of both."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from root import PLATFORM, REPOSITORY, ArmRoot

BUILD = REPOSITORY / "build" / "dist" / PLATFORM.name


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


def install(root: ArmRoot, folder: Path) -> Shipped:
    """Install what the wheel and the C archive hold, from their build folder, to a folder.

    Raises:
        AssertionError: it is not built.
    """
    assert BUILD.is_dir(), f"{BUILD} is missing: run `make test-arm`"
    site, archive = folder / "site", folder / "archive"
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for source, target in settings["tool"]["scikit-build"]["wheel"]["force-include"].items():
        shutil.copytree(REPOSITORY / source, site / target, ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    for component, prefix in (("wheel", site), ("edgelm", archive)):
        command = ["cmake", "--install", BUILD, "--component", component, "--prefix", prefix]
        subprocess.run(command, check=True, capture_output=True)
    return Shipped(root, site, archive)


def zig() -> str:
    """Return the compiler of the ziglang wheel."""
    given = os.environ.get("EDGELM_ZIG")
    if given:
        return given
    import ziglang

    return str(Path(ziglang.__file__).parent / "zig")
