"""Is a recipe that ONNX Runtime's own operators cannot compute refused by name, before anything is written?"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import MakeCheckpoint

from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.quant import PRESETS, Fp8Scheme, Recipe, Rule, Scheme
from edgelm.quant.checkpoint import quantize_checkpoint


def one_expert(bits: int) -> Recipe:
    return Recipe("mixed", Scheme(4, 32), (Rule("*.experts.1.*", Scheme(bits, 32)), *PRESETS["int4"].rules))


@pytest.mark.parametrize(
    ("family", "recipe", "tensor"),
    [
        ("fox", PRESETS["fp8"], r"model\.layers\.0\.self_attn\.q_proj\.weight is fp8-row"),
        *(
            ("olmoe", one_expert(bits), rf"model\.layers\.0\.mlp\.experts\.1\.gate_proj\.weight is int{bits}-g32-sym")
            for bits in (3, 5, 6)
        ),
    ],
)
@pytest.mark.parametrize("stored", [False, True], ids=["quantised on the way", "quantised checkpoint"])
def test_the_tensor_and_an_alternative_are_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, family: str, recipe: Recipe, tensor: str, stored: bool
) -> None:
    source = checkpoint(family)
    if stored:
        quantize_checkpoint(source, tmp_path / "q", recipe)
        source = tmp_path / "q"
    with pytest.raises(ExportError, match=rf"{tensor} .*--ops native"):
        export_bundle(source, tmp_path / "b", recipe=recipe, options=ExportOptions(ops="portable"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("family", ["fox", "olmoe"])
def test_the_native_operators_refuse_e5m2_by_name(checkpoint: MakeCheckpoint, tmp_path: Path, family: str) -> None:
    recipe = Recipe("range", Fp8Scheme(None, "e5m2"), (Rule("model.embed_tokens.weight", None),))
    with pytest.raises(ExportError, match=r"layers\.0\..* is fp8e5m2-row .*choose fp8-row"):
        export_bundle(checkpoint(family), tmp_path / "b", recipe=recipe, options=ExportOptions(ops="native"))
    assert not (tmp_path / "b").exists()
