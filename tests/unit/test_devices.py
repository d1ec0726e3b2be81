"""Does the default number of threads follow cores, affinity and container limits?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgelm import devices

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /sys and /proc")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical processors on four cores: 0 and 4 share one, 1 and 5, and so on; no limits."""
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


def test_a_tighter_limit_of_a_group_above_wins(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_topology_every_allowed_processor_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # A Python process with NumPy takes some megabytes; units that are off by 1024 fall outside.
    assert 5e6 < now <= peak < 1e11
