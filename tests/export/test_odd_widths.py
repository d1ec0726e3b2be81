"""Do rows of any width work: hidden sizes, experts, heads and vocabularies that no block of 32 divides?

The graphs of tiny random checkpoints are compared with the PyTorch model of the dequantised weights, as in
test_graph_computes_the_reference. An unsupported width is refused, and the advice of the error works.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_graph_computes_the_reference import check, check_rounded, recipe, write_graph
from tiny_models import OPERATOR_SETS, MakeCheckpoint

from edgelm.errors import ExportError
from edgelm.export.packing.gpu import gpu_format
from edgelm.quant.recipe import Recipe, Rule
from edgelm.quant.scheme import parse_scheme

NATIVE = pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")

# Hidden size, feed-forward width (of an expert), heads, key/value heads, vocabulary. OLMoE's head size follows from
# these. Fox's is independent, and its hidden size may be odd.
WIDTHS = {
    "multiples of 20": (100, 60, 2, 1, 700),
    "odd": (90, 37, 5, 5, 643),
    "multiples of 16": (48, 80, 4, 2, 656),
    "below a block": (12, 7, 2, 2, 641),
}
SCHEMES = [
    "int4-g32-sym", "int4-g16-asym", "int4-row-sym", "int3-g64-asym", "int5-row-asym", "int6-g16-sym", "int8-g128-sym",
    "int8-g16-asym", "fp8-row", "fp8-b16", "fp8-b64", "float",
]  # fmt: skip


def odd(name: str, widths: str) -> dict[str, Any]:
    hidden, inner, heads, kv_heads, vocabulary = WIDTHS[widths]
    changes = {
        "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    if name == "olmoe":
        return changes | {"num_experts": 5, "num_experts_per_tok": 2}
    return changes | ({"hidden_size": 75, "head_dim": 18} if widths == "odd" else {})


@NATIVE
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_native_operators_take_rows_of_any_width(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, widths: str, scheme: str
) -> None:
    path = checkpoint(name, **odd(name, widths))
    dtype = "bfloat16" if widths == "odd" else "float32"
    _, model = write_graph(tmp_path, path, recipe(scheme, name, "float"), dtype, "native", as_deployed=True)
    check(tmp_path, model, 2e-5)


@NATIVE
@pytest.mark.parametrize("preset", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_presets_as_deployed_round_activations_and_nothing_else(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, widths: str, preset: str
) -> None:
    path = checkpoint(name, **odd(name, widths))
    chosen = Recipe.load(preset)
    _, model = write_graph(tmp_path, path, chosen, "float32", "native", as_deployed=True, as_rounded=True)
    if preset == "fp8":  # multiplies floats: nothing is rounded
        check(tmp_path, model, 2e-5)
    else:
        check_rounded(tmp_path, model)


def test_portable_operators_refuse_by_name_width_and_field_and_the_advice_works(
    tmp_path: Path, checkpoint: MakeCheckpoint
) -> None:
    path = checkpoint("fox", **odd("fox", "multiples of 20") | {"head_dim": 16})
    chosen = recipe("int4-row-sym", "fox")
    refused = (
        r"model.embed_tokens.weight is int4-row-sym with rows of 100 \(hidden_size in config.json\).*"
        "--target cpu --ops native, which supports any width, or keep such matrices float"
    )
    with pytest.raises(ExportError, match=refused):
        write_graph(tmp_path, path, chosen, "float32", "portable")
    if "native" in OPERATOR_SETS:
        (tmp_path / "native").mkdir()
        _, model = write_graph(tmp_path / "native", path, replace(chosen, activations="float"), "float32", "native")
        check(tmp_path / "native", model, 2e-5)
    # Of the widths 100, 60 and 32 only the last is a multiple of 16.
    kept = Recipe("kept", None, (Rule("*.o_proj.weight", chosen.default),), activations="float")
    _, model = write_graph(tmp_path, path, kept, "float32", "portable")
    check(tmp_path, model, 2e-5)


@pytest.mark.parametrize(
    ("width", "dtype", "advice"),
    [(96, "int8", "int8 or fp8 or float16 or bfloat16 or float32"), (48, "float16", "float16 or bfloat16 or float32")],
)
def test_gpu_kernels_name_the_types_that_support_a_width(width: int, dtype: str, advice: str) -> None:
    with pytest.raises(ExportError, match=rf"lm_head.weight is int4-.* with rows of {width} \(hidden_size.* {advice}"):
        gpu_format([parse_scheme("int4-g16-sym")], dtype, width, "lm_head.weight")
    chosen = parse_scheme("int8-g32-sym").effective(width) if dtype == "int8" else None
    assert gpu_format([chosen], dtype, width, "lm_head.weight") is not None
    with pytest.raises(ExportError, match=r"in rows of a multiple of .* Export for the CPU: --target cpu"):
        gpu_format([None], "float32", 100, "lm_head.weight")
