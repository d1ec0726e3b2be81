"""Do a program's weights reach the device byte for byte, and is memory given back where they cannot?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgelm.errors import BundleError
from edgelm.runtimes.cuda import weights
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.weights import DeviceWeights, check_weights_file


def program(size: int) -> SimpleNamespace:
    """What is read of a program: where its weights lie, and where the last one ends."""
    return SimpleNamespace(weight_bytes=size, weights={"a": SimpleNamespace(offset=0), "b": SimpleNamespace(offset=96)})


@pytest.fixture
def device() -> EmulatedDevice:
    return EmulatedDevice()


@pytest.mark.parametrize("block", [64, 100, 1 << 20])
def test_weights_arrive_in_blocks_of_any_size(
    device: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", block)
    expected = np.random.default_rng(1).integers(0, 256, 1000, dtype=np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(expected.tobytes() + b"more than the program needs")
    found = np.zeros_like(expected)
    loaded = DeviceWeights(device, program(1000), path)  # type: ignore[arg-type]
    assert loaded.nbytes == 1000
    device.download(loaded.address("a"), found)
    np.testing.assert_array_equal(found, expected)
    device.download(loaded.address("b"), found[:904])
    np.testing.assert_array_equal(found[:904], expected[96:])
    loaded.free()
    assert not device._buffers


def test_a_file_that_ends_early_is_an_error_and_leaves_no_memory(device: EmulatedDevice, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(999))
    with pytest.raises(BundleError, match="is too short, it ends at byte 999: copy or export the bundle again"):
        DeviceWeights(device, program(1000), path)  # type: ignore[arg-type]
    assert not device._buffers
    with pytest.raises(BundleError, match="has 999 bytes, the program's weights end at 1000"):
        check_weights_file(program(1000), path)  # type: ignore[arg-type]
    check_weights_file(program(999), path)  # type: ignore[arg-type]
