"""Does a bundle of smoothed, calibrated weights pass parity against the original float checkpoint?"""

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
from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.export import export as export_command
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.pack import ParityPack
from edgelm.parity.prompts import Prompt
from edgelm.progress import Silent
from edgelm.quant import PRESETS, Recipe, Scheme
from edgelm.quant.calibration import CalibrationOptions, CalibrationReport, calibrate_checkpoint
from edgelm.quant.calibration import run as running

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
OPTIONS = ExportOptions(golden=SHORT, threads=1, ops=OPERATOR_SETS[0])
SMALL = {"olmoe": {"num_experts": 6, "num_experts_per_tok": 2}, "fox": {}}
FAMILIES = pytest.mark.parametrize("family", SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"], 3000)
    path.write_text(" ".join(words))
    return path


class Notes(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def plain_bundle(source: Path, out: Path) -> Bundle:
    return export_bundle(source, out, recipe="int8", options=OPTIONS)


@FAMILIES
def test_a_smoothed_bundle_passes_parity_against_the_float_checkpoint(
    checkpoint: MakeCheckpoint, text: Path, tmp_path: Path, family: str
) -> None:
    source = checkpoint(family, **SMALL[family])
    options = CalibrationOptions(text=text, samples=24, length=24, smoothing="activations")
    made = export_bundle(source, tmp_path / "b", recipe="int8", options=OPTIONS, calibration=options)
    assert edgelm.check_parity(made.path).passed
    assert made.manifest.calibration is not None
    assert made.manifest.calibration.smoothing == "activations"
    # The float reference is the original checkpoint, not the smoothed one: bit for bit that of a plain export.
    plain = plain_bundle(source, tmp_path / "plain")
    packs = [ParityPack.load(bundle.path / "parity") for bundle in (made, plain)]
    assert np.array_equal(packs[0].reference.top_logits, packs[1].reference.top_logits)
    assert packs[0].quantized is not None
    assert packs[1].quantized is not None
    assert not np.array_equal(packs[0].quantized.top_logits, packs[1].quantized.top_logits)
    # The hashes of the source and the copied files are those of a plain export, too.
    assert made.manifest.source == plain.manifest.source
    assert made.manifest.files["config.json"] == plain.manifest.files["config.json"]
    assert "smoothing" not in json.loads((plain.path / "manifest.json").read_text()).get("calibration", {})


@FAMILIES
def test_the_quantised_checkpoint_makes_the_same_bundle(
    checkpoint: MakeCheckpoint, text: Path, tmp_path: Path, family: str
) -> None:
    """Smoothed norms and routers are the same whether the bundle is made from the checkpoint or directly."""
    source = checkpoint(family, **SMALL[family])
    given: dict[str, Any] = {"text": text, "samples": 24, "length": 24, "smoothing": "weights"}
    direct = export_bundle(
        source, tmp_path / "direct", recipe="int4", options=OPTIONS, calibration=CalibrationOptions(**given)
    )
    calibrate_checkpoint(source, tmp_path / "q", PRESETS["int4"], threads=1, **given)
    options = dataclasses.replace(OPTIONS, reference=source)
    by_way = export_bundle(tmp_path / "q", tmp_path / "by-way", options=options)
    weights = direct.manifest.graph.weights_file
    assert by_way.manifest.files[weights] == direct.manifest.files[weights]
    assert by_way.manifest.calibration == direct.manifest.calibration
    assert edgelm.check_parity(by_way.path).passed
    packs = [ParityPack.load(bundle.path / "parity") for bundle in (direct, by_way)]
    assert np.array_equal(packs[0].reference.top_logits, packs[1].reference.top_logits)
    with Checkpoint.open(tmp_path / "q") as opened:
        report = CalibrationReport.read(opened.path)
        assert report is not None
        assert report.info == direct.manifest.calibration
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by-way", "direct", "q"]


def test_floats_that_smoothing_changed_are_rounded_as_the_bundle_stores_them(
    checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    """A float matrix beside quantised ones is scaled with them, and is then no longer exact in bfloat16."""
    source = checkpoint("fox")
    recipe = Recipe.from_toml(
        'name = "q float"\ndefault = "int8-g32-sym"\n[[rule]]\nmatch = "*.q_proj.*"\nscheme = "float"'
    )
    options = CalibrationOptions(text=text, samples=24, length=24, smoothing="activations")
    for dtype in ("bf16", "fp32"):
        chosen = dataclasses.replace(OPTIONS, dtype=dtype)
        made = export_bundle(source, tmp_path / dtype, recipe=recipe, options=chosen, calibration=options)
        assert made.manifest.dtype == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
        assert edgelm.check_parity(made.path).passed


def test_static_activations_on_a_cpu_need_no_scales_and_a_note_says_so(
    checkpoint: MakeCheckpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("ran over the text for scales that no bundle holds")

    monkeypatch.setattr(running, "calibrated_scales", never)
    source, progress = checkpoint("fox"), Notes()
    recipe = Recipe("static", Scheme(8, 32), activations="int8-static")
    options = CalibrationOptions(text=text, samples=24, length=24)
    made = export_bundle(source, tmp_path / "b", recipe=recipe, options=OPTIONS, calibration=options, progress=progress)
    assert [note for note in progress.notes if note.startswith("note: ") and "int8 in blocks" in note]
    assert edgelm.check_parity(made.path).passed
    quiet = Notes()
    export_bundle(source, tmp_path / "plain", recipe="int8", options=OPTIONS, progress=quiet)
    assert not [note for note in quiet.notes if "static" in note]


def test_the_command_smooths(checkpoint: MakeCheckpoint, text: Path, tmp_path: Path) -> None:
    base = [str(checkpoint("fox")), "-o", str(tmp_path / "b"), "--ops", OPERATOR_SETS[0], "--threads", "1", "--json"]
    base += ["--greedy-tokens", "1", "--recipe", "int8", "--smooth", "weights"]
    assert CliRunner().invoke(export_command, base).exit_code == 2
    given = ["--calibration", str(text), "--samples", "24", "--sample-length", "24"]
    done = CliRunner().invoke(export_command, [*base, *given])
    assert done.exit_code == 0, done.output
    calibration = Bundle.open(tmp_path / "b").manifest.calibration
    assert calibration is not None
    assert calibration.smoothing == "weights"
