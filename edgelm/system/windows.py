"""What Windows says of the machine and of this process; for `devices`. Uses the standard library only.

On other systems only `cores_in` can be called.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

_CORES = 0  # RelationProcessorCore
_HEAD, _GROUPS, _GROUP = struct.Struct("<II"), struct.Struct("<H"), struct.Struct("<QH6x")
_GROUPS_AT, _MASKS_AT = 30, 32  # in SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX of a core
# The numbers of IsProcessorFeaturePresent, with Linux's names.
_FEATURES = {38: "sse4_2", 39: "avx", 40: "avx2", 41: "avx512f", 19: "asimd", 43: "asimddp"}


class _MemoryStatus(ctypes.Structure):
    # MEMORYSTATUSEX
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
    )


class _ProcessMemory(ctypes.Structure):
    # PROCESS_MEMORY_COUNTERS
    _fields_ = (
        ("length", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("current", ctypes.c_size_t),
        *((name, ctypes.c_size_t) for name in "abcdef"),
    )


def _kernel() -> Any:
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - the attribute exists on Windows only
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    return kernel


def cores_in(answer: bytes) -> list[frozenset[int]]:
    """Return the hardware threads of each core, from an answer of GetLogicalProcessorInformationEx.

    The number of a thread is 64 times that of its group, and its bit in the group's mask.
    """
    cores = []
    at = 0
    while at + _MASKS_AT <= len(answer):
        kind, size = _HEAD.unpack_from(answer, at)
        if size < _MASKS_AT:
            break
        if kind == _CORES:
            (groups,) = _GROUPS.unpack_from(answer, at + _GROUPS_AT)
            places = range(at + _MASKS_AT, at + _MASKS_AT + groups * _GROUP.size, _GROUP.size)
            masks = [_GROUP.unpack_from(answer, place) for place in places]
            cores.append(frozenset(64 * group + bit for mask, group in masks for bit in range(64) if mask >> bit & 1))
        at += size
    return cores


def cores() -> list[frozenset[int]]:
    """Return the hardware threads of each of the machine's cores; empty if Windows does not say."""
    kernel, size = _kernel(), ctypes.c_uint32()
    kernel.GetLogicalProcessorInformationEx(_CORES, None, ctypes.byref(size))
    answer = ctypes.create_string_buffer(max(size.value, 1))
    if not kernel.GetLogicalProcessorInformationEx(_CORES, answer, ctypes.byref(size)):
        return []
    return cores_in(answer.raw[: size.value])


def affinity() -> int | None:
    """Return the mask of the hardware threads that this process may use; None if it may use all.

    With several groups of CPUs, Windows gives the mask of one of them only, so it is not used.
    """
    kernel = _kernel()
    if kernel.GetActiveProcessorGroupCount() != 1:
        return None
    mask, machine = ctypes.c_size_t(), ctypes.c_size_t()
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.GetProcessAffinityMask(process, ctypes.byref(mask), ctypes.byref(machine)):
        return None
    return mask.value or None


def memory() -> tuple[int | None, int | None]:
    """Return the machine's (total, available) bytes of memory."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not _kernel().GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.available)


def process_memory() -> tuple[int | None, int | None]:
    """Return the (current, peak) resident bytes of this process."""
    kernel, counters = _kernel(), _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), ctypes.sizeof(counters)):
        return None, None
    return int(counters.current), int(counters.peak)


def cpu_name() -> str:
    """Return the CPU's name; empty if Windows does not say."""
    import winreg

    registry: Any = winreg
    try:
        place = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, place) as key:
            return str(registry.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except OSError:
        return ""


def instruction_sets() -> set[str]:
    """Return the CPU's instruction sets among those that Windows names."""
    kernel = _kernel()
    return {name for number, name in _FEATURES.items() if kernel.IsProcessorFeaturePresent(number)}
