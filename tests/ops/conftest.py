"""Makes the helper modules importable, and skips the tests if there are no compiled operators."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edgelm.runtimes.onnxruntime.native_library import library_path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if library_path() is not None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="this installation has no compiled operators"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)
