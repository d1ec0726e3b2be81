"""Does the CPU runtime compute the same as one plain pass of the graph, and refuse invalid use?"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from tiny_graph import Shape, write_manifest, write_tiny_bundle

from edgelm.bundle import Bundle
from edgelm.errors import BundleError, ContextLengthError, EdgeLMError, GenerationError, RuntimeUnavailableError
from edgelm.runtimes import Runtime, open_runtime, runtimes
from edgelm.runtimes.base import interruptible
from edgelm.runtimes.onnxruntime import portable
from edgelm.runtimes.onnxruntime.portable import PortableRuntime, PortableTracing
from edgelm.runtimes.onnxruntime.session import import_onnxruntime

SHAPE = Shape()
IDS = np.random.default_rng(1).integers(0, SHAPE.vocab, 40).tolist()
# Kernels for one row and for several rows sum in different orders.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> NDArray[np.float32]:
    """Logits at every position from one pass of the graph, without KV cache, IO binding and chunks."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(bundle.file("model.onnx"), options, providers=["CPUExecutionProvider"])
    feed = {
        "input_ids": np.array([IDS]),
        "attention_mask": np.ones((1, len(IDS)), np.int64),
        "logits_start": np.array([0]),
    }
    for i in range(SHAPE.layers):
        for part in ("key", "value"):
            feed[f"past_key_values.{i}.{part}"] = np.zeros((1, SHAPE.kv_heads, 0, SHAPE.head_dim), np.float32)
    return np.asarray(session.run(["logits"], feed)[0])[0]


def opened(bundle: Bundle, **options: int) -> PortableRuntime:
    runtime = open_runtime(bundle, threads=1, **options)
    assert isinstance(runtime, PortableRuntime)
    return runtime


@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 64])
def test_prefill_in_chunks_equals_one_pass(bundle: Bundle, expected: NDArray[np.float32], chunk: int) -> None:
    with opened(bundle, chunk=chunk) as runtime:
        np.testing.assert_allclose(runtime.prefill(IDS), expected[-1], atol=TOLERANCE)
        assert runtime.position == len(IDS)


@pytest.mark.parametrize("split", [1, 8, 39])
def test_decode_after_prefill_equals_one_pass(bundle: Bundle, expected: NDArray[np.float32], split: int) -> None:
    with opened(bundle) as runtime:
        np.testing.assert_allclose(runtime.prefill(IDS[:split]), expected[split - 1], atol=TOLERANCE)
        for position in range(split, len(IDS)):
            np.testing.assert_allclose(runtime.decode(IDS[position]), expected[position], atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [5, 64])
def test_logits_all_returns_every_position_in_order(bundle: Bundle, expected: NDArray[np.float32], chunk: int) -> None:
    with opened(bundle, chunk=chunk) as runtime:
        runtime.prefill(IDS[:3])
        blocks = [block.copy() for block in runtime.logits_all(IDS[3:])]
        assert max(len(block) for block in blocks) <= chunk
        np.testing.assert_allclose(np.concatenate(blocks), expected[3:], atol=TOLERANCE)
        # Then one row: the buffer has grown, but the result must be that of the last position.
        runtime.truncate(9)
        np.testing.assert_allclose(runtime.decode(IDS[9]), expected[9], atol=TOLERANCE)


def test_the_base_class_returns_every_position(bundle: Bundle, expected: NDArray[np.float32]) -> None:
    with opened(bundle) as runtime:
        blocks = [block.copy() for block in Runtime.logits_all(runtime, IDS)]
        np.testing.assert_allclose(np.concatenate(blocks), expected, atol=TOLERANCE)


def test_truncate_keeps_the_first_positions(bundle: Bundle, expected: NDArray[np.float32]) -> None:
    with opened(bundle) as runtime:
        runtime.prefill(IDS[:10])
        runtime.prefill([5, 6, 7])
        runtime.truncate(10)
        assert runtime.position == 10
        np.testing.assert_allclose(runtime.prefill(IDS[10:]), expected[-1], atol=TOLERANCE)
        runtime.reset()
        np.testing.assert_allclose(runtime.prefill(IDS[:2]), expected[1], atol=TOLERANCE)
        for length in (-1, 3):
            with pytest.raises(GenerationError, match=f"cannot keep {length} cached tokens: give 0 to 2"):
                runtime.truncate(length)


