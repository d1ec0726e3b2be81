"""Makes the helper modules beside the tests importable, and skips the folder where there are no compiled operators."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgelm.runtimes.native_library import library_path

sys.path.insert(0, str(Path(__file__).parent))

if library_path() is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)
