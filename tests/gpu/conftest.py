"""Tests that need an NVIDIA GPU; without one they are skipped, and the summary says why (pytest -rs)."""

from __future__ import annotations

import os

import pytest

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.driver import find_devices


@pytest.fixture(scope="session")
def gpu() -> DeviceInfo:
    """The first GPU; skips the test if there is none."""
    try:
        return find_devices()[0]
    except DeviceError as error:
        if os.environ.get("EDGELM_TEST_GPU") == "1":  # set by tests/gpu/check.py, where a skip would hide a failure
            raise
        pytest.skip(f"no GPU here: {error}")
