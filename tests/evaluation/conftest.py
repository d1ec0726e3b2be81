"""Fixtures: bundles of the tiny trained checkpoints, and short texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.runtimes.onnxruntime.native_library import library_path

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
OPS = "native" if library_path() is not None else "portable"


@pytest.fixture(scope="session")
def checkpoint():
    """Function (family) that returns the folder of its float checkpoint."""
    return lambda model: CHECKPOINTS / f"{model}-tiny"


@pytest.fixture(scope="session")
def exported(tiny_bundle):
    """Function (model, recipe) that returns the folder of a bundle."""
    return lambda model, recipe, ops=OPS: tiny_bundle(model, recipe, ops)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """Function (model, recipe) that returns the folder of a quantised checkpoint."""
    from edgelm.quant import Recipe
    from edgelm.quant.checkpoint import quantize_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def get(model: str, recipe: str) -> Path:
        folder = root / f"{model}-{recipe}"
        if not folder.exists():
            quantize_checkpoint(CHECKPOINTS / f"{model}-tiny", folder, Recipe.load(recipe))
        return folder

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file that is long enough for a few windows."""
    file = tmp_path_factory.mktemp("text") / "text.py"
    lines = [f"def f{i}(x):\n    return x * {i * 37 % 101} + {i}\n\n\n" for i in range(300)]
    file.write_text("".join(lines), encoding="utf-8")
    return file
