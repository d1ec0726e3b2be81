"""Do plugins and the runtime around an engine compute the same as our own executor?

The driver's library is tests/cuda/fake_driver.c, whose kernels are emulated, and a stand-in replaces TensorRT
(`played.py`). The library of plugins and all of the runtime around it are real: modules, launches, graphs, memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harness import Plugins
from played import PlayedEngine, PlayedGraph

from edgelm.bundle import Bundle
from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError
from edgelm.runtimes import open_batch, open_runtime
from edgelm.runtimes.cuda.driver import CudaDevice, Graph, KernelSource
from edgelm.runtimes.tensorrt import session

os.environ.setdefault("EDGELM_EMULATOR_CACHE", str(Path(__file__).parents[2] / "build" / "emulated"))
CONTEXT = 40


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, harness: ctypes.CDLL, gpu: Callable[..., None], emulated):
    """Let sessions run with a stand-in engine; return the list of their devices."""
    devices: list[CudaDevice] = []
    gpu(sm=86, multiprocessors=4)

    class Device(CudaDevice):
        """The driver's device; it counts captures."""

        def __init__(self, kernels: KernelSource) -> None:
            super().__init__(kernels)
            self.captured = 0
            devices.append(self)

        def capture(self, work: Callable[[], None]) -> Graph:
            self.captured += 1
            return super().capture(work)

    def arrange(bundle: Bundle, *, capturable: bool = True) -> list[Device]:
        def engine(library: object, info: object, path: Path, plugins: object, memory: object) -> PlayedEngine:
            graph = PlayedGraph(bundle, devices[-1], Plugins(harness, emulated(bundle)))
            return PlayedEngine(graph, path, capturable=capturable)

        monkeypatch.setattr(session, "CudaDevice", Device)
        monkeypatch.setattr(session, "Engine", engine)
        return devices

    return arrange


@pytest.mark.parametrize(
    ("checkpoint", "recipe"), [("fox-tiny", "int8"), ("olmoe-tiny", "none"), ("olmoe-tiny", "int4")]
)
def test_a_runtime_computes_what_the_executor_does(export, played, checkpoint: str, recipe: str) -> None:
    bundle = export(checkpoint, recipe)
    devices = played(bundle)
    with (
        open_runtime(bundle, "cuda-emulated", context_length=CONTEXT) as model,
        open_runtime(bundle, "tensorrt", context_length=CONTEXT, chunk=4) as found,
    ):
        prompt = [3, 4, 5, 6, 7]
        model.prefill(prompt[:4])
        want = model.prefill(
            prompt[4:]
        )  # in the same chunks, since the choice of kernels depends on the number of rows
        np.testing.assert_array_equal(found.prefill(prompt), want)
        for token in (6, 7, 8):  # the second is captured, the third replays the graph
            np.testing.assert_array_equal(found.decode(token), model.decode(token))
        assert devices[0].captured == 1
        for other in (model, found):
            other.truncate(4)
        np.testing.assert_array_equal(found.decode(9), model.decode(9))
        assert found.position == model.position == 5
        with pytest.raises(ContextLengthError, match="100 tokens do not fit"):
            found.prefill([1] * 100)
    with pytest.raises(EdgeLMError, match="was closed"):
        found.decode(1)


def test_sequences_have_caches_of_their_own(export, played) -> None:
    bundle = export("fox-tiny", "int8")
    played(bundle)
    prompts = [[3, 4, 5], [9], [1, 2]]
    with open_batch(bundle, 3, "tensorrt", context_length=CONTEXT) as found:
        for row in (2, 0, 1):
            found.prefill(row, prompts[row])
        assert found.lengths.tolist() == [3, 1, 2]
        first = found.decode_batch([6, 7, 8]).copy()
        found.decode_batch([10, 11, 12])
        found.truncate(1, 2)
        found.truncate(0, 4)
        found.truncate(2, 3)
        second = found.decode_batch([20, 21, 22]).copy()
        with pytest.raises(GenerationError, match="2 tokens for 3 sequences"):
            found.decode_batch([1, 2])
        with pytest.raises(GenerationError, match="sequence 3 does not exist"):
            found.prefill(3, [1])
    with open_batch(bundle, 3, "cuda-emulated", context_length=CONTEXT) as model:
        for row in (2, 0, 1):
            model.prefill(row, prompts[row])
        np.testing.assert_array_equal(first, model.decode_batch([6, 7, 8]))
        np.testing.assert_array_equal(second, model.decode_batch([20, 21, 22]))


def test_an_engine_that_cannot_be_captured_still_runs(export, played) -> None:
    """For example an engine whose weights are streamed."""
    bundle = export("fox-tiny", "int8")
    devices = played(bundle, capturable=False)
    with open_runtime(bundle, "tensorrt", context_length=CONTEXT) as found:
        found.prefill([1, 2])
        for token in (3, 4, 5):
            assert np.isfinite(found.decode(token)).all()
    assert devices[0].captured == 0


def test_two_models_in_one_process_keep_their_own_kernels_and_caches(export, played) -> None:
    """Each engine's plugins run on their own model's device, even after another model was loaded or closed."""
    bundles = [export("fox-tiny", "int8"), export("olmoe-tiny", "none")]
    prompts = [[3, 4, 5], [9, 8]]
    want = []
    for bundle, prompt in zip(bundles, prompts, strict=True):
        with open_runtime(bundle, "cuda-emulated", context_length=CONTEXT) as model:
            want.append([model.prefill(prompt).copy(), *(model.decode(token).copy() for token in (6, 7, 8))])
    found = []
    for bundle in bundles:
        devices = played(bundle)
        found.append(open_runtime(bundle, "tensorrt", context_length=CONTEXT))
    assert len(devices) == 2
    for model, prompt, logits in zip(found, prompts, want, strict=True):
        np.testing.assert_array_equal(model.prefill(prompt), logits[0])
    for step, token in enumerate((6, 7), start=1):
        for model, logits in zip(found, want, strict=True):
            np.testing.assert_array_equal(model.decode(token), logits[step])
    found[1].close()
    np.testing.assert_array_equal(found[0].decode(8), want[0][3])
    found[0].close()
