"""Can others read every weight of a bundle from docs/reference/weights.md alone? `read_bundle.py` follows that page."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from read_bundle import read_weights
from tiny_models import MakeCheckpoint

from edgelm.bundle import Manifest
from edgelm.bundle.contents import Contents, Layout
from edgelm.bundle.cpu_layout import Scales, read_matrices
from edgelm.checkpoint import Checkpoint
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.graph.base import STORAGE, rotary_tables, stored_as
from edgelm.export.plan import WEIGHTS_FILE, make_plan
from edgelm.export.registry import TARGETS
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.progress import Silent
from edgelm.quant.primitives import as_float32
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.tokenization.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "weights.md"
EXAMPLES = Path(__file__).parents[2] / "examples" / "checkpoints"
SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
FLOAT_ROUTER = '[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'
ODD = {
    "hidden_size": 100,
    "intermediate_size": 37,
    "vocab_size": 643,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}


def recipe(default: str, *rules: tuple[str, str], router: bool = True) -> Recipe:
    """Return a recipe with a rule for the router (of OLMoE) and then these patterns and schemes."""
    text = "".join(f'[[rule]]\nmatch = "{match}"\nscheme = "{scheme}"\n' for match, scheme in rules)
    return Recipe.from_toml(f'name = "test"\ndefault = "{default}"\n{FLOAT_ROUTER if router else ""}{text}', "test")


MIXED = (
    ("*.experts.0.*", "int8-g32-asym"), ("*.experts.1.*", "fp8-b16"), ("*.experts.2.*", "float"),
    ("*.experts.3.gate_proj.weight", "int3-row-asym"), ("*.experts.3.up_proj.weight", "int5-g16-sym"),
    ("*.experts.4.*", "int6-g64-sym"), ("*.experts.5.*", "int3-g32-sym"), ("*.experts.6.*", "fp8-row"),
    ("*.experts.7.gate_proj.weight", "int4-g32-sym"), ("*.experts.7.up_proj.weight", "int8-g64-asym"),
    ("*.q_proj.weight", "int3-g64-asym"), ("*.k_proj.weight", "int6-g16-sym"), ("*.v_proj.weight", "int5-row-sym"),
    ("*.1.self_attn.o_proj.weight", "fp8-b64"), ("lm_head.weight", "int8-g128-sym"),
)  # fmt: skip
NO_COMMON_TYPE = (("*.q_proj.weight", "float"), ("*.gate_proj.weight", "fp8-row"), ("*.up_proj.weight", "fp8-b32"))
PORTABLE_MIX = (
    ("*.experts.0.*", "int8-g32-asym"), ("*.k_proj.weight", "int8-row-sym"),
    ("model.embed_tokens.weight", "int8-g16-asym"), ("lm_head.weight", "float"),
)  # fmt: skip
TRAINED_MIX = (
    ("*.experts.[0-9].*", "int3-g32-sym"), ("*.experts.1?.*", "fp8-b32"), ("*.up_proj.weight", "int6-g32-sym"),
    ("*.1.*.v_proj.weight", "int8-row-sym"),
)  # fmt: skip
GPU_MIX = (
    ("*.k_proj.weight", "int8-g64-asym"),
    ("*.up_proj.weight", "int3-g64-asym"),
    ("*.o_proj.weight", "int6-row-sym"),
)


@dataclass(frozen=True)
class Case:
    """An export: a family with changes of its config, a recipe, and options."""

    family: str
    recipe: Recipe
    changes: dict[str, Any] = field(default_factory=dict)
    target: str = "cpu"
    ops: str = "auto"
    dtype: str = "auto"


PRESETS = {name: Recipe.load(name) for name in ("none", "int4", "int8", "fp8")}
SCHEMES = ("int3-g32-sym", "int4-g16-asym", "int5-row-asym", "int6-g64-sym", "int8-g32-asym", "fp8-b16", "fp8-row")
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
CASES: dict[str, Case] = {
    **{f"native {scheme}": Case("olmoe", recipe(scheme), ops="native") for scheme in SCHEMES},
    **{f"native odd {scheme}": Case("olmoe", recipe(scheme), ODD | FEW, ops="native") for scheme in SCHEMES},
    **{f"native {dtype}": Case("fox", PRESETS["none"], ops="native", dtype=dtype) for dtype in STORAGE},
    "native mixed": Case("olmoe", recipe("int4-g32-sym", *MIXED), ops="native"),
    "native mixed odd": Case("olmoe", recipe("int4-g32-asym", *MIXED), ODD, ops="native"),
    "native, no common type": Case("fox", recipe("int4-g64-asym", *NO_COMMON_TYPE, router=False), ops="native"),
    "native, a tied head as split nibbles": Case("fox", PRESETS["int4"], {"vocab_size": 650}, ops="native"),
    **{f"portable {dtype}": Case("olmoe", PRESETS["none"], ops="portable", dtype=dtype) for dtype in STORAGE},
    "portable mixed": Case("olmoe", recipe("int4-g32-sym", *PORTABLE_MIX), ops="portable"),
    "portable, an odd number of zero points": Case(
        "fox",
        recipe("int4-g32-asym", router=False),
        {"hidden_size": 96, "head_dim": 32, "intermediate_size": 96},
        ops="portable",
    ),
    "cuda int4": Case("olmoe", PRESETS["int4"], target="cuda"),
    **{
        f"gpu {preset} {dtype}": Case("olmoe", chosen, target="tensorrt", dtype=dtype)
        for preset, chosen in PRESETS.items()
        for dtype in ("float16", "bfloat16")
    },
    "gpu mixed": Case(
        "fox", recipe("int4-g32-sym", *GPU_MIX, router=False), {"intermediate_size": 192}, target="tensorrt"
    ),
    "gpu, a last block of rows": Case("olmoe", recipe("int4-g32-asym"), {"vocab_size": 650}, target="tensorrt"),
}


def planned(folder: Path, path: Path, chosen: Recipe, options: ExportOptions) -> WeightSource:
    """Write the weights and the part of the manifest that a reader needs, as an export does."""
    checkpoint = Checkpoint.open(path)
    source = WeightSource(checkpoint, chosen, threads=1)
    tokenizer, target = Tokenizer.from_folder(path), TARGETS[options.target]
    plan = make_plan(source, tokenizer, options, target, Silent())
    entries = plan.graphs.weights.write(folder / WEIGHTS_FILE, source, 2, lambda amount: None)
    manifest = {"graph": {"weights_file": WEIGHTS_FILE}, "tensors": [entry.to_data() for entry in entries]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return source


def assert_exact(folder: Path, source: WeightSource, dtype: str, compute: str) -> None:
    """Check that the bundle has exactly the checkpoint's tensors, with the values that a device computes with."""
    found = read_weights(folder)
    assert set(found) - {"rope.cos", "rope.sin"} == set(source.shapes)
    for name in source.shapes:
        values = source.dequantized_float32(name)
        if source.scheme(name) is None:
            is_router = name.endswith(".mlp.gate.weight")
            stored = "float32" if is_router else compute if values.ndim == 1 else dtype
            rounded = stored_as(values, stored, name)
            values = as_float32(rounded) if stored == "bfloat16" else rounded.astype(np.float32)  # type: ignore[arg-type]
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert_rotary(found, source, compute)


