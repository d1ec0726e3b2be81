"""Does the runtime for CUDA keep cache, token and length correctly, and choose tokens on the device?

ONNX Runtime's CPU provider replaces the CUDA one here. It runs the same graphs with the same fixed buffers, but
captures no CUDA graph. Tests that need a GPU are in tests/gpu.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_models import MakeCheckpoint

from edgelm.bundle import Bundle
from edgelm.bundle.ort_providers import CUDA
from edgelm.errors import BundleError, ContextLengthError, EdgeLMError, RuntimeUnavailableError
from edgelm.export import export_bundle
from edgelm.export.onnxruntime import target as targets
from edgelm.export.options import ExportOptions
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.runtimes.onnxruntime import cuda
from edgelm.runtimes.onnxruntime.cuda import OnnxCudaRuntime, OnnxCudaTracing
from edgelm.runtimes.onnxruntime.portable import PortableRuntime, PortableTracing
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE
from edgelm.runtimes.onnxruntime.session import create_session

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
IDS = np.random.default_rng(5).integers(4, 600, 24).tolist()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoint: MakeCheckpoint) -> dict[str, Bundle]:
    """Return a bundle per family; the MoE has its routing weights as an input, which the CPU provider needs."""
    root = tmp_path_factory.mktemp("cuda")
    options = ExportOptions(target="cuda", dtype="fp16", golden=SHORT)
    made = {"fox": export_bundle(checkpoint("fox"), root / "fox", recipe="int4", options=options)}
    made["plain"] = export_bundle(checkpoint("olmoe"), root / "plain", recipe="int4", options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.CudaTarget, "provider", dataclasses.replace(CUDA, router_weights=True))
        made["olmoe"] = export_bundle(checkpoint("olmoe"), root / "olmoe", recipe="int4", options=options)
    return made


@pytest.fixture(autouse=True)
def cpu_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(bundle: Bundle, file: str, threads: int, *, capture: bool = False) -> Any:
        return create_session(bundle, file, threads)

    monkeypatch.setattr(cuda, "cuda_session", session)
    monkeypatch.setattr(cuda, "device_of", lambda session: ("cpu", 0))
    monkeypatch.setattr(cuda, "PROVIDER", "CPUExecutionProvider")


@pytest.fixture(params=["fox", "olmoe"])
def bundle(bundles: dict[str, Bundle], request: pytest.FixtureRequest) -> Bundle:
    return bundles[request.param]


@pytest.fixture
def runtime(bundle: Bundle) -> Iterator[OnnxCudaRuntime]:
    with OnnxCudaRuntime(bundle, threads=1, context_length=64) as opened:
        yield opened


def test_prompts_and_steps_give_what_the_portable_runtime_gives(bundle: Bundle, runtime: OnnxCudaRuntime) -> None:
    with PortableRuntime(bundle, threads=1, context_length=64) as portable:
        np.testing.assert_array_equal(runtime.prefill(IDS[:20]), portable.prefill(IDS[:20]))
        for token in IDS[20:]:
            np.testing.assert_array_equal(runtime.decode(token), portable.decode(token))
        assert runtime.position == portable.position == len(IDS)
        runtime.reset()
        portable.reset()
        found, expected = (np.concatenate(list(model.logits_all(IDS))) for model in (runtime, portable))
        np.testing.assert_array_equal(found, expected)


def test_tokens_chosen_on_the_device_have_the_highest_logits(runtime: OnnxCudaRuntime) -> None:
    token = first = int(runtime.prefill(IDS[:5]).argmax())
    chosen = [token := runtime.decode_greedy(token) for _ in range(12)]
    runtime.truncate(5)
    fed = first
    for found in chosen:
        assert found == int(runtime.decode(fed).argmax())
        fed = found


def test_another_token_than_the_chosen_one_can_follow(runtime: OnnxCudaRuntime) -> None:
    token = int(runtime.prefill(IDS[:5]).argmax())
    following = runtime.decode_greedy(token)
    other = (following + 1) % runtime.vocab_size
    found = runtime.decode(other).copy()
    runtime.reset()
    runtime.prefill([*IDS[:5], token])
    np.testing.assert_allclose(runtime.decode(other), found, atol=2e-2 * np.abs(found).max())


def test_the_cache_can_be_rewound_and_chunks_do_not_matter(bundle: Bundle) -> None:
    with OnnxCudaRuntime(bundle, threads=1, context_length=64, chunk=7) as runtime:
        runtime.prefill(IDS)
        whole = runtime.decode(11).copy()
        runtime.truncate(20)
        runtime.prefill(IDS[20:])
        assert np.abs(runtime.decode(11) - whole).max() <= 2e-2 * np.abs(whole).max()
        model = bundle.manifest.model
        rows = 2 * model.num_layers * model.num_kv_heads
        assert runtime.cache_bytes == rows * 64 * model.head_dim * 2  # float16 keys and values


def test_a_full_context_is_refused_and_stays_as_it_was(runtime: OnnxCudaRuntime) -> None:
    runtime.prefill(IDS * 2 + IDS[:16])
    with pytest.raises(ContextLengthError, match="64 are taken, so 0 fit"):
        runtime.decode(5)
    assert runtime.position == 64
    runtime.truncate(63)
    assert np.isfinite(runtime.decode(5)).all()


def test_the_debug_graph_gives_every_layer_as_the_portable_runtime_does(bundle: Bundle) -> None:
    with OnnxCudaTracing(bundle, threads=1) as tracing, PortableTracing(bundle, threads=1) as portable:
        found, expected = tracing.trace(IDS), portable.trace(IDS)
    assert len(found.hidden) == bundle.manifest.model.num_layers + 1
    for mine, theirs in zip(found.hidden + found.router_logits, expected.hidden + expected.router_logits, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_provider_that_renormalises_the_router_is_refused_at_load(bundles: dict[str, Bundle]) -> None:
    # Without the routing weights as an input, the CPU provider renormalises.
    with pytest.raises(RuntimeUnavailableError, match=r"CPUExecutionProvider does not .*: it ignores whether"):
        OnnxCudaRuntime(bundles["plain"], threads=1)


def changed(bundle: Bundle, **graph: Any) -> Bundle:
    manifest = bundle.manifest
    return Bundle(bundle.path, dataclasses.replace(manifest, graph=dataclasses.replace(manifest.graph, **graph)))


def test_a_cache_type_or_file_that_the_bundle_lacks_is_named(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(EdgeLMError, match=r"kv is 'int8', but the cache of .* is float16"):
        OnnxCudaRuntime(bundles["fox"], threads=1, kv="int8")
    with pytest.raises(BundleError, match="has a int8 cache, and bundles for CUDA support float16, bfloat16"):
        OnnxCudaRuntime(changed(bundles["fox"], kv_dtype="int8"), threads=1)
    manifest = bundles["olmoe"].manifest
    files = {name: file for name, file in manifest.files.items() if name != PROBE_FILE}
    with pytest.raises(BundleError, match=f"lacks {PROBE_FILE}"):
        OnnxCudaRuntime(Bundle(bundles["olmoe"].path, dataclasses.replace(manifest, files=files)), threads=1)


def test_an_error_of_onnx_runtime_says_what_was_done_and_how_to_go_without_capture(
    bundles: dict[str, Bundle],
) -> None:
    with OnnxCudaRuntime(bundles["fox"], threads=1, context_length=64) as runtime:
        runtime._step.bind_ortvalue_input("input_ids", runtime._last)  # of another shape than the graph's
        with pytest.raises(EdgeLMError, match=r"failed when decoding: .*try EDGELM_CUDA_GRAPHS=0"):
            runtime.decode(5)
