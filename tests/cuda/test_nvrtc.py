"""Does NVRTC compile for every device without a GPU, and does reading a cubin agree with the compiler's report?"""

from __future__ import annotations

import re
import struct
import threading

import pytest

from edgelm.errors import BundleError, DeviceError, ExportError
from edgelm.installing import install_hint
from edgelm.runtimes.cuda.kernels import cubin, nvrtc

TARGETS = (*(f"sm_{sm}" for sm in nvrtc.SMS), nvrtc.PTX_TARGET)
HEADERS = {"args.h": "struct Args { const float* x; float* y; int n; };"}
# Kernels: a simple one; one with 400 bytes of shared memory; one that spills registers; one with an array that is
# indexed at run time; one that calls a function with such an array.
SOURCE = """
#include "args.h"
#define KERNEL(name, threads) \\
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args a)

KERNEL(plain, 128) { a.y[threadIdx.x] = a.x[threadIdx.x] + 1; }

KERNEL(shares, 128) {
  __shared__ float s[100];
  s[threadIdx.x] = a.x[threadIdx.x];
  __syncthreads();
  a.y[threadIdx.x] = s[99 - threadIdx.x];
}

KERNEL(spills, 1024) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; i++) v[i] = a.x[i * a.n + threadIdx.x];
  for (int i = 0; i < a.n; i++)
#pragma unroll
    for (int j = 0; j < 96; j++) v[j] = v[j] * v[(j * 7 + 3) % 96];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 96; i++) sum += v[i];
  a.y[threadIdx.x] = sum;
}

KERNEL(indexes, 128) {
  float v[64];
  for (int i = 0; i < 64; i++) v[i] = a.x[i];
  for (int i = 0; i < a.n; i++) v[i & 63] += v[(i * 7) & 63];
  a.y[threadIdx.x] = v[a.n & 63];
}

__device__ __noinline__ float helper(const float* x, int n) {
  float v[32];
  for (int i = 0; i < 32; i++) v[i] = x[i];
  for (int i = 0; i < n; i++) v[i & 31] += v[(i * 7) & 31];
  return v[n & 31];
}
KERNEL(calls, 128) { a.y[threadIdx.x] = helper(a.x + threadIdx.x, a.n); }
"""
NAMES = ("plain", "shares", "spills", "indexes", "calls")


def test_the_pinned_versions_are_installed_and_each_device_gets_the_oldest_that_knows_it():
    assert {target: nvrtc.load(target).version for target in TARGETS} == {
        **dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", nvrtc.PTX_TARGET), (12, 6)),
        **dict.fromkeys(("sm_100", "sm_110", "sm_120"), (13, 0)),
    }


def test_a_named_library_compiles_for_every_target_that_it_knows(monkeypatch):
    path = nvrtc.load("sm_120").path
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, path)
    assert {nvrtc.load(target).path for target in TARGETS} == {path}
    assert nvrtc.compile_kernels(SOURCE, HEADERS, "sm_86", NAMES).compiler == (13, 0)
    monkeypatch.delenv(nvrtc.LIBRARY_VARIABLE)
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, nvrtc.load("sm_80").path)
    with pytest.raises(
        ExportError, match=r"no NVRTC here compiles for sm_110: 12\.6 does for SM 50, .*; .*pip install"
    ):
        nvrtc.compile_kernels(SOURCE, HEADERS, "sm_110", NAMES)


