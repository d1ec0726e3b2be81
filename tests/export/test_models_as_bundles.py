"""Do bundles of the models after OLMoE and Fox compute the reference?

tests/unit/test_models.py compares the reference with transformers. Here graphs are compared with the reference: of
native and portable operators, float and quantised, and a bundle for GPUs on the emulator.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_graph_computes_the_reference import check, write_graph
from tiny_models import CONFIGS, LATER, OPERATOR_SETS, MakeCheckpoint

from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.tensorrt import target as gpu_target
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.models import FAMILIES
from edgelm.parity.check import check_parity
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant.recipe import PRESETS, Recipe
from edgelm.quant.scheme import Scheme

GOLDEN = GoldenOptions(prompts=(Prompt("a", "def f(x):\n    return x"), Prompt("b", "import os")), greedy_tokens=4)
models = pytest.mark.parametrize("name", LATER)
operators = pytest.mark.parametrize("ops", OPERATOR_SETS)


def test_every_family_is_among_the_models() -> None:
    assert {found.architecture for found in FAMILIES} <= {config["architectures"][0] for config in CONFIGS.values()}  # type: ignore[index]


@models
@operators
def test_a_float_graph_equals_the_reference(tmp_path: Path, checkpoint: MakeCheckpoint, name: str, ops: str) -> None:
    _, model = write_graph(tmp_path, checkpoint(name), Recipe.load("none"), "float32", ops)
    check(tmp_path, model, 1e-5)


@models
@operators
def test_a_quantised_graph_equals_the_reference_of_its_weights(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, ops: str
) -> None:
    routers = PRESETS["int4"].rules[:1] if "num_experts_per_tok" in CONFIGS[name] else ()
    chosen = Recipe("test", Scheme(4, 32), routers, activations="float")
    _, model = write_graph(tmp_path, checkpoint(name), chosen, "float32", ops, as_deployed=True)
    check(tmp_path, model, 2e-5)


def test_a_window_is_computed_by_portable_operators(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    _, model = write_graph(
        tmp_path, checkpoint("mistral", sliding_window=9), Recipe.load("none"), "float32", "portable"
    )
    check(tmp_path, model, 1e-5)


@pytest.mark.parametrize(("target", "ops"), [("cpu", "native"), ("tensorrt", "auto")])
def test_a_window_is_refused_by_native_operators_with_advice(
    tmp_path: Path, checkpoint: MakeCheckpoint, target: str, ops: str
) -> None:
    options = ExportOptions(target=target, ops=ops, golden=GOLDEN)
    with pytest.raises(ExportError, match=r"sliding_window 9, .* --ops portable, or set max_position_embeddings to 9"):
        export_bundle(checkpoint("mistral", sliding_window=9), tmp_path / "b", options=options)
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
@models
def test_an_int4_bundle_passes_parity_on_the_cpu(tmp_path: Path, checkpoint: MakeCheckpoint, name: str) -> None:
    options = ExportOptions(ops="native", golden=GOLDEN)
    report = check_parity(export_bundle(checkpoint(name), tmp_path / "b", options=options))
    assert report.passed, [check for check in report.checks if check.passed is False]


@models
def test_a_bundle_for_gpus_passes_parity_on_the_emulator(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes a minute per model, and the emulator compiles its own kernels from the sources.
    monkeypatch.setattr(gpu_target, "compile_bundle_kernels", lambda *_: None)
    options = ExportOptions(target="tensorrt", sms=(86,), golden=GOLDEN, engines=EngineOptions(build=False))
    bundle = export_bundle(checkpoint(name), tmp_path / "b", recipe="int8", options=options)
    report = check_parity(bundle, runtime="cuda-emulated")
    assert report.passed, [check for check in report.checks if check.passed is False]
    assert report.diagnosis is not None
    assert max(layer.worst for layer in report.diagnosis.layers) < 0.3
