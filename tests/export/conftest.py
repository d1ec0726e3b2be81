from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, MakeCheckpoint

from edgelm.synth import write_random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Make a random checkpoint of a family (each one once), with changed config fields."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}{sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / family
            # Seeded by the key, so that weights do not depend on earlier tests. With another prefix of it some values
            # may lie so close to a tie that the tests' float32 and the device's round them to different steps.
            seed = zlib.crc32(f"a{key}".encode())
            made[key] = write_random_checkpoint({**CONFIGS[family], **changes}, folder, seed=seed)
        return made[key]

    return make
