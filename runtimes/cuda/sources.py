"""The kernels' sources, and the translation unit that instantiates some of them by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from edgelm.errors import DeviceError

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
"""Folder of the headers, in a checkout and in an installed package alike."""

# A module has HEADER, the file its kernels are in, all_kernels(), and instantiation(name), the line that makes one.
_MODULES = ("linear", "moe", "attention")


def modules() -> tuple[ModuleType, ...]:
    """The modules that launch kernels."""
    return tuple(importlib.import_module(f"edgelm.runtimes.cuda.{name}") for name in _MODULES)


def translation_unit(names: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """The source that instantiates kernels, and the headers it includes, by name.

    Raises:
        DeviceError: there is no kernel of a name.
    """
    lines: list[str] = []
    left = dict.fromkeys(names)
    for module in modules():
        own = set(module.all_kernels())
        mine = [name for name in left if name in own]
        if mine:
            lines.insert(0, f'#include "{module.HEADER}"')
            lines.append("\n".join(module.instantiation(name) for name in mine))
            left = {name: None for name in left if name not in own}
    if left:
        raise DeviceError(f"there is no kernel {next(iter(left))}")
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cuh"))}
    includes = [line for line in lines if line.startswith("#include")]
    rest = [line for line in lines if not line.startswith("#include")]
    return "\n".join([*includes, "using namespace edgelm;", *rest, ""]), headers
