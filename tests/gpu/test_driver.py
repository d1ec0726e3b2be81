"""Do memory, kernels, CUDA graphs, streams and errors of a real GPU behave as the executor expects?"""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import DeviceMemoryError
from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.kernels import nvrtc
from edgelm.runtimes.cuda.kernels.images import Image, choose, compilable

SOURCE = """
struct Increment { float* x; int count; float by; };
extern "C" __global__ void increment(const __grid_constant__ Increment a) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < a.count) a.x[i] += a.by;
}
// Reverse a block's numbers through dynamic shared memory.
extern "C" __global__ void turn(const __grid_constant__ Increment a) {
  extern __shared__ float shared[];
  for (int i = threadIdx.x; i < a.count; i += blockDim.x) shared[i] = a.x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < a.count; i += blockDim.x) a.x[i] = shared[a.count - 1 - i] + a.by;
}
// Runs for about a millisecond.
extern "C" __global__ void linger(const __grid_constant__ Increment a) {
  long long end = clock64() + 1000000;
  while (clock64() < end) {}
  a.x[0] += a.by;
}
"""
NAMES = ("increment", "turn", "linger")


class Source:
    """Compiles the kernels above, as a cubin or as PTX."""

    def __init__(self, ptx: bool = False) -> None:
        self.ptx = ptx

    def image(self, names, capability, driver):
        images = {name: version for name, version in compilable().items() if not self.ptx or name == nvrtc.PTX_TARGET}
        made = nvrtc.compile_kernels(SOURCE, {}, choose(images, capability, driver), NAMES)
        return Image(made.target, made.image, made.argument_bytes, made.compiler)


@pytest.fixture(params=["cubin", "ptx"])
def device(gpu, request: pytest.FixtureRequest):
    made = CudaDevice(Source(request.param == "ptx"))
    made.load(NAMES)
    yield made
    made.close()


def run(device, address, count, by, kernel="increment", shared=0):
    blocks = -(-count // 256) if kernel == "increment" else 1
    device.launch(Launch(kernel, (blocks, 1, 1), 256, shared, struct.pack("<Qif", address, count, by)))


def test_the_device_is_described(gpu):
    assert gpu.name
    assert gpu.capability >= (8, 0)
    assert gpu.multiprocessors > 0
    assert gpu.memory > 1 << 30
    assert gpu.driver >= (12, 0)


@pytest.mark.parametrize("count", [1, 1000, 32 << 10, 5_000_000, 40_000_001])
def test_data_goes_up_through_a_kernel_and_down_again(device, count):
    x = np.random.default_rng(count).standard_normal(count, np.float32)
    address = device.allocate(x.nbytes)
    assert address % 256 == 0
    device.upload(address, x)
    expected = x + np.float32(0.5)
    x[:] = np.nan  # an upload has read its data when it returns
    run(device, address, count, 0.5)
    out = np.empty_like(x)
    device.download(address, out)
    np.testing.assert_array_equal(out, expected)


def test_memory_is_filled_copied_and_given_back(device):
    free, total = device.memory()
    first, second = device.allocate(256 << 20), device.allocate(1 << 20)
    assert device.memory()[0] <= free - (256 << 20)
    device.fill(first, 0xAB, 1 << 20)
    device.copy(second, first, 1 << 20)
    out = np.empty(1 << 20, np.uint8)
    device.download(second, out)
    assert (out == 0xAB).all()
    device.free(first)
    assert device.memory()[0] > free - (256 << 20)
    assert total == pytest.approx(device.info.memory, rel=0.03)


def test_large_shared_memory_works_up_to_what_the_device_has(device):
    count = device._most_shared // 4
    x = np.arange(count, dtype=np.float32)
    address = device.allocate(x.nbytes)
    device.upload(address, x)
    run(device, address, count, 1.0, "turn", device._most_shared)
    out = np.empty_like(x)
    device.download(address, out)
    np.testing.assert_array_equal(out, x[::-1] + 1)


def test_a_graph_repeats_the_captured_launches_and_reads_pinned_memory_when_it_runs(device):
    address = device.allocate(4000)
    host, back = device.pinned(4000), device.pinned(4000)

    def work() -> None:
        device.start_upload(address, host)
        run(device, address, 1000, 1.0)
        run(device, address, 1000, 2.0)
        device.start_download(back, address)

    host.view(np.float32)[:] = 5
    back[:] = 0
    graph = device.capture(work)
    device.synchronize()
    assert not back.any()
    for start in (5.0, 7.0):
        host.view(np.float32)[:] = start
        graph()
        device.synchronize()
        assert (back.view(np.float32) == start + 3).all()


def test_time_is_the_devices_own(device):
    address = device.allocate(4)
    device.fill(address, 0, 4)
    start = time.perf_counter()
    times = device.elapsed(lambda: run(device, address, 1, 1.0, "linger"), 4)
    wall = time.perf_counter() - start
    assert len(times) == 4
    assert all(1e-4 < seconds < 1e-2 for seconds in times)
    assert sum(times) < wall


def test_too_much_memory_is_refused_with_the_free_size_and_the_device_still_works(device):
    with pytest.raises(DeviceMemoryError, match=r"[GM]B are this model's"):
        device.allocate(2 * device.info.memory)
    address = device.allocate(4)
    device.fill(address, 0, 4)
    run(device, address, 1, 1.0)
    out = np.empty(1, np.float32)
    device.download(address, out)
    assert out[0] == 1


def test_an_invalid_access_is_reported_as_such(gpu):
    # In another process, since the context is unusable afterwards.
    code = """
import numpy as np
import test_driver as t
from edgelm.errors import DeviceError
device = t.CudaDevice(t.Source())
device.load(t.NAMES)
t.run(device, 64, 1, 1.0)
try:
    device.synchronize()
except DeviceError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in done.stdout, done.stderr
    assert "report it" in done.stdout
