"""Read a library or a program of any platform: what it exports, what it needs, what it allows (ELF, Mach-O, PE)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lief


@dataclass(frozen=True)
class Binary:
    """What the checks ask about.

    Attributes:
        format: ELF, Mach-O or PE.
        cpu: x86_64 or aarch64; another CPU by the name that the reader gives it.
        exports: names that other programs can link, without the underscore that Mach-O puts before each.
        needs: the libraries that the system's loader opens with this one, as they are named in the file.
        glibc: the newest version of glibc's symbols, such as (2, 17); None without any.
        executable_stack: whether the file asks for a stack that can be executed, or does not refuse it.
        rpaths: where the loader looks for `needs` first.
        signed: whether a signature is inside; one of the linker counts. Only Mach-O files have them.
    """

    format: str
    cpu: str
    exports: frozenset[str]
    needs: tuple[str, ...]
    glibc: tuple[int, ...] | None
    executable_stack: bool
    rpaths: tuple[str, ...]
    signed: bool = False


def read(path: Path) -> Binary:
    """Read a file.

    Raises:
        ValueError: it is none of the three formats.
    """
    lief.logging.disable()  # it would name tables that zig's linker leaves empty; what cannot be read is None
    binary: Any = lief.parse(str(path))
    if isinstance(binary, lief.ELF.Binary):
        return _elf(binary)
    if isinstance(binary, lief.MachO.Binary):
        return _mach_o(binary)
    if isinstance(binary, lief.PE.Binary):
        return _pe(binary)
    raise ValueError(f"{path.name} is no ELF, Mach-O or PE file")


_OF_EVERY_DYLIB = {"_mh_dylib_header", "_mh_execute_header", "__dso_handle"}  # the linker adds them


def _cpu(name: str) -> str:
    return {"ARM64": "aarch64", "AMD64": "x86_64", "AARCH64": "aarch64"}.get(name.upper(), name.lower())


def _elf(binary: Any) -> Binary:
    versions = [
        tuple(int(part) for part in found[1].split("."))
        for needed in binary.symbols_version_requirement
        for version in needed.get_auxiliary_symbols()
        if (found := re.fullmatch(r"GLIBC_([\d.]+)", version.name))
    ]
    stacks = [segment for segment in binary.segments if segment.type == lief.ELF.Segment.TYPE.GNU_STACK]
    execute = int(lief.ELF.Segment.FLAGS.X)
    return Binary(
        format="ELF",
        cpu=_cpu(binary.header.machine_type.name),
        exports=frozenset(str(symbol.name) for symbol in binary.exported_symbols),
        needs=tuple(str(name) for name in binary.libraries),
        glibc=max(versions, default=None),
        executable_stack=not stacks or any(int(stack.flags) & execute for stack in stacks),
        rpaths=tuple(
            str(path)
            for entry in binary.dynamic_entries
            if isinstance(entry, (lief.ELF.DynamicEntryRunPath, lief.ELF.DynamicEntryRpath))
            for path in entry.paths
        ),
    )


def _mach_o(binary: Any) -> Binary:
    return Binary(
        format="Mach-O",
        cpu=_cpu(binary.header.cpu_type.name),
        exports=frozenset(str(symbol.name).removeprefix("_") for symbol in binary.exported_symbols) - _OF_EVERY_DYLIB,
        needs=tuple(
            str(library.name) for library in binary.libraries if library.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB
        ),
        glibc=None,
        executable_stack=lief.MachO.Header.FLAGS.ALLOW_STACK_EXECUTION in binary.header.flags_list,
        rpaths=tuple(str(command.path) for command in binary.rpaths),
        signed=binary.has_code_signature,
    )


def _pe(binary: Any) -> Binary:
    exported = binary.get_export() if binary.has_exports else None
    return Binary(
        format="PE",
        cpu=_cpu(binary.header.machine.name),
        exports=frozenset(str(entry.name) for entry in exported.entries) if exported else frozenset(),
        needs=tuple(str(library.name) for library in binary.imports),
        glibc=None,
        executable_stack=not binary.optional_header.has(lief.PE.OptionalHeader.DLL_CHARACTERISTICS.NX_COMPAT),
        rpaths=(),
    )
