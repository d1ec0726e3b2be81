"""Do matmuls take the activation type that the recipe names, as far as the operators can?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import OPERATOR_SETS, MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.inspect import bundle_rows
from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.reference.module import ReferenceModel
from edgelm.runtimes import open_runtime

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
IDS = np.random.default_rng(3).integers(4, 600, 40).tolist()
ROUTER = '[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'

needs_native = pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")


def recipe(scheme: str, activations: str, rules: str = ROUTER) -> Recipe:
    return Recipe.from_toml(f'name = "test"\ndefault = "{scheme}"\nactivations = "{activations}"\n{rules}')


def rule(match: str, scheme: str, activations: str) -> str:
    return f'[[rule]]\nmatch = "{match}"\nscheme = "{scheme}"\nactivations = "{activations}"\n'


def exported(path: Path, out: Path, chosen: Recipe, ops: str) -> Bundle:
    return export_bundle(path, out, recipe=chosen, options=ExportOptions(golden=SHORT, ops=ops))


def attributes(bundle: Bundle, key: str) -> dict[str, object]:
    """Return an attribute of every node that has it, by the name of the node's result."""
    graph = onnx.load(bundle.file(bundle.manifest.graph.file), load_external_data=False).graph
    return {
        node.output[0]: onnx.helper.get_attribute_value(attribute)
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == key
    }


def error(bundle: Bundle, path: Path, chosen: Recipe) -> float:
    """Return the distance of the shipped graph from the PyTorch model of the same weights, relative to the logits."""
    checkpoint = Checkpoint.open(path)
    model = ReferenceModel(checkpoint.decoder)
    model.load_weights(WeightSource(checkpoint, chosen, threads=1).dequantized().read_float32)
    with torch.no_grad():
        expected: NDArray[np.float32] = model(torch.tensor([IDS]))[0].numpy()
    kv = "float32"
    with open_runtime(bundle, threads=1, kv=kv) as runtime:
        found = np.concatenate([block.copy() for block in runtime.logits_all(IDS)])
        runtime.reset()
        decoded = [runtime.decode(token).copy() for token in IDS]
    # Single tokens run other kernels.
    return float(max(np.linalg.norm(x - expected) for x in (found, np.stack(decoded))) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("ops", "name", "scheme"),
    [
        pytest.param("native", "olmoe", "int8-g32-sym", marks=needs_native),
        pytest.param("native", "olmoe", "int4-g32-asym", marks=needs_native),
        pytest.param("native", "fox", "int4-g64-sym", marks=needs_native),
        ("portable", "fox", "int8-g32-sym"),
        ("portable", "olmoe", "int4-g32-sym"),
    ],
)
def test_float_activations_lose_nothing(
    checkpoint: MakeCheckpoint, tmp_path: Path, ops: str, name: str, scheme: str
) -> None:
    path, rules = checkpoint(name), ROUTER if name == "olmoe" else ""
    for activations, least, most in (("float", 0.0, 1e-5), ("auto", 1e-3, 5e-2), ("int8-static", 1e-3, 5e-2)):
        chosen = recipe(scheme, activations, rules)
        found = error(exported(path, tmp_path / activations, chosen, ops), path, chosen)
        assert least <= found <= most, (activations, found)


@needs_native
def test_a_rule_has_activations_of_its_own(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    rules = rule("*.down_proj.weight", "int8-g32-sym", "float") + rule("*.k_proj.weight", "int8-row-sym", "fp8-token")
    bundle = exported(checkpoint("fox"), tmp_path / "b", recipe("int4-g32-sym", "int8-token", rules), "native")
    found = attributes(bundle, "activations")
    float32 = {name for name, kind in found.items() if kind == b"float32"}
    # q, k and v are one matmul, so float activations of one apply to all. The result of down is named hidden.
    assert float32 == {"hidden.1", "hidden.2", "layers.0.attn.qkv", "layers.1.attn.qkv"}
    rows = dict(bundle_rows(bundle, None))
    assert rows["activations"] == (
        "int8 in blocks of 32, finer than int8-token; *.down_proj.weight: float32; "
        "*.k_proj.weight: float32, in place of fp8-token"
    )


@needs_native
def test_a_head_with_float_activations_is_not_rescored(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    for activations, rescored in (("auto", True), ("float", False)):
        chosen = recipe("int4-g32-sym", "auto", rule("lm_head.weight", "int8-row-sym", activations) + ROUTER)
        bundle = exported(checkpoint("olmoe"), tmp_path / activations, chosen, "native")
        assert any(entry.name == "lm_head.weight.lower" for entry in bundle.manifest.tensors) == rescored
        assert (attributes(bundle, "refine")["logits"] > 0) == rescored  # type: ignore[operator]  # an int


@pytest.mark.parametrize("ops", OPERATOR_SETS)
def test_experts_of_a_layer_must_have_the_same_activations(
    checkpoint: MakeCheckpoint, tmp_path: Path, ops: str
) -> None:
    rules = rule("*.layers.1.mlp.experts.3.*", "int4-g32-sym", "float") + ROUTER
    with pytest.raises(
        ExportError,
        match=r"int8 activations for model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight and float32 for "
        r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight: the experts of layer 1",
    ):
        exported(checkpoint("olmoe"), tmp_path / "b", recipe("int4-g32-sym", "auto", rules), ops)
    assert not (tmp_path / "b").exists()
    # Different layers may have different activations.
    rules = rule("*.layers.1.mlp.experts.*", "int4-g32-sym", "float") + ROUTER
    bundle = exported(checkpoint("olmoe"), tmp_path / "b", recipe("int4-g32-sym", "auto", rules), ops)
    if ops == "native":
        assert b"float32" in attributes(bundle, "activations").values()
    else:  # float32 is the attribute's default, which is not written
        levels = attributes(bundle, "accuracy_level")
        assert levels["layers.0.moe"] == 4
        assert "layers.1.moe" not in levels


def test_portable_8_bit_experts_cannot_have_float_activations(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"experts\.0\.gate_proj\.weight has float .* ONNX Runtime's MoE operator .* --ops native"
    ):
        exported(checkpoint("olmoe"), tmp_path / "b", recipe("int8-g32-sym", "float"), "portable")
