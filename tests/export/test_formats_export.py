"""Do bundles of checkpoints that other tools quantised compute with exactly their weights?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from format_writers import STYLES, Written, linear, write_format
from test_graph_computes_the_reference import check
from tiny_models import OPERATOR_SETS, MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.main import cli
from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.plan import DEBUG_FILE
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant import Recipe
from edgelm.reference.module import ReferenceModel

BY_NAME = {style.name: style for style in STYLES}
SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
SMALL: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
NATIVE = (
    "gptq",
    "gptq-int3",
    "gptq-row",
    "awq",
    "packed-asym",
    "int8",
    "int8-static",
    "float8",
    "fp8-block",
    "fp8-static",
)
PORTABLE = [
    ("olmoe", "gptq"), ("olmoe", "awq"), ("fox", "gptq-v2"), ("fox", "packed-asym"), ("fox", "int8"),
    ("fox", "int8-asym"),
]  # fmt: skip


def written(checkpoint: MakeCheckpoint, tmp_path: Path, model: str, style: str) -> Written:
    changes = SMALL if model == "olmoe" else {}
    return write_format(checkpoint(model, **changes), tmp_path / "other format", BY_NAME[style], quantise=linear)


def exported(source: Path, out: Path, ops: str) -> Bundle:
    return export_bundle(source, out, options=ExportOptions(ops=ops, golden=SHORT, threads=2))


def computes(bundle: Bundle, made: Written, tolerance: float = 2e-5) -> None:
    """Compare the debug graph with the PyTorch model of the true values."""
    with Checkpoint.open(made.path) as opened:
        model = ReferenceModel(opened.decoder)
    model.load_weights(lambda name: made.values[name])
    shutil.copyfile(bundle.path / DEBUG_FILE, bundle.path / "graph.onnx")
    check(bundle.path, model, tolerance)


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
@pytest.mark.parametrize("style", NATIVE)
@pytest.mark.parametrize("model", ["olmoe", "fox"])
def test_native_bundles_compute_with_its_weights(
    checkpoint: MakeCheckpoint, tmp_path: Path, model: str, style: str
) -> None:
    made = written(checkpoint, tmp_path, model, style)
    bundle = exported(made.path, tmp_path / "bundle", "native")
    assert bundle.manifest.recipe.name == BY_NAME[style].recipe
    computes(bundle, made)


@pytest.mark.parametrize(("model", "style"), PORTABLE)
def test_portable_bundles_compute_with_its_weights(
    checkpoint: MakeCheckpoint, tmp_path: Path, model: str, style: str
) -> None:
    made = written(checkpoint, tmp_path, model, style)
    computes(exported(made.path, tmp_path / "bundle", "portable"), made)


@pytest.mark.parametrize("style", ["fp8-block", "gptq-int3"])
def test_what_portable_operators_lack_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path, style: str) -> None:
    made = written(checkpoint, tmp_path, "fox", style)
    with pytest.raises(ExportError, match="--ops native"):
        exported(made.path, tmp_path / "bundle", "portable")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_stays_float_keeps_its_type(checkpoint: MakeCheckpoint, tmp_path: Path, dtype: str) -> None:
    """Even if float16 scales come first in the file."""
    made = written(checkpoint, tmp_path, "fox", "gptq")
    floats = {key: array for key, (kind, array) in made.arrays.items() if kind == "BF16"}
    for key, bits in floats.items():
        values = bits if dtype == "BF16" else (bits.astype(np.uint32) << 16).view(np.float32)
        made.arrays[key] = (dtype, values)
    made.arrays = dict(sorted(made.arrays.items(), key=lambda item: item[1][0] != "F16"))
    made.store()
    bundle = exported(made.path, tmp_path / "bundle", "native")
    assert bundle.manifest.dtype == {"BF16": "bfloat16", "F32": "float32"}[dtype]


def test_the_commands_need_no_further_option(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = written(checkpoint, tmp_path, "fox", "awq")
    run = CliRunner().invoke(cli, ["export", str(made.path), "-o", str(tmp_path / "bundle")], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    bundle = Bundle.open(tmp_path / "bundle")
    recipe = Recipe.from_toml(bundle.manifest.recipe.toml)
    assert recipe.name == "awq-int4-g32-asym"
    run = CliRunner().invoke(cli, ["parity", str(bundle.path), "--checkpoint", str(made.path)], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(cli, ["inspect", str(bundle.path)], catch_exceptions=False)
    assert "awq-int4-g32-asym" in run.output
    run = CliRunner().invoke(
        cli, ["export", str(made.path), "-o", str(tmp_path / "other"), "--recipe", "int8"], catch_exceptions=False
    )
    assert run.exit_code == 1
    assert "already quantised" in run.output
