"""Is a graph node on another execution provider than requested found, named, and refused?

Except for CUDA, the tests use the real CPU provider: if a check requests another provider, its nodes are on the wrong
one.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tiny_graph import Shape, write_tiny_model

from edgelm.errors import BundleError, DeviceError, DeviceMemoryError, RuntimeUnavailableError
from edgelm.installing import install_hint
from edgelm.runtimes import runtimes
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.onnxruntime import cuda_session
from edgelm.runtimes.onnxruntime.cuda_session import check_placement, placement, record_placement
from edgelm.runtimes.onnxruntime.router_probe import check_router

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def model(count: int = 2) -> bytes:
    """Return a model with a chain of operators, one of which is ONNX Runtime's own."""
    nodes = [helper.make_node("QuickGelu", ["x0"], ["x1"], "gate/QuickGelu", domain="com.microsoft", alpha=1.0)]
    nodes += [helper.make_node("Det", [f"x{i}"], [f"x{i + 1}"], f"det{i}/Det") for i in range(1, count)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 2, 2])],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(data: bytes, *, recorded: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if recorded:
        record_placement(options)
    return ort.InferenceSession(data, options, providers=[CPU])


def test_every_node_has_a_known_provider() -> None:
    nodes = placement(session(model()))
    assert [(node.name, node.op, node.provider) for node in nodes] == [
        ("gate/QuickGelu", "com.microsoft.QuickGelu", CPU),
        ("det1/Det", "ai.onnx.Det", CPU),
    ]


def test_nodes_on_the_requested_provider_pass() -> None:
    check_placement(session(model()), CPU, "the graph")


def test_a_node_on_another_provider_is_named_with_its_operator() -> None:
    expected = (
        r"CUDAExecutionProvider has no kernel for 2 of 2 nodes of the graph, which CPUExecutionProvider would run "
        r"instead: gate/QuickGelu \(com.microsoft.QuickGelu\), det1/Det \(ai.onnx.Det\); export"
    )
    with pytest.raises(RuntimeUnavailableError, match=expected):
        check_placement(session(model()), CUDA, "the graph")


def test_only_allowed_nodes_may_be_on_another_provider() -> None:
    check_placement(session(model()), CUDA, "the graph", allowed=("gate/QuickGelu", "det1/Det"))
    with pytest.raises(RuntimeUnavailableError, match=r"1 of 2 nodes .* instead: det1/Det \(ai.onnx.Det\)"):
        check_placement(session(model()), CUDA, "the graph", allowed=("gate/QuickGelu",))


def test_many_nodes_on_another_provider_are_counted() -> None:
    chain = onnx.load_from_string(model(1))
    for i in range(1, 7):
        chain.graph.node.append(helper.make_node("Det", ["x0"], [f"d{i}"], f"det{i}/Det"))
        chain.graph.output.append(helper.make_tensor_value_info(f"d{i}", TensorProto.FLOAT, None))
    with pytest.raises(RuntimeUnavailableError, match=r"7 of 7 nodes .* and 3 more; export"):
        check_placement(session(chain.SerializeToString()), CUDA, "the graph")


def test_a_session_without_recorded_placement_is_refused() -> None:
    with pytest.raises(Exception, match=r"record_ep_graph_assignment_info|does not say"):
        check_placement(session(model(), recorded=False), CPU, "the graph")


def test_is_a_session_without_node_information_refused() -> None:
    class Silent:
        def get_provider_graph_assignment_info(self) -> list[object]:
            return []

    with pytest.raises(RuntimeUnavailableError, match="does not report where the nodes of the graph run"):
        check_placement(Silent(), CPU, "the graph")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_is_a_provider_that_computes_nan_refused(value: float) -> None:
    class Broken:
        def run(self, names: list[str], feed: dict[str, object]) -> list[object]:
            del names, feed
            right = np.array([1.0, 2.0], np.float32)
            return [np.array([1.0, value], np.float32), right, 2 * right]

    with pytest.raises(RuntimeUnavailableError, match="has NaN or infinite values"):
        check_router(Broken(), "this provider")


def test_a_package_without_cuda_is_named() -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    why = cuda_session.problem()
    assert why is not None
    assert f"was built without CUDA: pip uninstall onnxruntime, then {install_hint('cuda')}" in why
    entry = next(entry for entry in runtimes() if entry.name == "onnxruntime-cuda")
    assert entry.targets == ("cuda",)


def test_two_packages_in_one_folder_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("onnxruntime-gpu") == "9.9"
    with pytest.raises(RuntimeUnavailableError, match=r"are both installed and overwrite each other.*pip uninstall"):
        cuda_session.require_cuda()


def test_a_gpu_that_is_too_old_for_onnx_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(cuda_session, "find_devices", lambda: (DeviceInfo("Volta", (7, 0), 80, 16 << 30, (12, 4)),))
    why = cuda_session.problem()
    assert why is not None
    assert "Volta has compute capability 7.0, ONNX Runtime's kernels need 7.5 or newer" in why


def test_a_missing_library_of_cuda_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    build = SimpleNamespace(cuda_version="97.1", preload_dlls=lambda: print("Failed to load libcudart.so.97"))
    with pytest.raises(RuntimeUnavailableError, match=r"needs libcudart\.so\.97, which cannot be loaded .*CUDA 97"):
        cuda_session._preload(build)
    assert capsys.readouterr().out == ""


def test_a_provider_that_does_not_start_is_no_silent_fallback_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    bundle = write_tiny_model(tmp_path / "bundle", Shape())
    monkeypatch.setattr(cuda_session, "require_cuda", lambda: (ort, 0))
    with (
        pytest.warns(UserWarning, match=CUDA),
        pytest.raises(RuntimeUnavailableError, match="could not start its CUDA"),
    ):
        cuda_session.cuda_session(bundle, bundle.manifest.graph.file, 1)
    bundle.file(bundle.manifest.graph.file).write_bytes(b"no graph")
    with pytest.warns(UserWarning, match=CUDA), pytest.raises(BundleError, match="cannot load"):
        cuda_session.cuda_session(bundle, bundle.manifest.graph.file, 1)


MESSAGES = [
    (
        # Message of the arena of ONNX Runtime 1.31.1 for a tensor that is too large.
        "Non-zero status code returned while running MatMul node. bfc_arena.cc:419 Failed to allocate memory for "
        "requested buffer of size 274877906944",
        DeviceMemoryError,
        "the GPU ran out of memory when loading: end what else uses it",
    ),
    ("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size);", DeviceMemoryError, "out of memory"),
    (
        "CUDA failure 209: no kernel image is available for execution on the device",
        DeviceError,
        "has no code for this GPU",
    ),
    (
        "CUDA failure 700: an illegal memory access was encountered\nmore",
        DeviceError,
        "the GPU failed when loading: CUDA",
    ),
]


@pytest.mark.parametrize(("text", "kind", "message"), MESSAGES)
def test_gpu_errors_of_onnx_runtime_become_one_line(text: str, kind: type[DeviceError], message: str) -> None:
    found = cuda_session.device_error(RuntimeError(text), "loading")
    assert type(found) is kind
    assert message in str(found)
    assert "\n" not in str(found)


def test_other_errors_are_not_blamed_on_the_gpu() -> None:
    assert cuda_session.device_error(RuntimeError("INVALID_GRAPH : this is an invalid model"), "loading") is None
    assert cuda_session.device_error(None, "loading") is None


def test_a_real_allocation_failure_is_recognised() -> None:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1 << 20, 1 << 20])
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"], "fill")],
        "huge",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [shape],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with pytest.raises(Exception) as caught:
        ort.InferenceSession(data, options, providers=[CPU]).run(None, {})
    assert isinstance(cuda_session.device_error(caught.value, "running"), DeviceMemoryError)