def test_the_cache_is_written_in_place(bundle: Bundle) -> None:
    with opened(bundle, context_length=16) as runtime:
        addresses = [cache.ctypes.data for cache in runtime._caches]
        runtime.prefill(IDS[:5])
        before = [cache.copy() for cache in runtime._caches]
        assert all(cache[:, :, :5].all(axis=-1).any() and not cache[:, :, 5:].any() for cache in before)
        runtime.decode(IDS[5])
        assert [cache.ctypes.data for cache in runtime._caches] == addresses
        for old, new in zip(before, runtime._caches, strict=True):
            assert np.array_equal(old[:, :, :5], new[:, :, :5])
            assert new[:, :, 5].any()
            assert not new[:, :, 6:].any()


def test_exceeding_the_context_is_refused_before_the_cache_changes(bundle: Bundle) -> None:
    with opened(bundle, context_length=16) as runtime:
        runtime.prefill(IDS[:10])
        with pytest.raises(ContextLengthError, match=r"7 tokens do not fit: .* holds 16, 10 are taken, so 6 fit.*64"):
            runtime.prefill(IDS[:7])
        assert runtime.position == 10
        runtime.prefill(IDS[:6])
        with pytest.raises(ContextLengthError, match="so 0 fit"):
            runtime.decode(1)
        with pytest.raises(ContextLengthError, match="so 0 fit"):
            next(runtime.logits_all([1]))


@pytest.mark.parametrize("length", [0, -3, 65])
def test_an_unsupported_context_length_is_refused(bundle: Bundle, length: int) -> None:
    with pytest.raises(ContextLengthError, match=rf"context_length is {length}: give 1 to 64"):
        opened(bundle, context_length=length)


def test_the_default_context_is_the_models_up_to_4096(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle) as runtime:
        assert runtime.context_length == 64
    long = write_tiny_bundle(tmp_path / "long", Shape(layers=1, context=8192))
    with opened(long) as runtime:
        assert (runtime.context_length, runtime.model_context_length) == (4096, 8192)


@pytest.mark.parametrize("bad", [[97], [1, 2, -1], [1, 2**40]])
def test_token_ids_outside_the_vocabulary_are_named(bundle: Bundle, bad: list[int]) -> None:
    with opened(bundle) as runtime:
        with pytest.raises(GenerationError, match=rf"token id {bad[-1]} \(number {len(bad) - 1} of .* 0\.\.96"):
            runtime.prefill(bad)
        with pytest.raises(GenerationError, match="at least one token"):
            runtime.prefill([])
        assert runtime.position == 0


def test_a_closed_runtime_refuses_use(bundle: Bundle) -> None:
    runtime = opened(bundle)
    runtime.prefill([1, 2])
    runtime.close()
    runtime.close()
    for use in (lambda: runtime.prefill([1]), lambda: runtime.decode(1), runtime.reset):
        with pytest.raises(EdgeLMError, match="was closed"):
            use()


def test_unknown_names_and_options_list_the_valid_ones(bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match="no runtime 'npu'; there are: onnxruntime-cpu"):
        open_runtime(bundle, "npu")
    with pytest.raises(EdgeLMError, match="no option 'beams'; it has: threads, context_length, chunk, kv"):
        open_runtime(bundle, beams=4)
    for option in ("threads", "chunk"):
        with pytest.raises(EdgeLMError, match=f"{option} is 0"):
            open_runtime(bundle, **{option: 0})


def test_a_bundle_for_another_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_tiny_bundle(path, Shape(layers=1))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"target": "cpu"', '"target": "npu"'))
    with pytest.raises(RuntimeUnavailableError, match="exported for npu, which no runtime here runs"):
        open_runtime(Bundle.open(path))
    with pytest.raises(RuntimeUnavailableError, match="export with --target cpu"):
        open_runtime(Bundle.open(path), "onnxruntime-cpu")


