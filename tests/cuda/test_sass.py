"""Does the executed machine code of a kernel compute what C++ says, and does its trace count what was executed?

Kernels are compiled by NVRTC as an export compiles them. Their integers, branches, loops, shuffles, shared memory and
barriers decide how many instructions are executed, so those are compared with Python's arithmetic.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import sass
from sass import Launched, Memory

from edgelm.runtimes.cuda.kernels import nvrtc

pytestmark = pytest.mark.skipif(
    sass.nvdisasm() is None and os.environ.get("CI") != "true", reason="nvdisasm is missing: pip install '.[dev]'"
)
SMS = (87, 90, 120)
OUT = 1 << 32


def ran(body: str, sm: int, *values: int, threads: int = 32, grid: int = 1, helpers: str = "") -> tuple[list, list]:
    """Run `body`, which writes `out[i]` of each thread i from the integers `v`; return results and traces."""
    source = (
        f"struct Args {{ int* out; int v[8]; }};\n{helpers}\n"
        f'extern "C" __global__ void kernel(Args args) {{ const int* v = args.v; int* out = args.out;\n'
        f"const int i = blockIdx.x * blockDim.x + threadIdx.x;\n{body}\n}}"
    )
    image = nvrtc.compile_kernels(source, {}, f"sm_{sm}", ["kernel"]).image
    code = sass.disassemble(image, sm)["kernel"]
    args = struct.pack("<Q8i", OUT, *values, *[0] * (8 - len(values)))
    launch = Launched((grid, 1, 1), threads, 4096, args)
    memory = Memory()
    traces = [
        trace for block in sass.iterate_blocks(launch.grid) for trace in sass.execute(code, launch, block, memory)
    ]
    words = np.frombuffer(memory.read(OUT, 4 * grid * threads), "<i4").tolist()
    return words, traces


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("divisor", [1, 3, 7, 132, 65537, -5])
def test_divisions_and_remainders_are_those_of_c(sm: int, divisor: int) -> None:
    found, _ = ran("out[i] = (i * 1234567 - 900) / v[0] * 16 + (i * 99991) % v[0];", sm, divisor)
    wrap = lambda x: (x + 2**31) % 2**32 - 2**31  # noqa: E731
    expected = []
    for i in range(32):
        number, other = wrap(i * 1234567 - 900), wrap(i * 99991)
        quotient = int(number / divisor)
        expected.append(wrap(quotient * 16 + other - int(other / divisor) * divisor))
    assert found == expected


@pytest.mark.parametrize("sm", SMS)
def test_long_multiplications_and_quotients_are_those_of_c(sm: int) -> None:
    body = "long long x = (long long)v[0] * v[1] * (i + 1); out[i] = int(x / v[2]) ^ int(x >> 33) ^ (int)(x % 1000003);"
    numbers = 1_000_003, 70_001, 123_457
    found, _ = ran(body, sm, *numbers)
    expected = []
    for i in range(32):
        x = numbers[0] * numbers[1] * (i + 1)
        value = (x // numbers[2]) ^ (x >> 33) ^ (x % 1000003)
        expected.append((value + 2**31) % 2**32 - 2**31)
    assert found == expected


@pytest.mark.parametrize("sm", SMS)
def test_divergent_lanes_take_their_own_paths_and_meet_again(sm: int) -> None:
    body = """
    int sum = 0;
    for (int j = 0; j < i; ++j) { if (j % 3 == v[0]) continue; if (j == v[1]) break; sum += j * v[2] + (sum & 7); }
    out[i] = sum + __shfl_xor_sync(0xffffffffu, sum, 5) + 1000 * __popc(__ballot_sync(0xffffffffu, sum > 40));"""
    found, _ = ran(body, sm, 1, 23, 3)
    sums = []
    for i in range(32):
        total = 0
        for j in range(i):
            if j % 3 == 1:
                continue
            if j == 23:
                break
            total += j * 3 + (total & 7)
        sums.append(total)
    above = sum(total > 40 for total in sums)
    assert found == [sums[i] + sums[i ^ 5] + 1000 * above for i in range(32)]


@pytest.mark.parametrize("sm", SMS)
def test_warps_meet_at_barriers_and_share_memory(sm: int) -> None:
    body = """
    extern __shared__ int shared[];
    shared[threadIdx.x] = i * i;
    for (int step = 1; step < 128; step *= 2) {
      __syncthreads();
      const int other = threadIdx.x >= step ? shared[threadIdx.x - step] : 0;
      __syncthreads();
      shared[threadIdx.x] += other;
    }
    __syncthreads();
    out[i] = shared[127 - threadIdx.x];"""
    found, traces = ran(body, sm, threads=128, grid=2)
    assert len(traces) == 8
    for block in range(2):
        sums = np.cumsum([i * i for i in range(128 * block, 128 * block + 128)]).tolist()
        assert found[128 * block : 128 * block + 128] == sums[::-1]


@pytest.mark.parametrize("sm", SMS)
def test_floats_atomics_and_bytes(sm: int) -> None:
    body = """
    extern __shared__ unsigned char bytes[];
    bytes[31 - i] = v[1] >> 8 * (i % 4);
    __syncthreads();
    const float x = i * 0.5f - v[0];
    const int before = i < 9 ? atomicAdd(out + 64, 5) : 0;
    out[i] = int(fmaxf(x, 1.25f) * 8.f) + (x > 2.f ? 100 : 0) + bytes[i] + __clz(i + 1) + before;"""
    found, _ = ran(body, sm, 3, 0x01020304)
    start = found[0] - (10 + 1 + 31)  # what the counter held
    for i in range(32):
        x = i * 0.5 - 3
        parts = int(max(x, 1.25) * 8), 100 * (x > 2), 1 + i % 4, 32 - (i + 1).bit_length()
        assert found[i] == sum(parts) + (start + 5 * i if i < 9 else 0)


def test_a_trace_counts_each_instruction_that_was_issued() -> None:
    _, few = ran("int s = 0; for (int j = 0; j < v[0]; ++j) s = s * 5 + (s >> 3) + j; out[i] = s;", 90, 100)
    _, many = ran("int s = 0; for (int j = 0; j < v[0]; ++j) s = s * 5 + (s >> 3) + j; out[i] = s;", 90, 300)
    assert few[0].counts.sum() == few[0].issued
    per_step = (many[0].issued - few[0].issued) / 200
    assert 3 <= per_step <= 8, "a step of this loop has about four instructions, and the loop's own"


def test_an_instruction_that_is_not_known_is_an_error_where_it_is_executed() -> None:
    body = 'if (v[0]) { unsigned x; asm volatile("mov.u32 %0, %%smid;" : "=r"(x)); out[i] = x; }'
    ran(body, 90, 0)
    with pytest.raises(sass.SassError, match="SMID"):
        ran(body, 90, 1)
