"""Fixtures of all tests: bundles of the tiny trained checkpoints, and SIGINT enabled for the programs tests start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"

# PyTorch's idle threads spin by default. With tiny matrices, and other tests on the same cores, they take most of the
# CPU time. Child processes inherit this. It has to be set before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The shell starts background jobs with SIGINT ignored, and their child processes inherit that, unless it is handled.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Function (model, recipe, operator set) that returns a bundle of a tiny trained checkpoint. Do not change it."""
    from edgelm.export import ExportOptions, export_bundle

    root = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[str, str, str], Path] = {}

    def get(model: str, recipe: str, ops: str) -> Path:
        key = (model, recipe, ops)
        if key not in made:
            folder = root / "-".join(key)
            export_bundle(CHECKPOINTS / f"{model}-tiny", folder, recipe=recipe, options=ExportOptions(ops=ops))
            made[key] = folder
        return made[key]

    return get
