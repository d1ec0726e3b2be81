"""Does a calibrated bundle record its calibration, hold the calibrated values, and pass parity?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import OPERATOR_SETS, MakeCheckpoint

import edgelm
from edgelm.bundle import Bundle, CalibrationInfo, ExpertFallback
from edgelm.checkpoint import Checkpoint
from edgelm.cli.export import export as export_command
from edgelm.cli.quantize import quantize as quantize_command
from edgelm.errors import EdgeLMError, ExportError, ParityError, RecipeError
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.pack import ParityPack
from edgelm.parity.prompts import Prompt
from edgelm.quant.calibration import CalibrationOptions, CoverageOptions, calibrate_checkpoint
from edgelm.quant.calibration import run as running
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.recipe import Recipe

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
OPTIONS = ExportOptions(golden=SHORT, threads=1, ops=OPERATOR_SETS[0])
SMALL = {"num_experts": 6, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"], 3000)
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def float_checkpoint(checkpoint: MakeCheckpoint) -> Path:
    return checkpoint("olmoe", **SMALL)


@pytest.fixture(scope="module")
def calibration(text: Path) -> CalibrationOptions:
    return CalibrationOptions(text=text, samples=48, length=24)


@pytest.fixture(scope="module")
def bundle(float_checkpoint: Path, calibration: CalibrationOptions, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("calibrated") / "bundle"
    made = export_bundle(float_checkpoint, out, recipe="int4", options=OPTIONS, calibration=calibration)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    return made


@pytest.fixture(scope="module")
def quantised(
    float_checkpoint: Path, calibration: CalibrationOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "checkpoint"
    options = {"text": calibration.text, "samples": 48, "length": 24, "threads": 1}
    calibrate_checkpoint(float_checkpoint, out, Recipe.load("int4"), **options)  # type: ignore[arg-type]
    return out


def test_a_calibrated_bundle_passes_parity(bundle: Bundle) -> None:
    report = edgelm.check_parity(bundle.path)
    assert report.passed, report


def test_the_manifest_says_how_it_was_calibrated(bundle: Bundle, quantised: Path) -> None:
    found = bundle.manifest.calibration
    assert found is not None
    assert (found.text, found.samples, found.length) == ("words.txt", 48, 24)
    report = json.loads((quantised / "calibration.json").read_text())
    assert [dataclasses.asdict(one) for one in found.fallbacks] == report["fallbacks"]
    assert len(found.sha256) == 64
    # Two layers with four projections and six experts each, and the head; the embedding is not calibrated.
    assert sum(found.methods.values()) == 2 * (4 + 3 * 6) + 1
    assert found.methods.get("gptq", 0) > 20


def test_its_codes_are_those_of_the_calibrated_checkpoint(
    bundle: Bundle, quantised: Path, float_checkpoint: Path, tmp_path: Path
) -> None:
    same = export_bundle(quantised, tmp_path / "same", options=OPTIONS)
    plain = export_bundle(float_checkpoint, tmp_path / "plain", recipe="int4", options=OPTIONS)
    weights = bundle.manifest.graph.weights_file
    assert same.manifest.files[weights] == bundle.manifest.files[weights]
    assert plain.manifest.files[weights] != bundle.manifest.files[weights]
    # An export of the quantised checkpoint has its calibration report; one without calibration has none.
    assert same.manifest.calibration == bundle.manifest.calibration
    assert "calibration" not in json.loads((plain.path / "manifest.json").read_text())


def test_the_float_reference_is_the_float_checkpoint(
    bundle: Bundle, quantised: Path, float_checkpoint: Path, tmp_path: Path
) -> None:
    alone = export_bundle(quantised, tmp_path / "alone", options=OPTIONS)
    options = dataclasses.replace(OPTIONS, reference=float_checkpoint)
    referred = export_bundle(quantised, tmp_path / "referred", options=options)
    packs = {made.path.name: ParityPack.load(made.path / "parity") for made in (bundle, alone, referred)}
    assert packs["alone"].quantized is None
    assert packs["bundle"].quantized is not None
    assert packs["referred"].quantized is not None
    for which in ("reference", "quantized"):
        wanted, found = (getattr(packs[name], which) for name in ("bundle", "referred"))
        assert np.array_equal(wanted.top_logits, found.top_logits)
    assert edgelm.check_parity(referred.path).passed


def test_a_reference_of_another_model_is_refused(
    checkpoint: MakeCheckpoint, quantised: Path, float_checkpoint: Path, tmp_path: Path
) -> None:
    def refused(source: Path, reference: Path, match: str) -> None:
        with pytest.raises(EdgeLMError, match=match):
            export_bundle(source, tmp_path / "b", options=dataclasses.replace(OPTIONS, reference=reference))
        assert list(tmp_path.iterdir()) == []

    refused(quantised, checkpoint("olmoe"), "differs in num_experts")
    refused(quantised, checkpoint("fox"), "was not made from|is no")
    refused(quantised, quantised, "is quantised")
    refused(float_checkpoint, float_checkpoint, "its own reference")


def test_parity_against_the_float_checkpoint_alone_is_refused(
    bundle: Bundle, float_checkpoint: Path, quantised: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="is calibrated"):
        edgelm.check_parity(bundle.path, checkpoint=float_checkpoint)
    of_quantised = export_bundle(quantised, tmp_path / "b", options=OPTIONS)
    assert edgelm.check_parity(of_quantised.path, checkpoint=quantised).passed


def test_an_interrupted_export_resumes(
    bundle: Bundle,
    float_checkpoint: Path,
    calibration: CalibrationOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "bundle"

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running._Run, "_say", interrupt)
        export_bundle(float_checkpoint, out, recipe="int4", options=OPTIONS, calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.calibrating"]
    made = export_bundle(float_checkpoint, out, recipe="int4", options=OPTIONS, calibration=calibration)
    weights = bundle.manifest.graph.weights_file
    assert made.manifest.files[weights] == bundle.manifest.files[weights]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_cannot_be_exported_is_refused_before_the_calibration(
    checkpoint: MakeCheckpoint,
    float_checkpoint: Path,
    quantised: Path,
    calibration: CalibrationOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(running._Run, "all", never)

    def refused(error: type[EdgeLMError], match: str, source: Path = float_checkpoint, **given: Any) -> None:
        options = dataclasses.replace(OPTIONS, **given.pop("options", {}))
        given = {"recipe": "int4", "calibration": calibration, **given}
        with pytest.raises(error, match=match):
            export_bundle(source, tmp_path / "b", options=options, **given)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]

    (tmp_path / "there").mkdir()
    refused(EdgeLMError, "max-ram", options={"max_ram": 1000})
    refused(ExportError, "already quantised", source=quantised, recipe=None)
    refused(RecipeError, "already quantised", source=quantised)
    refused(RecipeError, "quantises none", recipe="none")
    with pytest.raises(EdgeLMError, match="exists already"):
        export_bundle(float_checkpoint, tmp_path / "there", options=OPTIONS, calibration=calibration)


def test_the_command_line_writes_the_same_weights(
    bundle: Bundle, float_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    base = [str(float_checkpoint), "-o", str(tmp_path / "b"), "--ops", OPERATOR_SETS[0], "--threads", "1", "--json"]
    given = [*base, "--greedy-tokens", "2", "--calibration", str(text), "--samples", "48", "--sample-length", "24"]
    done = CliRunner().invoke(export_command, given)
    assert done.exit_code == 0, done.output
    made = Bundle.open(tmp_path / "b")
    assert made.manifest.calibration == bundle.manifest.calibration
    weights = bundle.manifest.graph.weights_file
    assert made.manifest.files[weights] == bundle.manifest.files[weights]
    assert CliRunner().invoke(export_command, [*base, "--require-coverage"]).exit_code == 2


def test_a_manifest_round_trips_with_and_without_calibration(bundle: Bundle, tmp_path: Path) -> None:
    info = CalibrationInfo("t", "0" * 64, 3, 5, {"gptq": 7, "rtn": 1}, (ExpertFallback(2, 9, 4),))
    for calibration in (None, info):
        manifest = dataclasses.replace(bundle.manifest, calibration=calibration)
        again = type(manifest).from_json(manifest.to_json(), tmp_path)
        assert again == manifest
        assert ("calibration" in json.loads(manifest.to_json())) is (calibration is not None)


def test_experts_that_fell_back_are_in_the_manifest(float_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = CalibrationOptions(text=text, samples=48, length=24, coverage=CoverageOptions(min_tokens=100_000))
    made = export_bundle(float_checkpoint, tmp_path / "b", recipe="int4", options=OPTIONS, calibration=options)
    assert made.manifest.calibration is not None
    fallen = made.manifest.calibration.fallbacks
    assert [(entry.layer, entry.expert) for entry in fallen] == [(i, e) for i in range(2) for e in range(6)]
    assert all(entry.tokens < 100_000 for entry in fallen)


def test_quantize_without_calibration_rounds_to_nearest(float_checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(quantize_command, [str(float_checkpoint), "-o", str(tmp_path / "q"), "--json"])
    assert done.exit_code == 0, done.output
    assert "calibration" not in json.loads(done.stdout)
    quantize_checkpoint(float_checkpoint, tmp_path / "r", Recipe.load("int4"))
    with Checkpoint.open(tmp_path / "q") as made, Checkpoint.open(tmp_path / "r") as wanted:
        assert all(np.array_equal(made.read_raw(name), wanted.read_raw(name)) for name in wanted.tensors)
    assert not (tmp_path / "q" / "calibration.json").exists()
