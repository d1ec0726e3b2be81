"""Do the parity limits for float16 pass a good bundle and still detect damage?

A CUDA bundle in float16, built for the CPU provider, is run there: its kernels round to float16 as on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from edgelm.bundle.ort_providers import CUDA
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.onnxruntime import target as targets
from edgelm.parity import check
from edgelm.parity.limits import LIMITS, loosened

from . import damage
from .conftest import CHECKPOINTS


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Function (recipe) that returns a float16 bundle of the tiny OLMoE."""
    root = tmp_path_factory.mktemp("low_precision")

    def get(recipe):
        folder = root / recipe
        if not folder.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(targets.CudaTarget, "provider", dataclasses.replace(CUDA, router_weights=True))
                options = ExportOptions(target="cuda", dtype="fp16")
                export_bundle(CHECKPOINTS / "olmoe-tiny", folder, recipe=recipe, options=options)
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps({**manifest, "target": "cpu"}))
        return folder

    return get


@pytest.fixture
def judged(monkeypatch):
    """Function (folder) that returns a report with the limits of a CUDA bundle."""
    plain = check.limits_for

    def for_cuda(bundle):
        limits, kind = plain(bundle)
        assert limits == LIMITS[kind]
        return loosened(limits, "float16", "float16"), kind

    monkeypatch.setattr(check, "limits_for", for_cuda)
    return lambda folder: check.check_parity(folder, integrity=False, runtime="onnxruntime-cpu")


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_a_healthy_bundle_passes(healthy, judged, recipe):
    report = judged(healthy(recipe))
    assert report.passed, [
        f"{item.name}: {item.value}, limit {item.limit}" for item in report.checks if not item.passed
    ]


def test_renormalised_routing_is_found_in_its_layer(healthy, judged, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(healthy("int4"), folder)
    damage.renormalise_routing(folder, 1)
    damage.reseal(folder)
    report = judged(folder)
    assert not report.passed
    assert report.first_diverged_layer == 1
    assert "MoE block as a whole" in report.cause


def test_limits_only_grow_and_only_for_low_precision():
    for limits in LIMITS.values():
        assert loosened(limits, "float32", "float32") == limits
        half, brain = loosened(limits, "float16", "float16"), loosened(limits, "bfloat16", "bfloat16")
        for field in dataclasses.fields(limits):
            first, second, third = (getattr(item, field.name) for item in (limits, half, brain))
            assert (first >= second >= third) if field.name == "top1_clear" else (first <= second <= third), field.name
        exact = loosened(limits, "bfloat16", "float32")
        assert exact.layer_base == limits.layer_base, "a debug graph in float32 has the limits of a CPU"
