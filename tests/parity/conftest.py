"""Bundles of the tiny trained checkpoints, exported once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Function (model, recipe) to the folder of a healthy bundle."""
    from edgelm.export import export_bundle

    root = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, recipe: str) -> Path:
        if (model, recipe) not in made:
            folder = root / f"{model}-{recipe}"
            export_bundle(CHECKPOINTS / f"{model}-tiny", folder, recipe=recipe)
            made[model, recipe] = folder
        return made[model, recipe]

    return get


@pytest.fixture
def copied(exported, tmp_path):
    """Function (model, recipe) to a copy of a bundle that may be damaged."""

    def get(model: str, recipe: str) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(exported(model, recipe), folder)
        return folder

    return get
