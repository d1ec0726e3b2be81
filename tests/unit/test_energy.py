"""Is energy counted over the counters' wrap-around, and said why it is not measured?"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from edgelm.measuring.energy import Meter


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A made-up /sys/class/powercap: two packages, cores, memory, and the whole machine."""
    zones = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    for folder, name in zones.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("10000000\n")
        (tmp_path / folder / "energy_uj").write_text("9000000\n")
    return tmp_path


def put(folder: Path, zone: str, microjoules: int) -> None:
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_and_memory_count_once(powercap: Path) -> None:
    meter = Meter(powercap)
    assert meter.problem is None
    assert meter.source == "RAPL package-0, dram, package-1"
    for zone, value in (("intel-rapl:0", 9_250_000), ("intel-rapl:0:1", 9_030_000), ("intel-rapl:1", 9_500_000)):
        put(powercap, zone, value)
    for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        put(powercap, zone, 9_999_999)
    assert meter.joules() == pytest.approx(0.78)
    assert meter.joules() == 0


def test_a_counter_that_started_again_at_0_goes_on(powercap: Path) -> None:
    meter = Meter(powercap)
    put(powercap, "intel-rapl:0", 200_000)  # 1 J up to the range of 10 J, and 0.2 J more
    assert meter.joules() == pytest.approx(1.2)
    put(powercap, "intel-rapl:0", 300_000)
    assert meter.joules() == pytest.approx(0.1)


def test_the_reason_is_said_where_nothing_can_be_read(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = Meter(powercap / "none")
    assert none.problem is not None
    assert "has no energy counters" in none.problem
    assert math.isnan(none.joules())
    put_back = Path.read_text

    def denied(path: Path, *args: object, **more: object) -> str:
        if path.name == "energy_uj":  # root reads whatever the mode is
            raise PermissionError(13, "Permission denied", str(path))
        return put_back(path)

    (powercap / "intel-rapl:0" / "energy_uj").chmod(0)
    if os.geteuid() == 0:
        monkeypatch.setattr(Path, "read_text", denied)
    denied_meter = Meter(powercap)
    assert denied_meter.problem is not None
    assert "only root may read" in denied_meter.problem
    assert "energy_uj" in denied_meter.problem
    assert math.isnan(denied_meter.joules())


def test_a_broken_counter_is_no_measurement(powercap: Path) -> None:
    meter = Meter(powercap)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("many")
    assert math.isnan(meter.joules())
    broken = Meter(powercap)
    assert broken.problem is not None
    assert "cannot be read" in broken.problem
