"""Do emulated kernels compute the same when they are launched through the driver's functions, and are errors found?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulated_images import EmulatedKernels, driver_library
from gpu_bundles import write_bundle

from edgelm.bundle import Bundle
from edgelm.errors import DeviceError
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.runtimes.cuda.device import Device, Launch
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.emulated import EmulatedDevice
from edgelm.runtimes.cuda.executor import Executor, Layout, Sizes
from edgelm.runtimes.cuda.kernels import sampling
from edgelm.runtimes.cuda.operators import argmax_launches, argmax_workspace_bytes
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.cuda.sampling import SampledDecoding
from edgelm.runtimes.cuda.weights import DeviceWeights

SM = (8, 6)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver_library(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def device(library: Path, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setenv("FAKE_CUDA_MULTIPROCESSORS", "4")
    return CudaDevice(EmulatedKernels(), library=str(library))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "fox", "fox", "int4")


def logits_of(device: Device, bundle: Bundle) -> list[np.ndarray]:
    """Run a prompt and four tokens, of which the last two are replays of a captured graph; return all logits."""
    program = Program.read(bundle.file(PROGRAM_FILE))
    layout = Layout(program, Sizes(1, 64, tokens=8, logits=1, kv="int8"), device.info)
    device.load(layout.operators.kernels())
    weights = DeviceWeights(device, program, bundle.file(bundle.manifest.graph.weights_file))
    executor = Executor(device, weights, layout)
    found = []
    for ids, past in (([3, 4, 5, 6, 7], 0), ([8], 5), ([9], 6), ([10], 7), ([11], 8)):
        executor.run(np.array([ids]), [past], graph=True, greedy=True)
        found.append(np.empty((1, program.values["logits"].width), np.float32))
        executor.logits(found[-1])
        chosen = np.empty(1, np.int32)
        executor.chosen(chosen)
        assert chosen[0] == found[-1].argmax()
    executor.free()
    return found


def test_a_model_computes_the_same_bits(device: CudaDevice, bundle: Bundle) -> None:
    emulated = EmulatedDevice(SM)
    expected = logits_of(emulated, bundle)
    np.testing.assert_array_equal(logits_of(device, bundle), expected)
    emulated.close()
    device.close()


@pytest.mark.parametrize(
    "options",
    [Sampling(), Sampling(0.9, top_k=30, repetition_penalty=1.2, seed=1), Sampling(0.6, top_p=0.8, seed=2)],
    ids=str,
)
def test_a_decode_step_is_one_graph_and_one_wait(
    device: CudaDevice, bundle: Bundle, options: Sampling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
    program = Program.read(bundle.file(PROGRAM_FILE))
    layout = Layout(program, Sizes(1, 64, tokens=8, logits=1, kv="int8", samples=True), device.info)
    device.load([*layout.operators.kernels(), *sampling.kernels()])
    weights = DeviceWeights(device, program, bundle.file(bundle.manifest.graph.weights_file))
    executor = Executor(device, weights, layout)
    decoding, sampler, host = SampledDecoding(executor), Sampler(options, [3]), Sampler(options, [3])
    logits, chosen = np.empty((1, program.values["logits"].width), np.float32), np.empty(1, np.int32)
    token = 3
    for past in range(5):
        log.write_text("")
        if options.plain:
            executor.run(np.array([[token]]), [past], graph=True, greedy=True)
            executor.chosen(chosen)
            found = int(chosen[0])
        else:
            decoding.run(np.array([token]), [past], [sampler])
            (found,) = decoding.choose([sampler])
        if past > 1:  # the first step is not a graph, the second captures it
            assert [call.split()[0] for call in log.read_text().splitlines()] == [
                "cuGraphLaunch",
                "cuStreamSynchronize",
            ]
        executor.logits(logits)
        token = host.sample(logits[0])
        assert found == token
    executor.free()
    device.close()


def argmax(device: Device, x: np.ndarray) -> list[Launch]:
    device.load(["top_parts_f32", "top_all_f32"])
    at = device.allocate(x.nbytes)
    device.upload(at, x)
    workspace = device.allocate(argmax_workspace_bytes(*x.shape))
    return argmax_launches(at, device.allocate(4 * len(x)), *x.shape, workspace)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda launch: Launch(launch.kernel, launch.grid, 100, launch.shared, launch.args), "blocks must have 32, 64"),
        (lambda launch: Launch(launch.kernel, launch.grid, 1024, launch.shared, launch.args), "with 1024 threads"),
    ],
)
def test_an_error_of_the_emulator_is_the_drivers(
    device: CudaDevice, change: Callable[[Launch], Launch], said: str
) -> None:
    launches = argmax(device, np.ones((2, 5000), np.float32))
    with pytest.raises(DeviceError, match=f"emulated kernel top_parts_f32: .*{said}"):
        device.launch(change(launches[0]))
    device.close()


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_kernel_that_writes_outside_its_buffer_is_found(device: CudaDevice, where: str) -> None:
    launches = argmax(device, np.ones((2, 5000), np.float32))
    ids = device.allocate(4)  # the kernel writes 8 bytes
    args = bytearray(launches[1].args)
    args[24:32] = (ids if where == "behind" else ids - 4).to_bytes(8, "little")
    device.launch(launches[0])
    device.launch(Launch(launches[1].kernel, launches[1].grid, launches[1].block, launches[1].shared, bytes(args)))
    with pytest.raises(DeviceError, match=f"a kernel wrote {where} the buffer of 4 bytes"):
        device.synchronize()
