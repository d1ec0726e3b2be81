"""The kernels' CUDA sources, and the translation unit that instantiates kernels by name.

The planning in C++ (csrc/cuda/host) names the kernels; this asks it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda import planning

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
"""Folder of the headers, in a checkout or an installed package. They include each other by paths relative to it."""


@dataclass(frozen=True)
class Kernel:
    """A kernel: the header that has its code, and the line of C++ that instantiates it."""

    header: str
    line: str


@functools.lru_cache(maxsize=1)
def kernels() -> Mapping[str, Kernel]:
    """Return all kernels by name, by header.

    Raises:
        DeviceError: this installation has no compiled parts.
    """
    found: dict[str, Kernel] = {}
    for text in planning.call("kernels", {}).decode().splitlines():
        header, name, line = text.split("\t")
        assert name not in found, f"two kernels have the name {name}"
        found[name] = Kernel(header, line)
    return found


def translation_unit(names: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """Return the source that instantiates kernels, and the headers that it includes, by name.

    Raises:
        DeviceError: a kernel does not exist, or this installation lacks the sources.
    """
    known = kernels()
    if unknown := [name for name in names if name not in known]:
        raise DeviceError(f"there is no kernel {unknown[0]}")
    wanted = [known[name] for name in dict.fromkeys(names)]
    used = {kernel.header for kernel in wanted}
    # In the order of `kernels`, whatever the order of `names`.
    order = [header for header in dict.fromkeys(kernel.header for kernel in known.values()) if header in used]
    headers = {
        path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(SOURCES.rglob("*.cuh"))
    }
    if not headers:
        raise DeviceError(f"the sources of the GPU kernels are missing ({SOURCES}): install edgelm again")
    includes = [f'#include "{header}"' for header in reversed(order)]
    lines = [kernel.line for header in order for kernel in wanted if kernel.header == header]
    return "\n".join([*includes, "using namespace edgelm;", *lines, ""]), headers


def fingerprint(source: str, headers: Mapping[str, str]) -> str:
    """Return the SHA-256 of all sources of a compiled image."""
    return hashlib.sha256("\0".join([source, *headers, *headers.values()]).encode()).hexdigest()
