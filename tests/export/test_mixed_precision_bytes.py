"""Does mixed precision predict the bytes of the weights file?"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_read_bundle import planned
from tiny_models import MakeCheckpoint

from edgelm.checkpoint import Checkpoint
from edgelm.export import ExportOptions
from edgelm.export.plan import WEIGHTS_FILE
from edgelm.quant import parse_scheme
from edgelm.quant.mixed_precision.recipe_toml import Choice, make_recipe
from edgelm.quant.mixed_precision.units import PAGE, find_units, fixed_bytes

SCHEMES = [None, *map(parse_scheme, ("int3-g64-sym", "int4-g16-asym", "int5-row-sym", "int8-g32-asym", "fp8-b64"))]
HEAD = parse_scheme("int8-g128-sym")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {}),
        # RoPE tables as large as everything else, and rows that no tile and no group divides.
        ("olmoe", {"max_position_embeddings": 8192, "tie_word_embeddings": True}),
        ("fox", {"hidden_size": 100, "intermediate_size": 130, "vocab_size": 643, "head_dim": 24}),
        ("fox", {"max_position_embeddings": 8192, "tie_word_embeddings": False}),
    ],
)
def test_a_weights_file_has_the_bytes_that_mixed_precision_counted(
    checkpoint: MakeCheckpoint, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """Exact except for padding: one page is counted for each tensor, and one more for a tied embedding."""
    path = checkpoint(family, **changes)
    with Checkpoint.open(path) as opened:
        decoder = opened.decoder
    pick = random.Random(1)
    # An int8 head is two tensors, as is counted.
    schemes = [(u, HEAD if u.kind == "head" else pick.choice(SCHEMES)) for u in find_units(decoder)]
    choices = [Choice(unit, scheme, 0.0, unit.nbytes(scheme), 0) for unit, scheme in schemes]
    recipe, _ = make_recipe("mixed", choices, family == "olmoe")
    planned(tmp_path, path, recipe, ExportOptions(ops="native"))
    sizes = [tensor["size"] for tensor in json.loads((tmp_path / "manifest.json").read_text())["tensors"]]
    counted = sum(choice.nbytes for choice in choices) + fixed_bytes(decoder)
    assert len({choice.scheme for choice in choices}) > 3
    assert sum(sizes) == counted - PAGE * (len(sizes) + decoder.tied)
    assert sum(sizes) < (tmp_path / WEIGHTS_FILE).stat().st_size <= counted