def test_libraries_that_are_too_old_are_no_choice(monkeypatch):
    monkeypatch.delenv(nvrtc.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(nvrtc, "OLDEST", (13, 0))
    nvrtc._installed.cache_clear()
    assert [library.version for library in nvrtc.installed()] == [(13, 0)]
    monkeypatch.setattr(nvrtc, "OLDEST", (14, 0))
    nvrtc._installed.cache_clear()
    with pytest.raises(DeviceError, match=r"libnvrtc\.so\.1\d is of version 1\d\.\d, and 14\.0 or newer is needed"):
        nvrtc.installed()
    nvrtc._installed.cache_clear()


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_in_the_image_with_the_size_of_its_arguments(target):
    compiled = nvrtc.compile_kernels(SOURCE, HEADERS, target, NAMES)
    assert compiled.argument_bytes == dict.fromkeys(NAMES, 24)  # 8 + 8 + 4, rounded to 8
    assert compiled.log == ""
    if target == nvrtc.PTX_TARGET:
        assert b".target sm_80" in compiled.image
        assert b".version 8.5" in compiled.image
        assert not compiled.resources
    else:
        assert cubin.architecture(compiled.image) == int(target.removeprefix("sm_"))


@pytest.mark.parametrize("target", TARGETS[:-1])
def test_registers_stack_and_shared_memory_are_what_the_compiler_says(target):
    compiled = nvrtc.compile_kernels(SOURCE, HEADERS, target, NAMES, options=["--ptxas-options=-v"])
    said = {}
    for part in compiled.log.split("Compiling entry function '")[1:]:
        stack, shared = re.search(r"(\d+) bytes cumulative stack", part), re.search(r"(\d+) bytes smem", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        said[part.partition("'")[0]] = (
            int(registers[1]),
            int(stack[1]) if stack else 0,
            int(shared[1]) if shared else 0,
        )
    found = {name: (r.registers, r.local_bytes, r.shared_bytes) for name, r in compiled.resources.items()}
    assert found == said
    assert set(said) == set(NAMES)
    # The no-spill check must find the last three and pass the first two.
    assert [found[name][1] > 0 for name in NAMES] == [False, False, True, True, True]
    assert found["shares"][2] == 400


def test_the_same_source_gives_the_same_image_also_from_threads_at_the_same_time():
    targets = ["sm_80", "sm_120", "sm_80", "sm_120"]
    images: dict[int, bytes] = {}

    def compile_one(number: int) -> None:
        images[number] = nvrtc.compile_kernels(SOURCE, HEADERS, targets[number], NAMES).image

    workers = [threading.Thread(target=compile_one, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert images[0] == images[2] == nvrtc.compile_kernels(SOURCE, HEADERS, "sm_80", NAMES).image
    assert images[1] == images[3] != images[0]


def test_an_error_in_the_source_shows_its_first_line_and_the_kernels():
    headers = {"args.h": "struct Args { const float* x;\n int wrong wrong; };"}
    with pytest.raises(ExportError) as caught:
        nvrtc.compile_kernels(SOURCE, headers, "sm_90", NAMES)
    said = str(caught.value)
    assert said.startswith("args.h(2): error:")
    assert "kernels plain, shares, spills, indexes and 1 more for sm_90, by NVRTC 12.6" in said
    assert "\n" not in said


def test_an_instruction_that_the_device_lacks_is_an_error_too():
    source = 'extern "C" __global__ void f() { asm volatile("griddepcontrol.wait;"); }'
    with pytest.raises(ExportError, match=r"requires .target sm_90 or higher \(kernel f for sm_80, by NVRTC 12.6\)"):
        nvrtc.compile_kernels(source, {}, "sm_80", ["f"])


def test_a_kernel_that_the_source_lacks_is_named():
    with pytest.raises(ExportError, match="has no kernel absent"):
        nvrtc.compile_kernels(SOURCE, HEADERS, "sm_80", [*NAMES, "absent"])


@pytest.mark.parametrize("target", ["sm_91", "sm_101", "compute_75x", "nonsense"])
def test_an_unknown_device_is_refused_with_the_known_ones(target):
    known = r"12\.6 does for SM 50, .*, 90 \(.*\), 13\.0 does for SM 75, .* \(.*libnvrtc\.so\.13\)"
    said = rf"no NVRTC here compiles for {target}: {known}$"
    with pytest.raises(ExportError, match=said):
        nvrtc.compile_kernels(SOURCE, HEADERS, target, NAMES)


def test_without_nvrtc_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv(nvrtc.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(nvrtc, "candidates", lambda: ([str(tmp_path / "libnvrtc.so.13")], []))
    nvrtc._installed.cache_clear()
    with pytest.raises(DeviceError, match=f"was not found .*: {re.escape(install_hint('gpu-export'))}"):
        nvrtc.load("sm_80")


def test_a_library_that_is_no_nvrtc_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, str(tmp_path / "nothing.so"))
    with pytest.raises(DeviceError, match=r"EDGELM_NVRTC=.*nothing.so: not an NVRTC library"):
        nvrtc.load("sm_80")


def test_damaged_cubins_are_an_error_and_never_a_wrong_answer():
    image = nvrtc.compile_kernels(SOURCE, HEADERS, "sm_86", NAMES).image
    for wrong in (b"", b"// PTX", image[:200], image[: len(image) // 2], b"\x7fELF" + bytes(100)):
        with pytest.raises(BundleError, match="cubin"):
            cubin.resources(wrong)
    elsewhere = bytearray(image)
    struct.pack_into("<Q", elsewhere, 40, 1 << 40)  # offset of the section table
    with pytest.raises(BundleError, match="damaged"):
        cubin.resources(bytes(elsewhere))
