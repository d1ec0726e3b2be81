"""Description of this machine: CPU, cores that this process may use, memory, instruction sets.

Uses the standard library only. Values that a system does not provide are None or empty; nothing raises.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm.system import windows

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# The instruction sets that the choice of kernels depends on.
_FEATURES = (
    *("sse4_2", "avx", "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Device:
    """The machine as this process sees it; memory in bytes."""

    cpu: str
    architecture: str
    system: str
    logical_cores: int
    physical_cores: int
    allowed_cores: int
    """Physical cores that affinity and container quota leave to this process; the default number of threads."""
    memory_total: int | None
    memory_available: int | None
    instruction_sets: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}


def describe() -> Device:
    """Describe this machine. Takes about a millisecond on Linux."""
    logical = os.cpu_count() or 1
    memory_total, memory_available = _memory()
    return Device(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        # Windows 11 has the release 10 and is told by its build number.
        system=f"{platform.system()} {platform.version() if sys.platform == 'win32' else platform.release()}",
        logical_cores=logical,
        physical_cores=_physical_cores(None if sys.platform == "win32" else set(range(logical))) or logical,
        allowed_cores=allowed_cores(),
        memory_total=memory_total,
        memory_available=memory_available,
        instruction_sets=_instruction_sets(),
    )


def allowed_cores() -> int:
    """Return the physical cores that CPU affinity and the container's quota leave to this process; at least 1."""
    logical = _allowed_logical()
    cores = _physical_cores(logical) or len(logical)
    quota = _cgroup_quota()
    if quota is not None:
        # Round down, but to 1 at least: with a quota of 2.5 cores, 2 threads are faster than 3 that are throttled.
        cores = min(cores, max(1, int(quota)))
    return max(1, cores)


def max_threads() -> int:
    """Return the hardware threads that CPU affinity and the container's quota leave to this process."""
    count, quota = len(_allowed_logical()), _cgroup_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def thread_problem(threads: int) -> str | None:
    """Return why `threads` threads are too many, in one line; None where they are not. All callers check here."""
    most = max_threads()
    if threads <= most:
        return None
    cpus = "1 CPU" if most == 1 else f"{most} CPUs"
    return f"{threads} threads are more than the {cpus} that this process may use: give at most {most}, or leave it out"


def _allowed_logical() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    if sys.platform == "win32" and (mask := windows.affinity()) is not None:
        return {bit for bit in range(64) if mask >> bit & 1}
    return set(range(os.cpu_count() or 1))


def _physical_cores(logical: set[int] | None) -> int | None:
    """Count the physical cores of these logical CPUs; None where the system does not say.

    On Windows, None stands for all; and if the machine has several groups of CPUs, all are counted anyway.
    """
    if sys.platform == "win32":
        cores = windows.cores()
        if logical is not None and windows.affinity() is not None:
            cores = [core for core in cores if core & logical]
        return len(cores) or None
    assert logical is not None
    if sys.platform == "darwin":
        text = _sysctl("hw.physicalcpu")
        return int(text) if text.isdigit() else None
    found = set()
    for cpu in logical:
        topology = _CPU / f"cpu{cpu}" / "topology"
        # Core ids repeat over dies and clusters; the list of sibling threads identifies a core.
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        if not siblings:
            return None
        found.add(siblings)
    return len(found)


