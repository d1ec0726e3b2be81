"""The kernels' CUDA sources, and the translation unit that instantiates kernels by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.kernels import attention, linear, moe

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
"""Folder of the headers, in a checkout or an installed package. They include each other by paths relative to it."""

# Each has HEADER, the file of its kernels, all_kernels(), and instantiation(name), the C++ line of a kernel.
MODULES = (linear, moe, attention)


def all_kernels() -> tuple[str, ...]:
    """Return the names of all kernels, by module; each occurs once."""
    names = [str(name) for module in MODULES for name in module.all_kernels()]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return tuple(names)


def translation_unit(names: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """Return the source that instantiates kernels, and the headers that it includes, by name.

    Raises:
        DeviceError: a kernel does not exist, or this installation lacks the sources.
    """
    lines: list[str] = []
    left = dict.fromkeys(names)
    for module in MODULES:
        own = set(module.all_kernels())
        mine = [name for name in left if name in own]
        if mine:
            lines.insert(0, f'#include "{module.HEADER}"')
            lines.append("\n".join(module.instantiation(name) for name in mine))
            left = {name: None for name in left if name not in own}
    if left:
        raise DeviceError(f"there is no kernel {next(iter(left))}")
    headers = {
        path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(SOURCES.rglob("*.cuh"))
    }
    if not headers:
        raise DeviceError(f"the sources of the GPU kernels are missing ({SOURCES}): install edgelm again")
    includes = [line for line in lines if line.startswith("#include")]
    rest = [line for line in lines if not line.startswith("#include")]
    return "\n".join([*includes, "using namespace edgelm;", *rest, ""]), headers


def fingerprint(source: str, headers: Mapping[str, str]) -> str:
    """Return the SHA-256 of all sources of a compiled image."""
    return hashlib.sha256("\0".join([source, *headers, *headers.values()]).encode()).hexdigest()
