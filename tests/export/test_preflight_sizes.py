"""Does the preflight know the size of every tensor of a bundle that does not exist yet?"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import CONFIGS, MakeCheckpoint

from edgelm.bundle import ModelInfo
from edgelm.checkpoint import Checkpoint
from edgelm.errors import ExportError, RecipeError
from edgelm.export.options import ExportOptions
from edgelm.export.plan import BuiltGraphs, GraphRequest, float_dtype
from edgelm.export.registry import TARGETS
from edgelm.preflight.planned import Planned, float_type, plan
from edgelm.progress import Silent
from edgelm.quant.recipe import PRESETS, Recipe
from edgelm.quant.source import WeightSource

MIXED = """
name = "mixed"
default = "int3-g64-asym"
kv = "int8"

[[rule]]
role = ["q", "down"]
scheme = "int8-row-sym"

[[rule]]
role = ["k", "head"]
scheme = "float"

[[rule]]
role = "gate"
scheme = "int6-g16-sym"
"""
SPLIT = """
name = "split"
default = "int4-g16-asym"

[[rule]]
role = ["embedding", "head"]
scheme = "int8-g128-sym"
"""
ONE_EXPERT = """
name = "one expert"
default = "int4-g32-sym"

[[rule]]
match = "*.experts.1.*"
scheme = "int4-g32-sym"
activations = "float"
"""
RECIPES = {**PRESETS, **{one.name: one for one in map(Recipe.from_toml, (MIXED, SPLIT, ONE_EXPERT))}}
WAYS = (("cpu", "native"), ("cpu", "portable"), ("cuda", "auto"), ("tensorrt", "auto"))


def _exported(folder: Path, recipe: Recipe, target: str, ops: str) -> BuiltGraphs:
    checkpoint = Checkpoint(folder)
    source, options, kind = WeightSource(checkpoint, recipe), ExportOptions(target=target, ops=ops), TARGETS[target]
    dtype, decoder = float_dtype(source, options, kind), checkpoint.decoder
    ops = kind.operator_set(ops, Silent())
    return kind.build(GraphRequest(source, decoder, ModelInfo.of(decoder, "tiny"), ops, dtype))


def _planned(folder: Path, recipe: Recipe, target: str, ops: str) -> Planned:
    checkpoint = Checkpoint(folder)
    stored = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[next(iter(checkpoint.tensors.values())).dtype]
    model = recipe.for_model(checkpoint.decoder)
    quantises = any(model.scheme_for(n, s) is not None for n, s in checkpoint.decoder.tensor_shapes.items())
    dtype = float_type("auto", stored, target, quantises=quantises)
    return plan(checkpoint.decoder, recipe, target=target, ops=ops, dtype=dtype)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("target", "ops"), WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_are_the_planned_tensors_those_that_are_exported(
    family: str, target: str, ops: str, recipe: str, checkpoint: MakeCheckpoint
) -> None:
    folder = checkpoint(family)
    try:
        exported = _exported(folder, RECIPES[recipe], target, ops)
    except (ExportError, RecipeError) as error:
        # Every recipe that an export refuses the preflight refuses too, for one of the reasons that the export gives.
        with pytest.raises(type(error)) as raised:
            _planned(folder, RECIPES[recipe], target, ops)
        assert str(raised.value) in str(error)
        return
    planned = _planned(folder, RECIPES[recipe], target, ops)
    assert planned.tensors == {slot.name: slot.size for slot in exported.weights.slots.values()}
    assert planned.weights_bytes == exported.weights.size
    assert planned.kv == exported.kv
