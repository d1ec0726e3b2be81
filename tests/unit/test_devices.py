"""Does the default number of threads respect cores, affinity and container limits?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgelm import devices

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /sys and /proc")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs on four cores: 0 and 4 share one, 1 and 5, and so on; no limits."""
    for cpu in range(8):
        topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(devices, "_CPU", tmp_path / "cpu")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path / "cgroup")
    allow(monkeypatch, set(range(8)))
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, cpus: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)


def test_siblings_of_a_core_count_once(machine: Path) -> None:
    assert devices.allowed_cores() == 4


@pytest.mark.parametrize(("cpus", "cores"), [({0, 4}, 1), ({0, 1, 4}, 2), ({2}, 1), ({0, 1, 2, 7}, 4)])
def test_affinity_limits_cores(machine: Path, monkeypatch: pytest.MonkeyPatch, cpus: set[int], cores: int) -> None:
    allow(monkeypatch, cpus)
    assert devices.allowed_cores() == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_a_container_quota_limits_cores(machine: Path, quota: str, cores: int) -> None:
    (machine / "cgroup" / "cpu.max").write_text(quota + "\n")
    assert devices.allowed_cores() == cores


def test_an_old_style_quota_limits_cores(machine: Path) -> None:
    (machine / "cgroup" / "cpu").mkdir()
    (machine / "cgroup" / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (machine / "cgroup" / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert devices.allowed_cores() == 4
    (machine / "cgroup" / "cpu" / "cpu.cfs_quota_us").write_text("300000")
    assert devices.allowed_cores() == 3


def test_a_lower_limit_of_a_parent_group_applies(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = machine / "cgroup" / "user.slice" / "app.scope"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000")
    (inner.parent / "cpu.max").write_text("100000 100000")
    (inner / "memory.max").write_text(str(1 << 30))
    (inner / "memory.current").write_text(str(1 << 28))
    real = devices._read
    own = "0::/user.slice/app.scope"
    monkeypatch.setattr(devices, "_read", lambda path: own if path == Path("/proc/self/cgroup") else real(path))
    assert devices.allowed_cores() == 1
    device = devices.describe()
    assert device.memory_total == 1 << 30
    assert device.memory_available is not None
    assert device.memory_available <= (1 << 30) - (1 << 28)


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("limit", "used", "stat", "file"),
    [
        ("memory.max", "memory.current", "file 900\nactive_file {0}\ninactive_file {1}\nslab_reclaimable {2}\n", "."),
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "active_file 5\ninactive_file 5\nslab_reclaimable {2}\ntotal_active_file {0}\ntotal_inactive_file {1}\n",
            "memory",
        ),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_the_page_cache_of_a_container_counts_as_available(
    machine: Path, limit: str, used: str, stat: str, file: str
) -> None:
    folder = machine / "cgroup" / file
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text(str(200 * MEBIBYTE))
    (folder / used).write_text(str(190 * MEBIBYTE))
    available = devices.describe().memory_available
    assert available == 10 * MEBIBYTE
    (folder / "memory.stat").write_text(stat.format(20 * MEBIBYTE, 100 * MEBIBYTE, 3 * MEBIBYTE))
    assert devices.describe().memory_available == 133 * MEBIBYTE
    # At most the used memory, and at most the memory of the machine.
    (folder / "memory.stat").write_text(stat.format(20 * MEBIBYTE, 1 << 50, 0))
    assert devices.describe().memory_available == 200 * MEBIBYTE


def test_the_group_with_the_least_available_memory_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = machine / "cgroup" / "app"
    inner.mkdir()
    for folder, limit, used in ((inner, 100, 40), (inner.parent, 120, 110)):
        (folder / "memory.max").write_text(str(limit * MEBIBYTE))
        (folder / "memory.current").write_text(str(used * MEBIBYTE))
    real, own = devices._read, "0::/app"
    monkeypatch.setattr(devices, "_read", lambda path: own if path == Path("/proc/self/cgroup") else real(path))
    device = devices.describe()
    assert (device.memory_total, device.memory_available) == (100 * MEBIBYTE, 10 * MEBIBYTE)


def test_caches_that_cpus_share_count_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.cache_bytes() is None
    for cpu in range(8):
        for index, (level, size, shared) in enumerate(
            (("1", "32K", cpu), ("2", "1024K", cpu % 4), ("3", "8M", cpu % 2))
        ):
            folder = machine / "cpu" / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", str(shared))):
                (folder / name).write_text(value)
    assert devices.cache_bytes() == 16 * MEBIBYTE
    allow(monkeypatch, {2, 4})
    assert devices.cache_bytes() == 8 * MEBIBYTE


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8)]
)
def test_threads_are_refused_above_the_cpus_of_affinity_and_quota(machine: Path, quota: str, threads: int) -> None:
    (machine / "cgroup" / "cpu.max").write_text(quota)
    assert devices.max_threads() == threads
    assert devices.thread_problem(threads) is None
    assert str(devices.thread_problem(threads + 1)).startswith(f"{threads + 1} threads are more than the {threads} CPU")


