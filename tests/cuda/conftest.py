"""Makes the helper modules beside the tests importable, and gives tests an emulated device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.runtimes.cuda.emulated import EmulatedDevice

sys.path.insert(0, str(Path(__file__).parent))
# Keep compiled kernels in the build folder.
os.environ.setdefault("EDGELM_EMULATOR_CACHE", str(Path(__file__).parents[2] / "build" / "emulated"))


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    """An emulated device of compute capability 8.0; its buffers' canaries are checked at the end."""
    made = EmulatedDevice((8, 0))
    yield made
    made.close()