def test_a_damaged_graph_says_how_to_check_it(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_tiny_bundle(path, Shape(layers=1))
    graph = path / "model.onnx"
    graph.write_bytes(graph.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"cannot load .*model\.onnx.*inspect --verify"):
        open_runtime(Bundle.open(path))


def test_a_graph_without_the_expected_inputs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_tiny_bundle(path, Shape(layers=1))
    model = onnx.load(path / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    model.graph.input[1].name = "mask"
    onnx.save(model, path / "model.onnx")
    with pytest.raises(BundleError, match="lacks attention_mask"):
        open_runtime(write_manifest(path, Shape(layers=1), ()))


def test_the_trace_holds_logits_and_hidden_states(bundle: Bundle, expected: NDArray[np.float32]) -> None:
    with PortableTracing(bundle, threads=1) as runtime:
        got = runtime.trace(IDS)
    assert got.logits is not None
    np.testing.assert_allclose(got.logits, expected, atol=TOLERANCE)
    assert [hidden.shape for hidden in got.hidden] == [(len(IDS), SHAPE.hidden)] * (SHAPE.layers + 1)
    assert got.router_logits == []
    with PortableTracing(bundle, threads=1) as runtime:
        short = runtime.trace(IDS[:5], logits=False)
        assert short.logits is None
        np.testing.assert_allclose(short.hidden[-1], got.hidden[-1][:5], atol=TOLERANCE)
        with pytest.raises(ContextLengthError, match="65 tokens do not fit"):
            runtime.trace([1] * 65)
    with pytest.raises(EdgeLMError, match="was closed"):
        runtime.trace([1])


def test_every_listed_runtime_says_how_to_install_it() -> None:
    names = [entry.name for entry in runtimes()]
    assert names == ["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "cuda-kernels", "cuda-emulated"]
    assert all(entry.install and entry.targets and entry.available for entry in runtimes())


def test_ctrl_c_during_a_long_prefill_leaves_the_runtime_usable(tmp_path: Path) -> None:
    slow = write_tiny_bundle(tmp_path / "slow", Shape(hidden=64, layers=24, heads=4, head_dim=16, context=2048))
    with opened(slow, chunk=2048) as runtime:
        want = runtime.prefill([3, 4]).copy()
        runtime.reset()
        threading.Timer(0.03, signal.raise_signal, [signal.SIGINT]).start()
        started = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            runtime.prefill([1] * 2048)
        interrupted_after = time.perf_counter() - started
        assert runtime.position == 0
        np.testing.assert_array_equal(runtime.prefill([3, 4]), want)
        runtime.reset()
        started = time.perf_counter()
        runtime.prefill([1] * 2048)
        whole = time.perf_counter() - started
        assert interrupted_after < whole


def test_an_interrupt_cancels_native_work_and_waits_for_it() -> None:
    cancelled, finished = threading.Event(), threading.Event()

    def work() -> None:
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        assert cancelled.wait(30)
        finished.set()

    with pytest.raises(KeyboardInterrupt):
        interruptible(work, cancelled.set)
    assert finished.is_set()


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_a_second_interrupt_also_waits_for_the_work() -> None:
    taken, finished = threading.Semaphore(0), threading.Event()

    def interrupt(*_: object) -> None:
        taken.release()
        raise KeyboardInterrupt

    def work() -> None:
        for _ in range(2):
            time.sleep(0.2)  # about the fastest that people press a key twice
            os.kill(os.getpid(), signal.SIGINT)
            assert taken.acquire(timeout=30)
        time.sleep(0.2)
        finished.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work, lambda: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished.is_set()


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_uninterrupted_work_returns_its_result_or_raises_its_error(in_main_thread: bool) -> None:
    def fail() -> None:
        raise BundleError("broken")

    got: list[object] = []

    def attempt() -> None:
        got.append(interruptible(lambda: 7, lambda: None))
        try:
            interruptible(fail, lambda: None)
        except BundleError as error:
            got.append(str(error))

    if in_main_thread:
        attempt()
    else:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert got == [7, "broken"]


def test_a_failure_while_running_is_explained(tmp_path: Path) -> None:
    # The model claims more positions than its RoPE tables have: ONNX Runtime raises an error beyond them.
    path = tmp_path / "b"
    write_tiny_bundle(path, Shape(layers=1, context=16))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context_length": 16', '"context_length": 32'))
    with opened(Bundle.open(path)) as runtime:
        runtime.prefill([1] * 16)
        with pytest.raises(EdgeLMError, match=r"onnxruntime failed while running the model: .*smaller context_length"):
            runtime.prefill([1] * 16)


def test_prompts_traced_together_give_the_same_as_alone(bundle):
    texts = [IDS[:9], IDS[:4], IDS[2:7]]
    with PortableTracing(bundle, threads=1) as runtime:
        together = runtime.trace_all(texts)
        alone = [runtime.trace(text) for text in texts]
    for one, other, text in zip(together, alone, texts, strict=True):
        assert one.logits.shape[0] == len(text)
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-5)
        for a, b in zip(one.hidden + one.router_logits, other.hidden + other.router_logits, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def requiring(bundle: Bundle, version: str) -> Bundle:
    manifest = json.loads(bundle.file("manifest.json").read_text(encoding="utf-8"))
    needs = [("0.9", "something old"), (version, "wings (Fly)")]
    manifest["requires"] = [{"package": "onnxruntime", "version": v, "feature": f} for v, f in needs]
    bundle.file("manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle.open(bundle.path)


def test_a_bundle_that_needs_a_newer_onnxruntime_says_why(tmp_path: Path) -> None:
    bundle = requiring(write_tiny_bundle(tmp_path / "b"), "99.1.2")
    here = onnxruntime.__version__
    with pytest.raises(
        RuntimeUnavailableError,
        match=rf"b has wings \(Fly\), which needs ONNX Runtime 99\.1\.2 or newer, here is {here}: pip install -U "
        r"'onnxruntime>=99\.1\.2'",
    ):
        opened(bundle)
    with opened(requiring(bundle, here)) as runtime:
        runtime.prefill(IDS[:3])


@pytest.mark.parametrize(("here", "old"), [("1.9.2", True), ("1.31.0", True), ("1.31.1", False), ("1.100.0", False)])
def test_an_old_onnxruntime_is_refused_without_a_requirement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, old: bool
) -> None:
    """Native bundles and older ones have no requirement. Versions are compared as numbers, not as strings."""
    bundle = write_tiny_bundle(tmp_path / "b")
    assert bundle.manifest.requires == ()
    monkeypatch.setattr(onnxruntime, "__version__", here)
    for subject in (bundle, None):
        if not old:
            assert import_onnxruntime(subject) is onnxruntime
            continue
        needs = "EdgeLM needs" if subject is None else f"{bundle.path} needs"
        with pytest.raises(RuntimeUnavailableError) as caught:
            import_onnxruntime(subject)
        assert str(caught.value) == (
            f"{needs} ONNX Runtime 1.31.1 or newer, here is {here}: pip install -U 'onnxruntime>=1.31.1'"
        )
    if old:
        for load in (opened, PortableTracing):
            with pytest.raises(RuntimeUnavailableError, match=r"1\.31\.1 or newer"):
                load(bundle)


def test_an_invalid_required_version_is_a_damaged_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"requires onnxruntime of a version that is none: .*newest"):
        requiring(write_tiny_bundle(tmp_path / "b"), "newest")


def test_does_the_highest_required_version_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny_bundle(tmp_path / "b")
    manifest = json.loads(bundle.file("manifest.json").read_text(encoding="utf-8"))
    needs = [("onnxruntime", "1.9", "old"), ("onnxruntime", "1.25.1", "wings"), ("another", "99.0", "no")]
    manifest["requires"] = [{"package": package, "version": v, "feature": f} for package, v, f in needs]
    bundle.file("manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    bundle = Bundle.open(bundle.path)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    with pytest.raises(RuntimeUnavailableError, match=r"has wings, which needs ONNX Runtime 1\.25\.1 or newer"):
        opened(bundle)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.1")
    opened(bundle).close()


@pytest.mark.parametrize(
    ("section", "field", "value", "said"),
    [
        ("model", "vocab_size", 96, r"model\.vocab_size is 96 in the manifest, but the graph's logits has 97"),
        ("model", "vocab_size", 98, r"model\.vocab_size is 98 in the manifest, but the graph's logits has 97"),
        (
            "model",
            "num_kv_heads",
            1,
            r"num_kv_heads is 1 in the manifest, but the graph's past_key_values\.0\.key has 2",
        ),
        (
            "model",
            "num_kv_heads",
            4,
            r"num_kv_heads is 4 in the manifest, but the graph's past_key_values\.0\.key has 2",
        ),
        ("graph", "kv_dtype", "int8", "has a int8 cache, and portable operators support float32, float16"),
    ],
)
def test_is_a_manifest_that_contradicts_its_graph_refused(
    tmp_path: Path, section: str, field: str, value: object, said: str
) -> None:
    bundle = write_tiny_bundle(tmp_path / "b")
    manifest = json.loads(bundle.file("manifest.json").read_text(encoding="utf-8"))
    manifest[section][field] = value
    bundle.file("manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for use in (opened, lambda bundle: PortableTracing(bundle, threads=1)):
        with pytest.raises(BundleError, match=said):
            use(Bundle.open(bundle.path))


def test_is_the_environment_restored_after_loading_a_debug_graph(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting that makes the debug graph's experts exact would slow down all other sessions."""
    seen = []
    monkeypatch.setattr(portable, "_has_8_bit_experts", lambda bundle: True)
    monkeypatch.setattr(portable, "create_session", lambda *arguments: seen.append(dict(os.environ)))
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "1")
    monkeypatch.delenv("ORT_USE_MLAS_Q4_GEMM_MOE", raising=False)
    before = dict(os.environ)
    with pytest.raises(AttributeError):  # the session is None
        PortableTracing(bundle, threads=1)
    assert dict(os.environ) == before
    changes = {name: value for name, value in seen[0].items() if before.get(name) != value}
    assert changes == {"ORT_QMOE_CPU_QNBIT_GEMM": "0", "ORT_USE_MLAS_Q4_GEMM_MOE": "0"}
