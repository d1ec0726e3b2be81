"""On a GPU: does ONNX Runtime's CUDA provider run our bundles entirely, in place, as CUDA graphs, and correctly?"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError
from edgelm.runtimes import open_runtime, open_tracing
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.onnxruntime.cuda import CAPTURE_VARIABLE, OnnxCudaRuntime
from edgelm.runtimes.onnxruntime.cuda_session import require_cuda

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
IDS = np.random.default_rng(3).integers(4, 500, 40).tolist()
CASES = list(itertools.product(("fox", "olmoe"), ("none", "int8", "int4"), ("fp16", "bf16")))


@pytest.fixture(scope="module")
def exported(gpu: DeviceInfo, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that exports a bundle of a tiny checkpoint; skips without onnxruntime-gpu."""
    try:
        require_cuda()
    except EdgeLMError as error:
        pytest.skip(f"{gpu.name} is here, but ONNX Runtime cannot use it: {error}")
    export = pytest.importorskip("edgelm.export", reason="exporting needs torch and onnx")
    root, made = tmp_path_factory.mktemp("cuda"), {}

    def get(model: str, recipe: str, dtype: str) -> Bundle:
        key = f"{model}-{recipe}-{dtype}"
        if key not in made:
            options = export.ExportOptions(target="cuda", dtype=dtype)
            made[key] = export.export_bundle(CHECKPOINTS / f"{model}-tiny", root / key, recipe=recipe, options=options)
        return made[key]

    return get


@pytest.mark.parametrize(("model", "recipe", "dtype"), CASES)
def test_bundles_pass_parity(exported, model: str, recipe: str, dtype: str) -> None:
    # Loading checks where every node runs and how experts are weighted.
    report = edgelm.check_parity(exported(model, recipe, dtype).path)
    failed = [f"{check.name}: {check.value} (limit {check.limit})" for check in report.checks if check.passed is False]
    assert report.passed, failed
    assert report.runtime == "onnxruntime-cuda"


@pytest.mark.parametrize(("model", "recipe"), [("fox", "int4"), ("olmoe", "int4"), ("olmoe", "none")])
def test_captured_steps_compute_the_same_as_launched_ones(
    exported, model: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported(model, recipe, "fp16")

    def steps() -> np.ndarray:
        with open_runtime(bundle, context_length=64) as runtime:
            runtime.prefill(IDS[:9])
            return np.stack([runtime.decode(token).copy() for token in IDS[9:30]])

    captured = steps()
    monkeypatch.setenv(CAPTURE_VARIABLE, "0")
    launched = steps()
    assert np.abs(captured - launched).max() <= 2e-2 * np.abs(launched).max()


@pytest.mark.parametrize(("model", "recipe"), [("fox", "int4"), ("olmoe", "int8")])
def test_the_argmax_on_the_gpu_is_that_of_the_logits(exported, model: str, recipe: str) -> None:
    with open_runtime(exported(model, recipe, "fp16"), context_length=64) as runtime:
        assert isinstance(runtime, OnnxCudaRuntime)
        token = int(runtime.prefill(IDS[:5]).argmax())
        chosen = []
        for _ in range(20):
            chosen.append(token)
            token = runtime.decode_greedy(token)
        runtime.truncate(5)
        for step, (fed, following) in enumerate(zip(chosen, [*chosen[1:], token], strict=True)):
            logits = runtime.decode(fed)
            # Of equal logits it may be another than the first.
            assert logits[following] == logits.max(), f"step {step}"


def test_the_cache_can_be_truncated_and_chunks_do_not_matter(exported) -> None:
    with open_runtime(exported("fox", "int8", "fp16"), context_length=64, chunk=7) as runtime:
        runtime.prefill(IDS)
        whole = runtime.decode(11).copy()
        runtime.truncate(20)
        runtime.prefill(IDS[20:])
        assert np.abs(runtime.decode(11) - whole).max() <= 2e-2 * np.abs(whole).max()
        runtime.reset()
        blocks = np.concatenate(list(runtime.logits_all(IDS)))
        assert blocks.shape == (len(IDS), runtime.vocab_size)


def test_the_debug_graph_returns_every_layer(exported) -> None:
    bundle = exported("olmoe", "int4", "bf16")
    tracing = open_tracing(bundle, "onnxruntime-cuda")
    assert tracing is not None
    with tracing:
        first, second = tracing.trace_all([IDS[:12], IDS[:5]])
    layers = bundle.manifest.model.num_layers
    assert [len(first.hidden), len(first.router_logits), len(second.hidden)] == [layers + 1, layers, layers + 1]
    assert all(np.isfinite(value).all() for value in first.hidden + second.hidden)
