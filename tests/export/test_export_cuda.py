"""Do bundles meet the requirements of ONNX Runtime's CUDA provider, and do their graphs compute the reference?

Most machines do not have that provider, so the same graphs run on the CPU provider, which has the operators too: in
float32 with routing weights as an input, which the CPU needs, and in float16 unchanged. Tests that need a GPU are in
tests/gpu.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from tiny_models import MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.bundle.ort_providers import CUDA
from edgelm.checkpoint import Checkpoint
from edgelm.errors import EdgeLMError, ExportError, RuntimeUnavailableError
from edgelm.export import export_bundle
from edgelm.export.onnxruntime import target as targets
from edgelm.export.onnxruntime.greedy_graph import greedy_graph
from edgelm.export.options import ExportOptions
from edgelm.installing import install_hint
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.reference.module import ReferenceModel
from edgelm.runtimes import open_runtime
from edgelm.runtimes.onnxruntime.cuda import GREEDY_FILE
from edgelm.runtimes.onnxruntime.portable import PortableRuntime, PortableTracing
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE, check_router

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
ROUTER = '[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'
IDS = np.random.default_rng(5).integers(4, 600, 24)


def recipe(scheme: str, name: str, extra: str = "") -> Recipe:
    return Recipe.from_toml(f'name = "t"\ndefault = "{scheme}"\n{extra}' + (ROUTER if name == "olmoe" else ""), "test")


def export(path: Path, out: Path, chosen: str | Recipe = "none", dtype: str = "auto") -> Bundle:
    return export_bundle(path, out, recipe=chosen, options=ExportOptions(target="cuda", dtype=dtype, golden=SHORT))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the target build its graph with the requirements of the CPU provider."""

    def change(**fields: Any) -> None:
        wanted = dataclasses.replace(CUDA, router_weights=True, **fields)
        monkeypatch.setattr(targets.CudaTarget, "provider", wanted)

    return change


def reference(path: Path, chosen: Recipe) -> tuple[Any, np.ndarray[Any, Any]]:
    checkpoint = Checkpoint.open(path)
    model = ReferenceModel(checkpoint.decoder)
    model.load_weights(WeightSource(checkpoint, chosen, threads=1).dequantized().read_float32)
    with torch.no_grad():
        return model, model(torch.from_numpy(IDS[None])).numpy()[0]


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


SCHEMES = ["none", "int4-g32-sym", "int4-g32-asym", "int8-g64-asym", "int8-row-sym"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "changes"), [("olmoe", {}), ("olmoe", {"norm_topk_prob": True, "clip_qkv": 0.4}), ("fox", {})]
)
def test_the_graph_computes_the_reference_in_float32(
    tmp_path: Path, checkpoint: MakeCheckpoint, on_cpu: Any, name: str, changes: dict[str, Any], scheme: str
) -> None:
    on_cpu(computes_in=("float32",))
    chosen = Recipe.load("none") if scheme == "none" else recipe(scheme, name)
    bundle = export(checkpoint(name, **changes), tmp_path / "b", chosen, "fp32")
    _, logits = reference(checkpoint(name, **changes), chosen)
    found = np.concatenate(list(PortableRuntime(bundle, threads=1).logits_all(IDS.tolist())))
    if name == "fox" or "int8" not in scheme:
        assert relative(found, logits) < 2e-5
        return
    # The CPU provider always rounds the inputs of 8-bit experts to int8. A step is 1/127 of a row's largest value,
    # which is 2.6 times the root mean square of 64 or 128 values; over sqrt(12) that is 0.6 % per matmul, and an
    # expert has two. If it changes a near-tie of the router, a whole position moves, so the median is tested.
    error = np.linalg.norm(found - logits, axis=1) / np.linalg.norm(logits, axis=1)
    # Measured: 0.0032, and 0.011 with renormalised weights of experts, which are three times as large here.
    assert np.median(error) < (0.015 if changes else 0.005)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_float16_graphs_compute_the_reference_up_to_their_rounding(
    tmp_path: Path, checkpoint: MakeCheckpoint, on_cpu: Any, name: str, scheme: str
) -> None:
    on_cpu()
    chosen = Recipe.load("none") if scheme == "none" else recipe(scheme, name)
    bundle = export(checkpoint(name), tmp_path / "b", chosen, "fp16")
    _, logits = reference(checkpoint(name), chosen)
    with PortableRuntime(bundle, threads=1) as model:
        found = np.concatenate(list(model.logits_all(IDS.tolist())))
        model.reset()
        model.prefill(IDS[:20].tolist())
        steps = np.stack([model.decode(int(token)).copy() for token in IDS[20:]])
    # The choice of experts can change at a near-tie, so the median position is tested.
    error = np.linalg.norm(found - logits, axis=1) / np.linalg.norm(logits, axis=1)
    assert np.median(error) < 4e-3
    assert relative(steps[np.argsort(error[20:])[:2]], logits[20:][np.argsort(error[20:])[:2]]) < 1e-2
    with PortableTracing(bundle, threads=1) as tracing:
        trace = tracing.trace(IDS.tolist())
    assert [value.dtype for value in trace.hidden + trace.router_logits] == [np.float32] * (3 + 2 * (name == "olmoe"))
    assert trace.logits is not None
    assert np.median(np.linalg.norm(trace.logits - logits, axis=1) / np.linalg.norm(logits, axis=1)) < 4e-3


