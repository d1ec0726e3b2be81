"""The emulated Arm machine. Where it cannot be made, its tests are skipped with the reason; with CI=true they fail."""

from __future__ import annotations

import os
import platform

import pytest
from root import ArmRoot, ArmRootUnavailable, arm_root
from shipped import Shipped, install


@pytest.fixture(scope="session")
def arm() -> ArmRoot:
    if platform.machine() == "aarch64":
        pytest.skip("this machine is 64-bit Arm itself: the other tests run there")
    try:
        return arm_root()
    except ArmRootUnavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shipped(arm: ArmRoot, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """What the wheel and the C archive for aarch64 hold, installed."""
    return install(arm, tmp_path_factory.mktemp("shipped"))