def assert_rotary(found: dict[str, NDArray[Any]], source: WeightSource, compute: str) -> None:
    checkpoint = source.checkpoint
    config = checkpoint.decoder
    tables = rotary_tables(config.attention[0].rope, len(found["rope.cos"]))
    assert len(found["rope.cos"]) >= config.context_length
    for name, table in zip(("rope.cos", "rope.sin"), tables, strict=True):
        np.testing.assert_allclose(found[name], table, atol=0 if compute == "float32" else 2.0**-8)


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_enough_to_read_every_weight_exactly(checkpoint: MakeCheckpoint, tmp_path: Path, case: str) -> None:
    what = CASES[case]
    options = ExportOptions(target=what.target, ops=what.ops, dtype=what.dtype)
    source = planned(tmp_path, checkpoint(what.family, **what.changes), what.recipe, options)
    cuda = what.target == "cuda"
    dtype = what.dtype if what.dtype != "auto" else "float16" if cuda else "bfloat16"
    assert_exact(tmp_path, source, dtype, dtype if cuda else "float32")


@pytest.mark.parametrize("model", ["olmoe-tiny", "fox-tiny"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_trained_checkpoints_are_read_exactly(tmp_path: Path, model: str, mixed: bool) -> None:
    rules = TRAINED_MIX if model == "olmoe-tiny" else TRAINED_MIX[2:]
    chosen = recipe("int5-g64-asym", *rules, router=model == "olmoe-tiny") if mixed else PRESETS["int4"]
    source = planned(tmp_path, EXAMPLES / model, chosen, ExportOptions(ops="native"))
    assert_exact(tmp_path, source, "bfloat16", "float32")


@pytest.mark.parametrize("ops", ["native", "portable"])
def test_a_whole_bundle_is_read_by_its_manifest(checkpoint: MakeCheckpoint, tmp_path: Path, ops: str) -> None:
    path = checkpoint("olmoe")
    options = ExportOptions(golden=SHORT, threads=1, ops=ops)
    bundle = export_bundle(path, tmp_path / "bundle", recipe="int4", options=options)
    assert_exact(bundle.path, WeightSource(Checkpoint.open(path), PRESETS["int4"], threads=1), "bfloat16", "float32")
    manifest = bundle.manifest
    assert all(tensor.contents is not None for tensor in manifest.tensors)
    assert Manifest.from_json(manifest.to_json(), bundle.path) == manifest


def test_the_reader_needs_nothing_but_numpy() -> None:
    tree = ast.parse((Path(__file__).parent / "read_bundle.py").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    found = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert found == {"__future__", "json", "struct", "pathlib", "typing", "numpy"}


def test_the_page_names_every_layout_and_field() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in (*Layout, *(item.name for item in fields(Contents))) if f"`{name}`" not in page] == []


def test_the_manifest_says_what_the_headers_say(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Type, shape, group and zero points are in the packed headers too, and a reader needs only one of the two."""
    planned(tmp_path, checkpoint("olmoe"), recipe("int6-g64-asym", *MIXED), ExportOptions(ops="native"))
    entries = json.loads((tmp_path / "manifest.json").read_text())["tensors"]
    found = {entry["name"]: entry for entry in entries if entry["contents"]["layout"].startswith("packed")}
    assert len(found) == 2 + 3 * 2 + 2  # tables, qkv, o and router, experts
    with (tmp_path / WEIGHTS_FILE).open("rb") as stream:
        for name, entry in found.items():
            held = entry["contents"]
            matrices = [matrix for _, matrix in read_matrices(stream, entry["offset"], name)]
            if held["layout"] == "packed-experts":
                assert (held["dtype"], held["zero_points"], held["interleave"]) == ("mixed", True, 32)
                assert "group" not in held
                sizes = {(m.rows // 2, m.columns) if m.swiglu else (m.columns, m.rows) for m in matrices}
                assert [[len(matrices) // 2, *size] for size in sizes] == [held["shape"]]
                continue
            (matrix,) = matrices
            group = None if matrix.scales is Scales.NONE else min(matrix.group, matrix.columns)
            assert held["dtype"] == matrix.kind.label.removesuffix(" in split nibbles"), name
            assert (held["shape"], held.get("group")) == ([matrix.rows, matrix.columns], group), name
            assert held.get("zero_points", False) == matrix.zeros, name
