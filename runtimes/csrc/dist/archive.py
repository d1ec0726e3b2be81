"""The C archive of a platform: the installed library, its program, licence and a README; the same bytes each time."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from edgelm.system.platforms import Platform

README = """\
# EdgeLM {version} for {name}

The C library of EdgeLM, without Python: it runs a bundle in an app, and checks that a device computes what PyTorch
computes. It needs ONNX Runtime 1.31.1 or newer, a shared library that the app ships or the system has.

    bin/edgelm-parity BUNDLE --onnxruntime FILE     # exit code 0: this device computes the same model

| folder | what |
|---|---|
| `bin/` | `edgelm-parity`{dll} |
| `lib/` | {library}; `cmake/` for `find_package(edgelm)`, `pkgconfig/` for pkg-config |
| `include/edgelm/` | `edgelm.h` for C, `edgelm.hpp` for C++17 |

CMake: `-DCMAKE_PREFIX_PATH=` this folder, then `find_package(edgelm)` and the target `edgelm::edgelm`.
pkg-config: `PKG_CONFIG_PATH=` this folder and `/lib/pkgconfig`, then `pkg-config --cflags --libs edgelm`.
The folder can be moved. {system}

Licence: Apache-2.0 (LICENSE). The library contains LLVM's libc++ (Apache-2.0 with the LLVM exception).
"""

_SYSTEMS = {
    "linux": "It needs glibc 2.17 or newer, and no C++ library.",
    "macos": "It needs macOS 11 or newer.",
    "windows": "It needs Windows 10 or newer.",
}


def readme(platform: Platform, version: str) -> str:
    """Return the text of an archive's README.md."""
    system = platform.name.partition("-")[0]
    windows = system == "windows"
    return README.format(
        version=version,
        name=platform.name,
        dll=" and the library's DLL" if windows else "",
        library="the import library" if windows else "the library",
        system=_SYSTEMS[system],
    )


def write_archive(folder: Path, target: Path, epoch: int) -> None:
    """Write a folder as TARGET.tar.gz, with names sorted, times set and owners left out.

    Args:
        folder: what to pack; its name is the first part of each path in the archive.
        target: the file to write.
        epoch: time of every file, in seconds since 1970.
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in [folder, *sorted(folder.rglob("*"))]:
            member = tar.gettarinfo(path, arcname=str(path.relative_to(folder.parent).as_posix()))
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch
            executable = member.isdir() or (path.parent.name == "bin" and member.isfile())
            member.mode = 0o755 if executable else 0o644
            if member.isfile():
                tar.addfile(member, io.BytesIO(path.read_bytes()))
            else:
                tar.addfile(member)
    with target.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=epoch) as packed:
        packed.write(plain.getvalue())
