"""Energy that the CPU uses, from the counters that Linux publishes: RAPL, of Intel and AMD.

A counter counts microjoules of a domain (a package, or its memory) and starts again at 0 beyond its range. Since Linux
5.10 only root may read it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_DOMAINS = ("package", "dram")


@dataclass
class _Counter:
    """A domain's counter: its file, its range and the last value, in microjoules."""

    file: Path
    most: int
    last: int

    def read(self) -> int:
        """Return the microjoules since the last call; at most one wrap-around lies between two calls."""
        now = int(self.file.read_text())
        used = now - self.last if now >= self.last else self.most - self.last + now
        self.last = now
        return used


class Meter:
    """Meter of the energy of this machine's packages and their memory, all programs and the idle share included.

    Args:
        folder: the folder of the counters.

    Attributes:
        problem: why it cannot measure; None if it can.
        source: what is measured, such as "RAPL package-0".
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._counters: list[_Counter] = []
        self.problem: str | None = None
        names = []
        try:
            for zone in sorted(folder.glob("intel-rapl:*")):
                name = (zone / "name").read_text().strip()
                # A package holds its cores; "psys" holds the packages. Memory is counted apart from them.
                if name.startswith(_DOMAINS):
                    most, file = int((zone / "max_energy_range_uj").read_text()), zone / "energy_uj"
                    self._counters.append(_Counter(file, most, int(file.read_text())))
                    names.append(name)
        except PermissionError as error:
            self._counters = []
            self.problem = (
                f"only root may read {error.filename} (Linux 5.10 and later): run as root, or `sudo chmod a+r` the "
                "counters"
            )
        except (OSError, ValueError) as error:
            self._counters = []
            self.problem = f"the counters in {folder} cannot be read ({error})"
        self.source = f"RAPL {', '.join(names)}"
        if not self._counters and self.problem is None:
            self.problem = f"this machine has no energy counters ({folder}/intel-rapl:*)"
            if platform.machine() in ("aarch64", "arm64"):
                self.problem += "; power sensors of boards are not read"

    def joules(self) -> float:
        """Return the joules since the last call; NaN where it cannot measure."""
        if not self._counters:
            return float("nan")
        try:
            return sum(counter.read() for counter in self._counters) / 1e6
        except (OSError, ValueError):
            return float("nan")
