"""Are the driver's functions called correctly, and is every failure of the driver one clear line?

The driver is fake (fake_driver.c). The code under test, its ctypes calls and the handling of errors are real.
tests/gpu/test_driver.py does the same on a GPU.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulated_images import driver_library

from edgelm.errors import DeviceError, DeviceMemoryError, EdgeLMError, RuntimeUnavailableError
from edgelm.runtimes.cuda import driver as drivers
from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.cuda.driver import CudaDevice, chosen_device, current_gpu, find_devices
from edgelm.runtimes.cuda.kernels.images import Image

_STAGING = drivers._STAGING


class OneKernel:
    """The first bytes of a cubin, which are all that the fake driver reads."""

    def __init__(self, target: str = "sm_86", pdl: bool = False) -> None:
        self.target, self.asked = target, []
        self.pdl = frozenset(["increment"] if pdl else [])

    def image(self, names, capability, driver):
        self.asked.append((list(names), capability, driver))
        data = b"\x7fELF" if self.target.startswith("sm_") else b"// PTX"
        return Image(self.target, data, {"increment": 16}, (13, 0), self.pdl)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(driver_library(tmp_path_factory.mktemp("driver")))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return a function that returns the calls so far, as [function, arguments ...]."""
    log = tmp_path / "calls"
    monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
    monkeypatch.delenv(drivers.INDEX_VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda name="": [line.split() for line in log.read_text().splitlines() if line.startswith(name)]


@pytest.fixture
def device(library: str, calls):
    made = CudaDevice(OneKernel(), library=library)
    yield made
    made.close()


def increment(address: int, count: int, by: float, shared: int = 0) -> Launch:
    return Launch("increment", (2, 3, 4), 128, shared, struct.pack("<Qif", address, count, by))


def test_a_device_is_described(device):
    assert device.info == drivers.DeviceInfo("Fake GPU 0", (8, 6), 14, 1 << 30, (13, 0))


def test_data_goes_up_through_a_kernel_and_down_again(device, calls):
    x = np.arange(1000, dtype=np.float32)
    address = device.allocate(x.nbytes)
    assert address % 256 == 0
    device.load(["increment"])
    device.upload(address, x)
    device.launch(increment(address, 1000, 0.5))
    out = np.empty_like(x)
    device.download(address, out)
    np.testing.assert_array_equal(out, x + 0.5)
    (launched,) = calls("cuLaunchKernel")
    assert launched[2:9] == ["2", "3", "4", "128", "1", "1", "0"]
    # Everything is on one stream.
    streams = {call[-1] for name in ("cuMemcpy", "cuLaunchKernel", "cuStreamSynchronize") for call in calls(name)}
    assert streams == {hex(device.stream)}


@pytest.mark.parametrize("extra", [-1, 0, 1, _STAGING + 12345])
def test_large_uploads_pass_through_two_buffers_and_arrive_whole(device, calls, extra):
    data = np.random.default_rng(1).integers(0, 256, 2 * _STAGING + extra, np.uint8)
    address = device.allocate(data.nbytes)
    device.upload(address, data.tobytes())
    out = np.empty_like(data)
    device.download(address, out)
    np.testing.assert_array_equal(out, data)
    assert len(calls("cuMemcpyHtoDAsync")) == -(-data.nbytes // _STAGING)
    # A buffer is filled again only after its copy is done.
    order = [call[:2] for call in calls("cuEvent") if call[0] in ("cuEventRecord", "cuEventSynchronize")]
    for event in {call[1] for call in order}:
        done = [name for name, other in order if other == event]
        assert done == ["cuEventSynchronize", "cuEventRecord"] * (len(done) // 2), order


def test_arrays_that_are_not_contiguous_are_uploaded_in_their_order(device):
    x = np.arange(12, dtype=np.int32).reshape(3, 4).T
    address = device.allocate(x.nbytes)
    device.upload(address, x)
    out = np.empty((4, 3), np.int32)
    device.download(address, out)
    np.testing.assert_array_equal(out, x)


def test_empty_arrays_touch_nothing(device, calls):
    address = device.allocate(0)
    device.upload(address, b"")
    device.download(address, np.empty(0, np.float32))
    device.fill(address, 1, 0)
    device.copy(address, address, 0)
    assert not calls("cuMemcpy") + calls("cuMemset")


def test_memory_is_filled_copied_and_counted(device):
    first, second = device.allocate(64), device.allocate(64)
    device.fill(first, 0xAB, 64)
    device.copy(second, first, 64)
    out = np.empty(64, np.uint8)
    device.download(second, out)
    assert (out == 0xAB).all()
    assert device.allocated == 128
    free, total = device.memory()
    assert (total, total - free) == (1 << 30, 128)
    device.free(first)
    assert device.allocated == 64


def test_a_captured_graph_runs_each_time_it_is_called_and_not_before(device, calls):
    device.load(["increment"])
    address = device.allocate(16)
    device.fill(address, 0, 16)
    host = device.pinned(16)

    def work():
        device.launch(increment(address, 4, 1.0))
        device.launch(increment(address, 4, 2.0))
        device.start_download(host, address)

    host[:] = 0
    graph = device.capture(work)
    assert (host.view(np.float32) == 0).all()
    graph()
    graph()
    device.synchronize()
    assert (host.view(np.float32) == 6).all()
    assert [call[-1] for call in calls("cuStreamBeginCapture")] == ["1"]
    assert len(calls("cuGraphDestroy")) == 1


def test_an_error_during_capture_is_raised_and_the_device_still_works(device, calls):
    address = device.allocate(16)

    def work():
        device.fill(address, 1, 16)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        device.capture(work)
    assert len(calls("cuStreamEndCapture")) == len(calls("cuGraphDestroy")) == 1
    device.fill(address, 2, 16)
    out = np.empty(16, np.uint8)
    device.download(address, out)
    assert (out == 2).all()


def test_waiting_and_allocating_are_refused_during_capture(device):
    address = device.allocate(4)
    for wrong in (
        lambda: device.allocate(4),
        lambda: device.upload(address, b"1234"),
        lambda: device.download(address, np.empty(1, np.int32)),
    ):
        with pytest.raises(AssertionError):
            device.capture(wrong)


def test_large_shared_memory_is_requested_once_and_too_much_is_an_error(device, calls):
    device.load(["increment"])
    address = device.allocate(16)
    for shared in (48 << 10, 60_000, 50_000, 99 << 10):
        device.launch(increment(address, 1, 0.0, shared))
    assert [call[2:] for call in calls("cuFuncSetAttribute")] == [["8", "60000"], ["8", str(99 << 10)]]
    with pytest.raises(DeviceError, match=r"increment needs 101377 bytes of shared memory.* Fake GPU 0 has 101376"):
        device.launch(increment(address, 1, 0.0, (99 << 10) + 1))


def test_kernels_are_loaded_before_they_are_used_and_only_once(device, calls):
    with pytest.raises(DeviceError, match="increment was not loaded"):
        device.launch(increment(0, 0, 0.0))
    device.load(["increment", "increment"])
    device.load(["increment"])
    assert device._kernels.asked == [(["increment"], (8, 6), (13, 0))]
    assert len(calls("cuModuleLoadDataEx")) == len(calls("cuFuncLoad")) == 1
    with pytest.raises(DeviceError, match=r"increment takes 16 bytes of arguments.* has 8: another version"):
        device.launch(Launch("increment", (1, 1, 1), 32, 0, b"12345678"))


@pytest.mark.parametrize(("kernel", "device_pdl"), [(True, True), (True, False), (False, True)])
def test_only_a_kernel_with_pdl_is_started_early_and_only_if_enabled(library, calls, kernel, device_pdl):
    device = CudaDevice(OneKernel(pdl=kernel), library=library, pdl=device_pdl)
    device.load(["increment"])
    address = device.allocate(16)
    device.fill(address, 0, 16)
    graph = device.capture(lambda: device.launch(increment(address, 4, 1.5, 1000)))
    graph()
    out = np.empty(4, np.float32)
    device.download(address, out)
    assert (out == 1.5).all()
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; everything else is as in an ordinary launch.
    assert [call[2:] for call in calls("cuLaunchKernelEx")] == [["attribute", "6", "1", "of", "1"]] * (
        kernel and device_pdl
    )
    assert [call[2:] for call in calls("cuLaunchKernel ")] == [
        ["2", "3", "4", "128", "1", "1", "1000", hex(device.stream)]
    ]
    device.close()


def test_work_is_timed_between_events(device):
    done = []
    times = device.elapsed(lambda: done.append(1), repeat=3)
    assert len(done) == 3
    assert times == pytest.approx([0.001] * 3)  # the fake driver counts a millisecond between events


def test_close_gives_everything_back(library, calls):
    device = CudaDevice(OneKernel(), library=library)
    device.load(["increment"])
    device.allocate(1000)
    host = device.pinned(4)
    device.upload(device.allocate(1 << 20), bytes(1 << 20))
    device.capture(lambda: device.fill(host.ctypes.data, 0, 4))
    device.close()
    device.close()
    assert calls("cuMemFree_v2")[-1] == ["cuMemFree_v2", "left", "0"]
    assert calls("cuDevicePrimaryCtxRelease")[-1][-1] == "0"
    for made, freed in (("cuStreamCreate", "cuStreamDestroy"), ("cuEventCreate", "cuEventDestroy")):
        assert len(calls(made)) == len(calls(freed)) > 0
    assert len(calls("cuMemHostAlloc")) == len(calls("cuMemFreeHost")) == 3
    assert len(calls("cuModuleUnload")) == len(calls("cuGraphExecDestroy")) == 1


def test_close_after_a_kernel_failed_still_releases_the_gpu(library, calls, monkeypatch):
    device = CudaDevice(OneKernel(), library=library)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuCtxSynchronize=719")
    with pytest.raises(DeviceError, match="a kernel failed"):
        device.close()
    assert len(calls("cuDevicePrimaryCtxRelease")) == 1
    device.close()


def test_another_thread_gets_the_context_first(device, calls):
    import threading

    before = len(calls("cuCtxSetCurrent"))
    worker = threading.Thread(target=device.synchronize)
    worker.start()
    worker.join()
    assert len(calls("cuCtxSetCurrent")) == before + 1


# -- what can be wrong with a machine ---------------------------------------------------------------------------------


def failure(library: str | None, kind: type[EdgeLMError] = DeviceError) -> str:
    with pytest.raises(kind) as caught:
        CudaDevice(OneKernel(), library=library)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def current(library: str | None) -> str:
    with current_gpu(library):
        return "there is a GPU"


def test_no_driver_is_one_clear_line(tmp_path, monkeypatch):
    path = str(tmp_path / "libcuda.so.1")
    said = failure(path)
    assert said.startswith(f"no NVIDIA driver: {path} cannot be loaded (cannot open shared object file")
    assert said.endswith("Without a GPU, export with --target cpu")
    assert said.count(path) == 1
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(broken))
    assert "install the driver" in failure(None)


def test_a_library_that_is_no_driver_is_named(tmp_path):
    source, path = tmp_path / "a.c", tmp_path / "a.so"
    source.write_text("int a;")
    subprocess.run(["gcc", "-shared", source, "-o", path], check=True)
    assert f"({path}) is too old: it lacks cuDriverGetVersion" in failure(str(path))


def test_no_gpu_is_one_clear_line(library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = failure(library)
    assert "check that nvidia-smi lists a GPU" in said


@pytest.mark.parametrize("visible", ["", "3", "-1", "x", "GPU-7", "MIG-9", "3,0"])
@pytest.mark.parametrize("use", [failure, find_devices, chosen_device, current])
def test_an_empty_or_wrong_list_of_visible_gpus_is_one_clear_line_for_every_use(library, monkeypatch, visible, use):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    try:
        said = use(library)
    except DeviceError as error:
        said = str(error)
    assert said == (
        f"CUDA_VISIBLE_DEVICES={visible} shows no GPU: unset it, or name GPUs of `nvidia-smi -L` by numbers from 0, by "
        "UUID, or by the UUID of a MIG device"
    )


@pytest.mark.parametrize(
    ("visible", "chosen", "name"),
    [
        ("2", "", "Fake GPU 2"),
        ("2,0", "1", "Fake GPU 0"),
        ("GPU-1", "0", "Fake GPU 1"),
        ("MIG-2,MIG-1", "", "Fake GPU 2"),
        ("1,9,0", "", "Fake GPU 1"),
    ],
)
def test_gpus_are_numbered_among_the_visible_ones_for_every_use(library, monkeypatch, calls, visible, chosen, name):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("EDGELM_GPU", chosen)
    device = CudaDevice(OneKernel(), library=library)
    assert device.info.name == chosen_device(library).name == name
    device.close()
    with current_gpu(library):
        pass
    ordinal = str(40 + int(name[-1]))
    assert [one[-1] for one in calls("cuDevicePrimaryCtxRetain")] == [ordinal] * 2
    assert [one[1] for one in calls("cuDevicePrimaryCtxRelease")] == [ordinal] * 2
    monkeypatch.setenv("EDGELM_GPU", "2")
    assert failure(library).startswith(f"there is no GPU 2: CUDA_VISIBLE_DEVICES={visible} shows ")


def test_the_gpu_can_be_chosen_and_a_wrong_choice_is_named(library, monkeypatch, calls):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "3")
    choices = ((None, "", "Fake GPU 0"), (2, "", "Fake GPU 2"), (None, "1", "Fake GPU 1"), (0, "1", "Fake GPU 0"))
    for index, variable, name in choices:
        monkeypatch.setenv("EDGELM_GPU", variable)
        device = CudaDevice(OneKernel(), index, library)
        assert device.info.name == name
        device.close()
    assert [info.name for info in find_devices(library)] == ["Fake GPU 0", "Fake GPU 1", "Fake GPU 2"]
    monkeypatch.setenv("EDGELM_GPU", "3")
    assert "there is no GPU 3: this machine shows 3" in failure(library)
    monkeypatch.setenv("EDGELM_GPU", "first")
    for wrong in ("first", "GPU-1", "-1", "1.0", " ", "\u00b2"):
        monkeypatch.setenv("EDGELM_GPU", wrong)
        said = "is not the number of a GPU: set it to 0 to 2; UUIDs and MIG devices go into CUDA_VISIBLE_DEVICES"
        assert failure(library) == f"EDGELM_GPU={wrong} {said}"
        with pytest.raises(DeviceError, match="is not the number of a GPU"):
            chosen_device(library)


def test_a_gpu_that_is_too_old_is_named(library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_SM", "75")
    assert "Fake GPU 0 has compute capability 7.5, and the kernels need 8.0" in failure(library)


def test_too_little_memory_says_how_much_there_is(library, monkeypatch, calls):
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(3 << 30))
    device = CudaDevice(OneKernel(), library=library)
    held = device.allocate(1 << 30)
    with pytest.raises(DeviceMemoryError) as caught:
        device.allocate(5 << 29)
    expected = "Fake GPU 0 has 2.15 GB of 3.22 GB free, 1.07 GB are this model's, and 2.68 GB more are needed"
    assert expected in str(caught.value)
    device.free(held)
    device.free(device.allocate(5 << 29))  # the device still works
    device.close()


def test_a_kernel_that_fails_is_reported_by_the_call_that_waits_for_it(device, monkeypatch):
    device.load(["increment"])
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuStreamSynchronize=700")
    with pytest.raises(DeviceError) as caught:
        device.download(device.allocate(4), np.empty(1, np.int32))
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(caught.value)
    assert "waiting for a copy and the kernels before it" in str(caught.value)
    assert "report it" in str(caught.value)


def test_an_unknown_error_has_the_drivers_text(device, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuCtxSynchronize=977")
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_X from cuCtxSynchronize .*: as the driver says"):
        device.synchronize()
    monkeypatch.delenv("FAKE_CUDA_FAIL")


def test_ptx_that_the_driver_refuses_shows_its_compilers_first_line(library, monkeypatch, calls):
    device = CudaDevice(OneKernel("compute_80"), library=library)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuModuleLoadDataEx=218")
    with pytest.raises(DeviceError) as caught:
        device.load(["increment"])
    assert str(caught.value).endswith("(ptxas fatal : as the compiler says)")
    assert "export with --sm" in str(caught.value)
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    device.close()


def test_kernels_that_no_image_has_are_an_error_of_the_image_not_of_the_driver(library, calls):
    class Nothing:
        def image(self, names, capability, driver):
            raise RuntimeUnavailableError(f"no image for {capability}")

    device = CudaDevice(Nothing(), library=library)
    with pytest.raises(RuntimeUnavailableError, match=r"no image for \(8, 6\)"):
        device.load(["increment"])
    device.close()