def cache_bytes() -> int | None:
    """Return the bytes of the last-level caches of this process's CPUs; None where the system does not say."""
    found: dict[tuple[int, str], int] = {}
    for cpu in _allowed_logical():
        for cache in (_CPU / f"cpu{cpu}" / "cache").glob("index*"):
            level, size = _read(cache / "level"), _read(cache / "size")
            if level.isdigit() and (match := re.fullmatch(r"(\d+)([KMG])", size)):
                key = (int(level), _read(cache / "shared_cpu_list"))
                found[key] = int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _cgroup_quota() -> float | None:
    """Return the container's CPU quota in cores; None where there is no limit."""
    quotas = []
    for folder in _own_cgroups():
        fields = _read(folder / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdigit():
            quotas.append(int(fields[0]) / int(fields[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _own_cgroups() -> list[Path]:
    """Return the folders of this process's control groups and of their parents."""
    folders = [_CGROUP, _CGROUP / "cpu", _CGROUP / "memory"]
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        for base in {_CGROUP, *(_CGROUP / name for name in controllers.split(",") if name)}:
            folder = base / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if base in parent.parents)]
    return folders


def _cgroup_memory() -> tuple[int, int] | None:
    """Return (limit, available) in bytes of this process's control groups; None where memory is not limited."""
    limits, available = [], []
    for folder in _own_cgroups():
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            limits.append(int(limit))
            available.append(int(limit) - int(used) + min(int(used), _reclaimable(folder)))
    return (min(limits), max(0, min(available))) if limits else None


def _reclaimable(group: Path) -> int:
    """Return the bytes of a control group's memory usage that the kernel can reclaim: page cache and slabs.

    The kernel computes MemAvailable in the same way. Files in a tmpfs are not reclaimable and not counted.
    """
    found = re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    fields: dict[str, str] = dict(found)
    names = ("active_file", "inactive_file", "slab_reclaimable")
    # In cgroup v1 the sums that include child groups, as usage does, are named total_*.
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in names)


def _memory() -> tuple[int | None, int | None]:
    """Return (total, available) bytes of memory, within the container's limit."""
    if sys.platform == "linux":
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE))
        if "MemTotal" not in fields:
            return None, None
        total, available = (int(fields.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
        limit = _cgroup_memory()
        if limit is not None and limit[0] < total:
            total, available = limit[0], min(available, limit[1])
        return total, available
    if sys.platform == "darwin":
        text = _sysctl("hw.memsize")
        return (int(text) if text.isdigit() else None), None
    if sys.platform == "win32":
        return windows.memory()
    return None, None


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    if sys.platform == "win32":
        return windows.cpu_name() or platform.processor() or platform.machine()
    text = _read(Path("/proc/cpuinfo"))
    match = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    name = match.group(1).strip() if match else _read(Path("/proc/device-tree/model")).strip("\0")
    cores = _arm_cores(text)
    if name and cores:
        return f"{name} ({cores})"
    return name or cores or platform.processor() or platform.machine()


def _arm_cores(cpuinfo: str) -> str:
    """Return the kinds of cores that an Arm machine's /proc/cpuinfo lists by number; empty on other machines.

    Arm's kernel gives no name, only the numbers of designer and part of each core.
    """
    kinds = collections.Counter(
        re.findall(r"^CPU implementer\s*:\s*(\S+)\n(?:.+\n)*?CPU part\s*:\s*(\S+)$", cpuinfo, re.MULTILINE)
    )
    if not kinds:
        return ""
    table: dict[str, Any] = json.loads((Path(__file__).parent / "tables" / "arm_cores.json").read_bytes())
    names = []
    for (implementer, part), count in kinds.items():
        designer = table.get(implementer, {"name": f"CPU implementer {implementer}", "parts": {}})
        name = f"{designer['name']} {designer['parts'].get(part, f'part {part}')}"
        names.append(name if len(kinds) == 1 else f"{count} x {name}")
    return ", ".join(names)


def _instruction_sets() -> tuple[str, ...]:
    if sys.platform == "darwin":
        text = _sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")
        flags = set(text.lower().replace("fma", "fma ").split())
        flags |= {"asimd"} if platform.machine() == "arm64" else set()
    elif sys.platform == "win32":
        flags = windows.instruction_sets()
    else:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
        flags = set(match.group(1).split()) if match else set()
    return tuple(name for name in _FEATURES if name in flags)


def resident_memory() -> tuple[int | None, int | None]:
    """Return the (current, peak) resident bytes of this process, pages of memory-mapped files included."""
    if sys.platform == "linux":
        fields: dict[str, str] = dict(
            re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", _read(Path("/proc/self/status")), re.MULTILINE)
        )
        if "VmRSS" in fields:
            return int(fields["VmRSS"]) * 1024, int(fields.get("VmHWM", fields["VmRSS"])) * 1024
        return None, None
    if sys.platform == "win32":
        return windows.process_memory()
    import resource

    # macOS reports bytes, the BSDs kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return None, int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def return_free_memory() -> None:
    """Return free heap memory to the system (glibc's malloc_trim; does nothing elsewhere).

    After a large block was freed, glibc raises its mmap threshold. A second model then lies in the heap, and its memory
    would stay resident after the model was closed.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _sysctl(name: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
