"""Do bundles from earlier versions still load and compute the same?

The two in older_bundles were exported at commit e96bece from generated models with one layer. One is calibrated, for
the CPU. The other is smoothed, for GPUs, without compiled kernels, since the emulator makes its own;
tests/cuda/test_model.py runs it. They must not be exported again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import OPERATOR_SETS

from edgelm.bundle import Bundle
from edgelm.parity.check import check_parity
from edgelm.quant.recipe import Recipe

BUNDLES = Path(__file__).parent / "older_bundles"


def test_every_field_of_their_manifests_is_understood() -> None:
    cpu, gpu = (Bundle.open(BUNDLES / name) for name in ("olmoe-cpu", "fox-tensorrt"))
    assert [cpu.verify(), gpu.verify()] == [[], []]
    assert (cpu.manifest.target, cpu.manifest.ops, cpu.manifest.model.family) == ("cpu", "native", "olmoe")
    assert (gpu.manifest.target, gpu.manifest.ops, gpu.manifest.model.num_layers) == ("tensorrt", "gpu", 1)
    assert [Recipe.from_toml(one.manifest.recipe.toml).name for one in (cpu, gpu)] == ["int4", "int8"]
    assert cpu.manifest.calibration is not None
    assert cpu.manifest.calibration.samples == 16
    assert gpu.manifest.calibration is not None
    assert gpu.manifest.calibration.smoothing == "activations"


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
def test_does_one_for_the_cpu_still_pass_parity() -> None:
    report = check_parity(BUNDLES / "olmoe-cpu")
    assert report.passed, report
