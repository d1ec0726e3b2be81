"""Does libedgelm run bundles for the CPU as Python does, and refuse what it cannot run?

Together the tests here call every entry of ONNX Runtime's C API that runtimes/csrc/ort/host_abi.h declares.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from harness import Error, Model

from edgelm.bundle import Bundle
from edgelm.runtimes.registry import open_runtime

IDS = [5, 17, 900, 33, 1200, 4, 88, 1999, 7, 6, 5, 4, 3, 2, 1, 77, 300, 301, 302]
KV_TYPES = ("float32", "float16", "int8", "fp8")


@pytest.fixture(scope="module")
def native(tiny_bundle: Callable[[str, str, str], Path]) -> Path:
    return tiny_bundle("olmoe", "int4", "native")


@pytest.fixture
def copy(native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "copy"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    for name, info in manifest["files"].items():
        info["size"] = (bundle / name).stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def refusal(path: Path, **options: Any) -> Error:
    with pytest.raises(Error) as found, Model(path, **options) as model:
        model.logits(IDS)
    return found.value


@pytest.mark.parametrize(("model", "recipe"), [("olmoe", "int4"), ("fox", "int8")])
def test_logits_of_portable_bundles_are_pythons_bit_for_bit(
    tiny_bundle: Callable[[str, str, str], Path], model: str, recipe: str
) -> None:
    path = tiny_bundle(model, recipe, "portable")
    with Model(path, chunk=4) as ours, open_runtime(Bundle.open(path), chunk=4) as python:
        want = np.concatenate([block.copy() for block in python.logits_all(IDS)])
        assert np.array_equal(ours.logits(IDS, len(IDS)), want)
        assert np.array_equal(ours.logits([*IDS, 8])[0], python.decode(8))


@pytest.mark.parametrize("ops", ["native", "portable"])
def test_every_check_of_the_debug_graph_passes(tiny_bundle: Callable[[str, str, str], Path], ops: str) -> None:
    passed, report = harness.parity(tiny_bundle("olmoe", "int8", ops))
    assert passed, report


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_session_is_read_into_a_context_of_another_length(native: Path, tmp_path: Path, kv: str) -> None:
    with Model(native, kv=kv, context_length=64) as saved, Model(native, kv=kv, context_length=21) as read:
        saved.logits(IDS)
        saved.save_session(tmp_path / "session")
        read.load_session(tmp_path / "session")
        assert read.cached_tokens == len(IDS)
        assert np.array_equal(read.logits([*IDS, 9]), saved.logits([*IDS, 9]))


def test_models_share_the_library_and_may_be_closed_in_any_order(native: Path) -> None:
    first, second = Model(native), Model(native, kv="int8")
    want = first.logits(IDS)
    first.close()
    assert second.logits(IDS).shape == want.shape
    second.close()
    with Model(native) as third:
        assert np.array_equal(third.logits(IDS), want)


def test_cancel_ends_a_long_prompt_soon(native: Path) -> None:
    with Model(native) as model:
        ids = [token % 2000 for token in range(500)]
        model.logits(ids)
        for _ in range(20):  # until a cancellation comes while it runs
            model.reset()
            timer = threading.Timer(0.001, model.cancel)
            timer.start()
            try:
                model.logits(ids, 400)
            except Error as error:
                assert error.code == "CANCELLED"
                break
            finally:
                timer.join()
        else:
            pytest.fail("no call was cancelled")
        assert model.logits(ids).shape == (1, 2048)


def test_a_weights_file_truncated_in_use_is_an_error_and_no_crash(copy: Path) -> None:
    with Model(copy) as model:
        model.logits(IDS)
        os.truncate(copy / "model.onnx.data", 4096)
        model.reset()
        with pytest.raises(Error, match="truncated") as found:
            model.logits(IDS)
        assert found.value.code == "BUNDLE"


@pytest.mark.parametrize(
    ("field", "value", "code", "message"),
    [
        ("num_kv_heads", 2, "BUNDLE", "num_kv_heads is 2 in the manifest, but the graph's past_key_values.0.key has 4"),
        ("vocab_size", 100, "BUNDLE", "vocab_size is 100 in the manifest, but the graph's logits has 2048"),
        ("num_layers", 5, "BUNDLE", "lacks past_key_values.4.key, past_key_values.4.value, present.4.key"),
        ("head_dim", 16, "RUNTIME", "past_key has"),
        ("head_dim", 65536, "RUNTIME", "past_key has"),
    ],
)
def test_a_manifest_that_does_not_fit_the_graph_is_refused(
    copy: Path, field: str, value: int, code: str, message: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["model"][field] = value
        for tensor in manifest["tensors"]:
            tensor["layer"] = None

    error = refusal(edit(copy, change))
    assert error.code == code
    assert message in str(error)


@pytest.mark.parametrize("graph", [b"", b"\xff" * 1000, b"\n\x80\x80\x80\x80\x08"])
def test_a_graph_that_is_none_is_refused(copy: Path, graph: bytes) -> None:
    (copy / "model.onnx").write_bytes(graph)
    error = refusal(edit(copy, lambda _: None))
    assert error.code == "BUNDLE"
    assert f"cannot load {copy / 'model.onnx'}" in str(error)


def test_damaged_graphs_never_end_the_process(copy: Path) -> None:
    """Each is loaded and run in a process of its own; it ends with a result or an error."""
    whole = (copy / "model.onnx").read_bytes()
    random = np.random.default_rng(1)
    for _ in range(6):
        graph = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            graph[place] ^= 1 << random.integers(8)
        (copy / "model.onnx").write_bytes(graph)
        program = (
            "import sys; sys.path.insert(0, sys.argv[2]); from harness import *\n"
            "try: print(Model(sys.argv[1]).logits([5, 17, 900]).shape)\n"
            "except Error as error: print(error.code)"
        )
        folder = str(Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", program, copy, folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in ("(1, 2048)", "BUNDLE", "RUNTIME")


def test_weights_in_another_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.onnx.data"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    error = refusal(copy)
    assert error.code == "BUNDLE"
    assert f"is a link to {tmp_path / 'weights'}" in str(error)


def test_a_bundle_in_a_linked_folder_runs(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    with Model(tmp_path / "link") as model:
        assert np.isfinite(model.logits(IDS)).all()


def test_a_library_older_than_the_bundle_needs_is_refused(copy: Path) -> None:
    needs = [{"package": "onnxruntime", "version": "99.0", "feature": "a new operator"}]
    error = refusal(edit(copy, lambda manifest: manifest.update(requires=needs)))
    assert error.code == "UNAVAILABLE"
    assert "has a new operator, which needs ONNX Runtime 99.0 or newer, here is" in str(error)


def test_the_library_is_looked_for_as_documented(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the file does not exist" in str(refusal(native, onnxruntime=str(tmp_path / "none.so")))
    monkeypatch.setenv("EDGELM_ONNXRUNTIME", str(tmp_path / "other.so"))
    error = refusal(native, onnxruntime=None)
    assert error.code == "UNAVAILABLE"
    assert f"EDGELM_ONNXRUNTIME={tmp_path / 'other.so'}" in str(error)
    monkeypatch.setenv("EDGELM_ONNXRUNTIME", harness.onnxruntime().decode())
    with Model(native, onnxruntime=None) as model:
        assert model.info.runtime == b"onnxruntime-cpu"
    monkeypatch.delenv("EDGELM_ONNXRUNTIME")
    # Beside libedgelm, as an app ships it.
    folder = tmp_path / "app"
    folder.mkdir()
    shutil.copy(harness.LIBRARY.resolve(), folder / "libedgelm.so")
    program = "import sys; sys.path.insert(0, sys.argv[2]); from harness import *; Model(sys.argv[1], onnxruntime=None)"
    command = [sys.executable, "-c", program, str(native), str(Path(__file__).parent)]
    env = {**os.environ, "EDGELM_LIBRARY": str(folder / "libedgelm.so")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert f"ONNX Runtime was not found: there is no libonnxruntime.so.1 in {folder}" in done.stderr
    (folder / "libonnxruntime.so.1").symlink_to(harness.onnxruntime().decode())
    subprocess.run(command, env=env, check=True)


def test_kernels_are_those_of_the_environment_variable(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(native) as best:
        want = best.logits(IDS)
    monkeypatch.setenv("EDGELM_ISA", "scalar")
    with Model(native) as scalar:
        assert np.array_equal(scalar.logits(IDS), want)
    monkeypatch.setenv("EDGELM_ISA", "none")
    error = refusal(native)
    assert error.code == "UNAVAILABLE"
    assert "EDGELM_ISA" in str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "int4"}, "the KV cache can be float32, float16, int8, fp8"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 100000}, "100000 threads are more than the"),
        ({"context_length": 513}, "context_length is 513: give 1 to 512, the model's limit"),
        ({"context_length": -1}, "context_length is -1"),
        ({"chunk": -1}, "chunk is -1"),
    ],
)
def test_options_out_of_range_are_refused(native: Path, options: dict[str, Any], message: str) -> None:
    error = refusal(native, **options)
    assert error.code == "INVALID_ARGUMENT"
    assert message in str(error)


def test_runtimes_are_chosen_by_name_and_target(native: Path, copy: Path) -> None:
    assert "there are: onnxruntime-cpu, cuda-kernels" in str(refusal(native, runtime="tensorrt"))
    assert "was exported for cpu, but cuda-kernels runs tensorrt" in str(refusal(native, runtime="cuda-kernels"))
    error = refusal(edit(copy, lambda manifest: manifest.update(target="cuda")))
    assert error.code == "UNAVAILABLE"
    assert "was exported for cuda, which no runtime of this library runs" in str(error)
