"""Are features that ONNX Runtime's operators lack refused before the first byte, and supported ones computed correctly?

Does a bundle state the oldest usable ONNX Runtime? The versions here were measured with the wheels of 1.17 to 1.32
(docs/reference/bundle.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import FOX, OLMOE, OPERATOR_SETS

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.graph.onnx_builder import DEFAULTS
from edgelm.parity.golden import GoldenOptions
from edgelm.quant import PRESETS, Recipe, Rule, Scheme
from edgelm.quant.source import WeightSource
from edgelm.reference.module import ReferenceModel
from edgelm.runtimes import open_runtime
from edgelm.synth import write_random_checkpoint

ROUTER = Rule("*.mlp.gate.weight", None)
IDS = np.random.default_rng(3).integers(0, 640, 9)
GOLDEN = GoldenOptions(greedy_tokens=0, max_prompt_tokens=4)


def exported(
    folder: Path, config: dict[str, Any], chosen: Recipe, ops: str = "portable", target: str = "cpu"
) -> Bundle:
    """Export the checkpoint folder / "c" to the bundle folder / "b"."""
    write_random_checkpoint({**config, "num_hidden_layers": 1}, folder / "c", seed=1)
    return export_bundle(
        folder / "c", folder / "b", recipe=chosen, options=ExportOptions(target=target, ops=ops, golden=GOLDEN)
    )


def error(bundle: Bundle, folder: Path, chosen: Recipe) -> float:
    """Return the relative error of logits (a prompt in two chunks, one more token) against the PyTorch model."""
    checkpoint = Checkpoint.open(folder / "c")
    model = ReferenceModel(checkpoint.decoder)
    model.load_weights(WeightSource(checkpoint, chosen, threads=1).dequantized().read_float32)
    with torch.inference_mode():
        want = model(torch.from_numpy(IDS)[None]).numpy()[0]
    with open_runtime(bundle, threads=1, chunk=5) as runtime:
        found = [runtime.prefill(IDS[:8].tolist()).copy(), runtime.decode(int(IDS[8])).copy()]
    return float(np.linalg.norm(np.stack(found) - want[7:]) / np.linalg.norm(want[7:]))


def heads_of(size: int) -> dict[str, Any]:
    return {**FOX, "hidden_size": 64, "intermediate_size": 64, "head_dim": size}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [2, 8, 24, 40, 72])
def test_a_head_size_that_attention_does_not_support_is_refused_first(tmp_path: Path, size: int, target: str) -> None:
    with pytest.raises(ExportError, match=rf"config\.json has heads of {size} \(head_dim, .* multiples of 16.*native"):
        exported(
            tmp_path, heads_of(size), PRESETS["none"], target=target, ops="auto" if target == "cuda" else "portable"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("ops", "size"),
    [(ops, size) for ops in OPERATOR_SETS for size in (2, 24, 16, 48) if ops == "native" or size % 16 == 0],
)
def test_other_head_sizes_compute_the_reference(tmp_path: Path, size: int, ops: str) -> None:
    bundle = exported(tmp_path, heads_of(size), PRESETS["none"], ops)
    assert error(bundle, tmp_path, PRESETS["none"]) < 2e-5


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "hidden", "width"),
    [
        (4, False, 16, 80, 48),
        (8, True, 16, 80, 48),
        (4, True, 256, 256, 256),
        (8, False, 256, 256, 256),
        (4, False, 512, 512, 512),
        (8, True, 512, 512, 512),
    ],
)
def test_groups_of_every_size_compute_the_reference(
    tmp_path: Path, bits: int, symmetric: bool, group: int, hidden: int, width: int
) -> None:
    # MatMulNBits has no groups of 512, so each is stored as two of 256.
    chosen = Recipe("g", Scheme(bits, group, symmetric), activations="float")
    config = {**FOX, "vocab_size": 640, "hidden_size": hidden, "intermediate_size": width, "head_dim": 16}
    assert error(exported(tmp_path, config, chosen), tmp_path, chosen) < 2e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("hidden", "width"), [(64, 128), (128, 64), (64, 64), (192, 128)])
def test_experts_with_few_groups_compute_the_reference(
    tmp_path: Path, symmetric: bool, hidden: int, width: int
) -> None:
    # Rows of experts with one group of 64, which older versions refuse or read with wrong zero points.
    chosen = Recipe("g", Scheme(4, 64, symmetric), (ROUTER,), activations="float")
    config = {**OLMOE, "hidden_size": hidden, "intermediate_size": width, "head_dim": None, "num_experts": 4}
    config |= {"num_attention_heads": 4, "num_experts_per_tok": 2}
    bundle = exported(tmp_path, {k: v for k, v in config.items() if v is not None}, chosen)
    assert error(bundle, tmp_path, chosen) < 2e-5
    least = bundle.manifest.requires[0].version
    assert least == ("1.31.0" if 64 in (hidden, width) else "1.27.0" if hidden == 192 and not symmetric else "1.25.0")


def test_all_reasons_are_reported_at_once(tmp_path: Path) -> None:
    chosen = Recipe(
        "wrong", Scheme(8, 32), (ROUTER, Rule("*.q_proj.weight", Scheme(5, 32))), activations="float", kv="int8"
    )
    with pytest.raises(ExportError) as caught:
        exported(tmp_path, OLMOE, chosen)
    assert not (tmp_path / "b").exists()
    reasons = str(caught.value).split("; ")
    for reason, start in zip(
        sorted(reasons),
        (
            "model.layers.0.mlp.experts.0.gate_proj.weight has float activations",
            "model.layers.0.self_attn.q_proj.weight is int5-g32-sym",
            'recipe wrong has kv = "int8"',
        ),
        strict=True,
    ):
        assert reason.startswith(start)


FLOAT_EXPERTS = Rule("*.experts.*", Scheme(4, 32), activations="float")


@pytest.mark.parametrize(
    ("config", "chosen", "least"),
    [
        (FOX, PRESETS["none"], "1.20.0"),
        (FOX, Recipe("4", Scheme(4, 32)), "1.22.0"),
        (FOX, Recipe("4", Scheme(4, 32, False)), "1.23.0"),
        (FOX, Recipe("4", Scheme(4, 128, False)), "1.27.0"),
        (FOX, PRESETS["int4"], "1.23.0"),
        (FOX, PRESETS["int8"], "1.23.0"),
        (OLMOE, PRESETS["none"], "1.23.2"),
        (OLMOE, PRESETS["int8"], "1.25.0"),
        (OLMOE, PRESETS["int4"], "1.31.0"),
        (OLMOE, Recipe("4", Scheme(4, 32), (FLOAT_EXPERTS, *PRESETS["int4"].rules)), "1.25.0"),
    ],
)
def test_a_bundle_states_the_oldest_usable_onnxruntime(
    tmp_path: Path, config: dict[str, Any], chosen: Recipe, least: str
) -> None:
    bundle = exported(tmp_path, config, chosen)
    needs = bundle.manifest.requires
    assert {need.package for need in needs} == {"onnxruntime"}
    assert [need.numbers for need in needs] == sorted((need.numbers for need in needs), reverse=True)
    assert needs[0].version == least
    for name in ("model.onnx", "model.debug.onnx"):
        nodes = onnx.load(bundle.file(name), load_external_data=False).graph.node
        assert any(node.op_type in DEFAULTS for node in nodes)
        for node in nodes:
            written = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            for attribute, default in DEFAULTS.get(node.op_type, {}).items():
                assert written.get(attribute) != default, f"{node.name}: {attribute} is at its default"


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
def test_native_bundles_need_what_edgelm_needs(tmp_path: Path) -> None:
    bundle = exported(tmp_path, FOX, PRESETS["int4"], "native")
    assert bundle.manifest.requires == ()
    assert "requires" not in bundle.file("manifest.json").read_text(encoding="utf-8")
