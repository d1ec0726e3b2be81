"""Bundles of the tiny trained checkpoints for GPUs, small enough to be run on the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.bundle import Bundle
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.tensorrt import target as gpu_target
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import BUILT_IN
from edgelm.quant.recipe import Recipe

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
GOLDEN = GoldenOptions(prompts=BUILT_IN[:2], greedy_tokens=4, max_prompt_tokens=20)
TABLES = "".join(f'\n[[rule]]\nmatch = "{name}"\nscheme = "float"\n' for name in ("*embed_tokens*", "*lm_head*"))
ROUTER = '\n[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'


def recipe(family: str, name: str) -> Recipe:
    """A preset, or "fp8-token": FP8 weights and activations, with a cache of int8."""
    if name != "fp8-token":
        return Recipe.load(name)
    text = 'name = "fp8-token"\ndefault = "fp8-row"\nactivations = "fp8-token"\nkv = "int8"\n'
    tables = TABLES if family == "olmoe" else TABLES[: TABLES.index("\n[[rule]]", 1)]
    return Recipe.from_toml(text + tables + (ROUTER if family == "olmoe" else ""))


def write_bundle(folder: Path, family: str, name: str) -> Bundle:
    """Export a tiny checkpoint, without compiled kernels: the emulator compiles its own from the sources."""
    options = ExportOptions(target="tensorrt", sms=(86,), golden=GOLDEN, engines=EngineOptions(build=False))
    with pytest.MonkeyPatch.context() as patch:
        # Compiling takes a minute per bundle; tests/export/test_export_gpu.py exports with kernels.
        patch.setattr(gpu_target, "compile_bundle_kernels", lambda *_: None)
        return export_bundle(CHECKPOINTS / f"{family}-tiny", folder, recipe=recipe(family, name), options=options)
