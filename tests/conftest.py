"""For all tests: bundles of the tiny trained checkpoints, and a Ctrl-C that works in the programs that tests start."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"

# A shell's background jobs ignore SIGINT, and so do the programs that they start. One that is handled is not ignored
# there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Function (model, recipe, operator set) to a bundle of a tiny trained checkpoint, exported once. Read only."""
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
