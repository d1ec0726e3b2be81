"""Fixtures: bundles of the tiny trained checkpoints, exported once, with every operator set that can run here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgelm.runtimes.onnxruntime.native_library import library_path

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


OPERATOR_SETS = ("native", "portable") if library_path() is not None else ("portable",)


@pytest.fixture(scope="session")
def ops():
    """Operator set of the bundles; a module that needs more than the first one overrides this."""
    return OPERATOR_SETS[0]


@pytest.fixture(scope="session")
def export(tiny_bundle):
    """Function (model, recipe, ops) that returns the folder of a good bundle."""
    return tiny_bundle


@pytest.fixture(scope="session")
def exported(export, ops):
    """Function (model, recipe) that returns the folder of a good bundle."""
    return lambda model, recipe: export(model, recipe, ops)


@pytest.fixture
def copied(exported, tmp_path):
    """Function (model, recipe) that returns a copy of a bundle, which may be changed."""

    def get(model: str, recipe: str) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(exported(model, recipe), folder)
        return folder

    return get