def test_without_topology_every_allowed_cpu_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_CPU", machine / "nowhere")
    allow(monkeypatch, {0, 1, 2})
    assert devices.allowed_cores() == 3


def test_this_machine_is_described() -> None:
    device = devices.describe()
    assert device.cpu
    assert 1 <= device.allowed_cores <= device.logical_cores
    assert device.memory_total is not None
    assert device.memory_available is not None
    assert 0 < device.memory_available <= device.memory_total
    now, peak = devices.resident_memory()
    assert now is not None
    assert peak is not None
    # A Python process with NumPy takes some megabytes; a unit that is wrong by 1024 would be out of range.
    assert 5e6 < now <= peak < 1e11


@pytest.mark.parametrize("system", ["darwin", "freebsd14"])
def test_a_system_that_tells_nothing_is_described_without_it(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    # Linux has no sysctl of these names, so that a Mac's answers are empty here.
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(devices, "_CPU", Path("/nonexistent"))
    device = devices.describe()
    assert device.cpu
    assert device.allowed_cores == device.logical_cores == os.cpu_count()
    assert device.memory_total is None
    assert device.memory_available is None
    now, peak = devices.resident_memory()
    assert now is None
    assert peak is not None
    assert 5e6 < peak * (1024 if system == "darwin" else 1) < 1e11  # Linux counts kilobytes


def cpuinfo(*cores: tuple[str, str], more: str = "") -> str:
    """/proc/cpuinfo as Linux writes it on 64-bit Arm: no names, but numbers of designer and part."""
    fields = "Features\t: fp asimd\nCPU implementer\t: {}\nCPU architecture: 8\nCPU variant\t: 0x4\n"
    end = "CPU part\t: {}\nCPU revision\t: 1\n\n"
    texts = (f"processor\t: {i}\n{fields.format(a)}{end.format(b)}" for i, (a, b) in enumerate(cores))
    return "".join(texts) + more


A76, A55 = ("0x41", "0xd0b"), ("0x41", "0xd05")


@pytest.mark.parametrize(
    ("text", "tree", "name"),
    [
        (
            cpuinfo(*[A76] * 4, more="Revision\t: c04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"),
            "Raspberry Pi 5 Model B Rev 1.0\0",
            "Raspberry Pi 5 Model B Rev 1.0 (Arm Cortex-A76)",
        ),
        (cpuinfo(("0x41", "0xd42")), "NVIDIA Jetson Orin Nano\0", "NVIDIA Jetson Orin Nano (Arm Cortex-A78AE)"),
        (cpuinfo(*[A55] * 4, *[A76] * 4), "", "4 x Arm Cortex-A55, 4 x Arm Cortex-A76"),
        (cpuinfo(("0x41", "0xd4f")), "", "Arm Neoverse V2"),
        (cpuinfo(("0x61", "0x022"), ("0x61", "0x023")), "", "1 x Apple M1 Icestorm, 1 x Apple M1 Firestorm"),
        (cpuinfo(("0x41", "0xfff")), "", "Arm part 0xfff"),
        (cpuinfo(("0x99", "0x001")), "", "CPU implementer 0x99 part 0x001"),
        ("processor\t: 0\nmodel name\t: AMD EPYC 9R14\n", "", "AMD EPYC 9R14"),
    ],
)
def test_a_cpu_is_named(monkeypatch: pytest.MonkeyPatch, text: str, tree: str, name: str) -> None:
    files = {Path("/proc/cpuinfo"): text, Path("/proc/device-tree/model"): tree}
    monkeypatch.setattr(devices, "_read", lambda path: files.get(path, ""))
    assert devices.describe().cpu == name
