"""The platforms that wheels, C archives and kits are made for: one table for `make wheels` and `edgelm package`.

Uses the standard library only.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from edgelm.errors import EdgeLMError

LIBRARY_SUFFIX = ".dll" if sys.platform == "win32" else ".so"
"""How the names of our compiled libraries end in a wheel of this system (EDGELM_MODULE_SUFFIX in CMake)."""


@dataclass(frozen=True)
class Platform:
    """A system and a CPU architecture.

    Attributes:
        name: the name in file names and options, for example linux-aarch64.
        zig: target of the cross compiler; of Linux with the oldest glibc that the binaries load with.
        wheel_tag: platform tag of our wheel.
        pip_tags: platform tags of other projects' wheels that load there, the newest system first.
        python: the oldest minor version of Python 3 for which all run-time packages have wheels there.
    """

    name: str
    zig: str
    wheel_tag: str
    pip_tags: tuple[str, ...]
    python: int = 11


def _linux(cpu: str) -> Platform:
    # ONNX Runtime's wheels are the newest of the run-time packages: glibc 2.27 (Ubuntu 18.04) and 2.28 (Debian 10).
    newest = tuple(f"manylinux_2_{minor}_{cpu}" for minor in (28, 27, 26, 24, 17))
    return Platform(
        f"linux-{cpu}", f"{cpu}-linux-gnu.2.17", f"manylinux_2_17_{cpu}.manylinux2014_{cpu}",
        (*newest, f"manylinux2014_{cpu}"),
    )  # fmt: skip


PLATFORMS = {
    one.name: one
    for one in (
        _linux("x86_64"),
        _linux("aarch64"),
        # ONNX Runtime's wheels ask for macOS 14.
        Platform(
            "macos-arm64", "aarch64-macos.11.0", "macosx_11_0_arm64",
            (
                *(f"macosx_{major}_0_{cpu}" for major in (14, 13, 12, 11) for cpu in ("arm64", "universal2")),
                *(f"macosx_10_{minor}_universal2" for minor in range(16, 3, -1)),
            ),
        ),
        Platform("windows-x86_64", "x86_64-windows-gnu", "win_amd64", ("win_amd64",)),
    )
}  # fmt: skip
"""The platforms by name."""


def this_platform() -> Platform | None:
    """Return the platform of this machine, None if it is none of `PLATFORMS`."""
    system = {"linux": "linux", "darwin": "macos", "win32": "windows"}.get(sys.platform)
    cpu = platform.machine().lower()
    cpu = {"amd64": "x86_64", "arm64": "aarch64"}.get(cpu, cpu)
    return PLATFORMS.get(f"{system}-{'arm64' if system == 'macos' and cpu == 'aarch64' else cpu}")


def named(name: str) -> Platform:
    """Return the platform of this name.

    Raises:
        EdgeLMError: there is no such platform; the message lists those that there are.
    """
    if name not in PLATFORMS:
        raise EdgeLMError(f"there is no platform '{name}': give one of {', '.join(PLATFORMS)}")
    return PLATFORMS[name]