def test_a_mask_as_long_as_the_cache_whose_first_element_is_the_length_gives_the_same(
    tmp_path: Path, checkpoint: MakeCheckpoint
) -> None:
    # The graph that a GPU captures and replays; the dense one runs here unchanged.
    bundle = export(checkpoint("fox"), tmp_path / "b", "int4")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(bundle.file("model.onnx")), options, providers=["CPUExecutionProvider"])
    capacity = 64

    def run(masks: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        binding = session.io_binding()
        for item in session.get_inputs():
            if item.name.startswith("past"):
                cache = ort.OrtValue.ortvalue_from_numpy(
                    np.zeros((1, item.shape[1], capacity, item.shape[3]), np.float16)
                )
                binding.bind_ortvalue_input(item.name, cache)
                binding.bind_ortvalue_output(item.name.replace("past_key_values", "present"), cache)
        found = []
        for token, mask in zip(IDS, masks, strict=False):
            binding.bind_cpu_input("input_ids", np.array([[token]]))
            binding.bind_cpu_input("attention_mask", mask)
            binding.bind_output("logits", "cpu")
            session.run_with_iobinding(binding)
            found.append(binding.get_outputs()[-1].numpy().copy())
        return found

    fixed = np.zeros((12, 1, capacity), np.int64)
    fixed[:, 0, 0] = np.arange(1, 13)
    exact = run([np.ones((1, length), np.int64) for length in range(1, 13)])
    for step, (found, expected) in enumerate(zip(run(list(fixed)), exact, strict=True)):
        np.testing.assert_array_equal(found, expected, err_msg=f"step {step}")


@pytest.mark.parametrize("vocab", [640, 997, 50304, 256000])
def test_the_greedy_graph_finds_the_first_of_the_highest_logits_and_advances(vocab: int) -> None:
    session = ort.InferenceSession(greedy_graph(vocab).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(vocab)
    for case in range(5):
        logits = random.standard_normal((1, 1, vocab)).astype(np.float32)
        if case >= 3:  # equals, near and far from each other, and at both ends
            logits[0, 0, random.integers(0, vocab, 3)] = 9.0
            logits[0, 0, [0, vocab - 1][case % 2]] = 9.0
        ids, length, answer = session.run(
            ["next_ids", "next_length", "answer"], {"logits": logits, "length": np.array([[41]])}
        )
        best = int(logits.argmax())
        assert (ids.tolist(), length.tolist()) == ([[best]], [[42]])
        assert answer.tolist() == [[best, logits[0, 0, best]]]


@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("chosen", ["none", "int4", "int8"])
def test_the_probe_finds_a_provider_that_routes_differently(
    tmp_path: Path, checkpoint: MakeCheckpoint, on_cpu: Any, chosen: str, renormalises: bool
) -> None:
    path = checkpoint("olmoe", norm_topk_prob=renormalises)
    plain = export(path, tmp_path / "plain", chosen, "fp16").file(PROBE_FILE)
    on_cpu()
    fed = export(path, tmp_path / "fed", chosen, "fp16").file(PROBE_FILE)

    def ask(model: bytes) -> None:
        check_router(ort.InferenceSession(model, providers=["CPUExecutionProvider"]), "this provider")

    ask(fed.read_bytes())
    if chosen == "none" or renormalises:
        ask(plain.read_bytes())
    else:  # without the weights, the CPU's QMoE always renormalises
        with pytest.raises(RuntimeUnavailableError, match=r"this provider does not .*: it ignores whether the weights"):
            ask(plain.read_bytes())
    damaged = onnx.load(fed)
    moe = next(item for item in damaged.graph.node if item.op_type.endswith("MoE"))
    next(item for item in moe.attribute if item.name == "k").i -= 1
    with pytest.raises(RuntimeUnavailableError, match=r"a known MoE is \d+% off"):
        ask(damaged.SerializeToString())
    if chosen == "none":  # the only MoE operator that obeys the attribute on a CPU
        other = onnx.load(fed)
        moe = next(item for item in other.graph.node if item.op_type == "MoE")
        next(item for item in moe.attribute if item.name == "normalize_routing_weights").i ^= 1
        with pytest.raises(RuntimeUnavailableError, match="it ignores whether"):
            ask(other.SerializeToString())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["olmoe", "fox"])
@pytest.mark.parametrize("chosen", ["none", "int4", "int8"])
def test_values_have_the_16_bit_type_and_the_router_float32(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, chosen: str, dtype: str
) -> None:
    bundle = export(checkpoint(name), tmp_path / "b", chosen, dtype)
    element = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    long = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert (bundle.manifest.target, bundle.manifest.ops, bundle.manifest.dtype) == ("cuda", "portable", long)
    assert bundle.manifest.graph.kv_dtype == long
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    weights = {item.name: item for item in model.graph.initializer if item.external_data}
    wide = {name for name, item in weights.items() if item.data_type == TensorProto.FLOAT}
    assert wide == {f"model.layers.{i}.mlp.gate.weight" for i in range(2) if name == "olmoe"}
    assert {item.data_type for item in weights.values()} <= {element, TensorProto.UINT8, TensorProto.FLOAT}
    caches = [item for item in [*model.graph.input, *model.graph.output] if "key_values" in item.name]
    assert {item.type.tensor_type.elem_type for item in caches} == {element}
    logits = next(item for item in model.graph.output if item.name == "logits")
    assert logits.type.tensor_type.elem_type == TensorProto.FLOAT
    files = {GREEDY_FILE, *([PROBE_FILE] if name == "olmoe" else [])}
    assert {path.name for path in bundle.path.glob("*.onnx")} == {"model.onnx", "model.debug.onnx", *files}
    assert files <= set(bundle.manifest.files)
    provider = json.loads(bundle.file("genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert provider["provider_options"] == [{"cuda": {"use_tf32": "0", "enable_cuda_graph": "0"}}]
    for file in ("model.onnx", "model.debug.onnx", *files):
        check_types(bundle.file(file))


def check_types(path: Path) -> None:
    """Let ONNX Runtime infer all types and shapes. It does so before it looks for kernels, which may be missing."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        assert "NOT_IMPLEMENTED" in str(error), error
        assert "Could not find an implementation" in str(error)


def test_scales_and_codes_are_those_of_a_cpu_bundle(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    path, chosen = checkpoint("olmoe"), recipe("int4-g32-asym", "olmoe")
    cuda = export(path, tmp_path / "cuda", chosen)
    cpu = export_bundle(path, tmp_path / "cpu", recipe=chosen, options=ExportOptions(ops="portable", golden=SHORT))
    assert cuda.manifest.dtype == "float16", "scales of integers are float16: no other type holds them"

    def tensors(bundle: Bundle) -> dict[str, bytes]:
        data = bundle.file("model.onnx.data").read_bytes()
        return {item.name: data[item.offset : item.offset + item.size] for item in bundle.manifest.tensors}

    ours, theirs = tensors(cuda), tensors(cpu)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.endswith(".scales"):
            np.testing.assert_array_equal(np.frombuffer(value, np.float16), np.frombuffer(theirs[name], np.float32))
        elif name.endswith(("weight.qweight", ".qweight", ".zeros")):
            assert value == theirs[name], name


REFUSED = [
    (
        "fox",
        "none",
        {"dtype": "fp32"},
        r"does not support grouped-query attention in float32: export with --dtype float16 or bfloat16",
    ),
    ("fox", "none", {"ops": "native"}, r"native operators run on CPUs only: .* --target tensorrt"),
    ("fox", "fp8", {}, r"is fp8-row in this recipe, but .* support only int4 and int8: export with --target tensorrt"),
    ("olmoe", "int4-g16-sym", {}, r"experts\.0\.gate_proj\.weight has groups of 16 weights, .* groups of 32, 64, 128"),
    ("fox", 'int4-g32-sym"\nkv = "int8', {}, r'kv = "int8", but portable operators support only float16 caches'),
]


@pytest.mark.parametrize(("name", "scheme", "options", "message"), REFUSED)
def test_what_the_provider_has_no_kernel_for_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoint: MakeCheckpoint, name: str, scheme: str, options: dict[str, str], message: str
) -> None:
    chosen: str | Recipe = scheme if scheme in ("none", "fp8") else recipe(scheme, name)
    with pytest.raises(ExportError, match=message):
        export_bundle(checkpoint(name), tmp_path / "b", recipe=chosen, options=ExportOptions(target="cuda", **options))
    assert not (tmp_path / "b").exists()


def test_experts_with_fewer_columns_than_the_kernels_tiles_are_refused(
    tmp_path: Path, checkpoint: MakeCheckpoint
) -> None:
    with pytest.raises(ExportError, match=r"down_proj\.weight has rows of 32 weights, .* needs multiples of 64"):
        export(checkpoint("olmoe", intermediate_size=32), tmp_path / "b", recipe("int4-g32-sym", "olmoe"))


def test_a_quantised_table_whose_zero_points_do_not_fill_bytes_is_refused(
    tmp_path: Path, checkpoint: MakeCheckpoint
) -> None:
    # A row of 128 weights in one group has half a byte of zero points.
    with pytest.raises(ExportError, match=r"embed_tokens\.weight has 1 groups per row with zero points of 4 bits"):
        export(checkpoint("fox"), tmp_path / "b", recipe("int4-g128-asym", "fox"))


def test_a_note_says_that_static_activations_are_not_used(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    source = WeightSource(Checkpoint.open(checkpoint("fox")), recipe("int8-g32-sym", "fox"), threads=1)
    assert targets.CudaTarget().notes(source) == []
    bundle = export(checkpoint("fox"), tmp_path / "b", recipe("int8-g32-sym", "fox", 'activations = "int8-token"\n'))
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    written = {attribute.name for node in model.graph.node for attribute in node.attribute}
    assert "accuracy_level" not in written, "nothing may be rounded to int8"


def test_without_cuda_a_bundle_says_what_to_install(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    bundle = export(checkpoint("fox"), tmp_path / "b")
    with pytest.raises(
        EdgeLMError, match=re.escape(f"built without CUDA: pip uninstall onnxruntime, then {install_hint('cuda')}")
    ):
        open_runtime(bundle)
    with pytest.raises(RuntimeUnavailableError, match="was exported for cuda, but onnxruntime-cpu runs cpu"):
        open_runtime(bundle, "onnxruntime-cpu")
