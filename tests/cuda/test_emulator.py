"""Does the emulator compute the same as a GPU, and does it find the mistakes that it should find?"""

import struct
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import DeviceError
from edgelm.quant import fp8
from edgelm.runtimes.cuda.device import Launch
from edgelm.runtimes.cuda.emulated import EmulatedDevice

_SOURCE = """
#include "device.cuh"
using namespace edgelm;
struct Args { void* x; const void* y; i32 n, m; };

// Reversed through shared memory, with or without the barrier that it needs.
template <bool barrier> EDGELM_BODY void reverse(const Args& args) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* x = static_cast<float*>(args.x);
  shared[thread()] = x[thread()];
  if (barrier) sync_block();
  x[thread()] = shared[args.n - 1 - thread()];
}
EDGELM_KERNEL(reverse_right, Args, 128, 1, reverse<true>)
EDGELM_KERNEL(reverse_wrong, Args, 128, 1, reverse<false>)

template <int pending> EDGELM_BODY void copied(const Args& args) {
  cp_async16(shared_memory() + 16 * thread(), static_cast<const u8*>(args.y) + 16 * thread(), thread() != 3);
  cp_async_commit();
  cp_async_wait<pending>();
  store16(static_cast<u8*>(args.x) + 16 * thread(), load16(shared_memory() + 16 * thread()));
}
EDGELM_KERNEL(copy_waited, Args, 32, 1, copied<0>)
EDGELM_KERNEL(copy_not_waited, Args, 32, 1, copied<1>)

EDGELM_BODY void parted(const Args&) {
  if (thread() < 16) sync_block();
}
EDGELM_KERNEL(parted_warp, Args, 32, 1, parted)
EDGELM_BODY void parted2(const Args&) {
  if (thread() < 32) sync_block();
}
EDGELM_KERNEL(parted_block, Args, 64, 1, parted2)
EDGELM_BODY void beyond(const Args& args) { shared_memory()[args.n] = 1; }
EDGELM_KERNEL(beyond_shared, Args, 32, 1, beyond)
EDGELM_BODY void beyond2(const Args& args) { static_cast<u8*>(args.x)[args.n] = 1; }
EDGELM_KERNEL(beyond_buffer, Args, 32, 1, beyond2)
EDGELM_BODY void crooked(const Args& args) { store16(static_cast<u8*>(args.x) + 8, {}); }
EDGELM_KERNEL(crooked_store, Args, 32, 1, crooked)

// c [16, 8] = a [16, 16] b [16, 8] (given transposed), through ldmatrix.
template <class A> EDGELM_BODY void multiplied(const Args& args) {
  u16* shared = reinterpret_cast<u16*>(shared_memory());
  const u16* from = static_cast<const u16*>(args.y);
  for (int i = thread(); i < 24 * 16; i += 32) shared[i] = from[i];
  sync_warp();
  const int lane = thread(), g = lane / 4, q = lane % 4;
  u32 a[4], other[4], b[2];
  ldmatrix_x4(a, shared + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4(other, shared + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  b[0] = other[0];
  b[1] = other[1];
  float d[4] = {};
  mma_16x8x16<A>(d, a, b);
  float* c = static_cast<float*>(args.x);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}
EDGELM_KERNEL(mma_bf16, Args, 32, 1, multiplied<bf16>)
EDGELM_KERNEL(mma_f16, Args, 32, 1, multiplied<f16>)

EDGELM_BODY void from_codes(const Args& args) {
  const u8* codes = static_cast<const u8*>(args.y);
  float* x = static_cast<float*>(args.x);
  for (int i = thread(); i < args.n; i += 32) {
    float pair[2];
    unpack2<f16>(e4m3x2_to_f16x2(codes[i] | codes[i] << 8), pair[0], pair[1]);
    x[2 * i] = to_float(e4m3{codes[i]});
    x[2 * i + 1] = pair[1];
  }
}
EDGELM_KERNEL(e4m3_values, Args, 32, 1, from_codes)
EDGELM_BODY void to_codes(const Args& args) {
  const float* x = static_cast<const float*>(args.y);
  for (int i = thread(); i < args.n; i += 32) {
    static_cast<u8*>(args.x)[i] = args.m ? from_float<e4m3>(x[i]).bits : float_to_e4m3_bits(x[i]);
  }
}
EDGELM_KERNEL(e4m3_codes, Args, 32, 1, to_codes)
template <class A> EDGELM_BODY void rounded(const Args& args) {
  const float* x = static_cast<const float*>(args.y);
  for (int i = thread(); i < args.n; i += 32) static_cast<u16*>(args.x)[i] = from_float<A>(x[i]).bits;
}
EDGELM_KERNEL(round_bf16, Args, 32, 1, rounded<bf16>)
EDGELM_KERNEL(round_f16, Args, 32, 1, rounded<f16>)
"""
_NAMES = [line.split("(")[1].split(",")[0] for line in _SOURCE.splitlines() if line.startswith("EDGELM_KERNEL")]
_CACHE = Path(__file__).parents[2] / "build" / "emulated"


def _device(seed: int = 0, capability: tuple[int, int] = (8, 0)) -> EmulatedDevice:
    device = EmulatedDevice(capability, seed, _CACHE)
    device.load_source(_NAMES, _SOURCE)
    return device


def _run(device, name, out, given=None, n=0, m=0, block=32, shared=4096):
    """Run a kernel on copies of `out` and `given`; return the changed `out`."""
    x, y = device.allocate(out.nbytes), device.allocate(0 if given is None else given.nbytes)
    device.upload(x, out)
    if given is not None:
        device.upload(y, given)
    device.launch(Launch(name, (1, 1, 1), block, shared, struct.pack("<QQii", x, y, n, m)))
    found = out.copy()
    device.download(x, found)
    device.free(x)
    device.free(y)
    return found


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_barrier_makes_shared_memory_visible(seed):
    x = np.arange(128, dtype=np.float32)
    assert (_run(_device(seed), "reverse_right", x, n=128, block=128) == x[::-1]).all()


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_missing_barrier_gives_a_wrong_result(seed):
    x = np.arange(128, dtype=np.float32)
    assert (_run(_device(seed), "reverse_wrong", x, n=128, block=128) != x[::-1]).any()


def test_a_copy_that_was_not_waited_for_has_not_arrived():
    given = np.arange(128, dtype=np.float32)
    right = given.copy()
    right[12:16] = 0  # thread 3 asks for zeros
    assert (_run(_device(), "copy_waited", np.zeros(128, np.float32), given) == right).all()
    assert np.isnan(_run(_device(), "copy_not_waited", np.zeros(128, np.float32), given)).all()


@pytest.mark.parametrize(
    ("name", "block", "n", "message"),
    [
        ("parted_warp", 32, 0, "have diverged"),
        ("parted_block", 64, 0, "32 of 64 threads reached a barrier"),
        ("beyond_shared", 32, 4096, "wrote beyond its 4096 bytes of shared memory"),
        ("crooked_store", 32, 0, "no multiple of 16"),
        ("beyond_buffer", 32, 64, "wrote behind the buffer of 64 bytes"),
        ("beyond_buffer", 32, -1, "wrote before the buffer of 64 bytes"),
        ("reverse_right", 256, 0, "launched with 256 threads, compiled for 128"),
    ],
)
def test_what_would_go_wrong_on_a_gpu_is_an_error_here(name, block, n, message):
    device = _device()
    with pytest.raises(DeviceError, match=message):
        _run(device, name, np.zeros(16, np.float32), n=n, block=block)


def test_arguments_of_another_size_are_refused():
    with pytest.raises(DeviceError, match="its arguments are 24 bytes, given were 8"):
        _device().launch(Launch("parted_warp", (1, 1, 1), 32, 0, bytes(8)))


def test_a_kernel_that_was_not_loaded_is_named():
    with pytest.raises(DeviceError, match="kernel nothing was not loaded"):
        _device().launch(Launch("nothing", (1, 1, 1), 32, 0, b""))


def _bits(values, kind):
    return (
        values.astype(np.float16).view(np.uint16) if kind == "f16" else (values.view(np.uint32) >> 16).astype(np.uint16)
    )


def _values(bits, kind):
    return (
        bits.view(np.float16).astype(np.float64)
        if kind == "f16"
        else ((bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    )


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_tensor_core_mma_takes_its_operands_from_where_ptx_says(kind):
    values = np.random.default_rng(5).standard_normal((24, 16)).astype(np.float32)
    bits = _bits(values, kind)
    found = _run(_device(), f"mma_{kind}", np.zeros((16, 8), np.float32), bits)
    exact = _values(bits, kind)
    np.testing.assert_allclose(found, exact[:16] @ exact[16:].T, rtol=1e-6, atol=1e-6)


def test_every_code_of_fp8_has_its_value():
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    found = _run(_device(), "e4m3_values", np.zeros((codes.size, 2), np.float32), codes, n=codes.size)
    assert (found == fp8.decode(codes)[:, None]).all()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_fp8_rounds_to_nearest_even_and_saturates(capability):
    random = np.random.default_rng(6)
    table = np.sort(np.unique(fp8.decode(np.arange(0x7F, dtype=np.uint8))))
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    x = np.concatenate([table, middles, np.nextafter(middles, 1000), np.nextafter(middles, 0), [448, 463, 465, 1e9]])
    x = np.concatenate([x, -x, random.standard_normal(1000) * 10.0 ** random.integers(-4, 3, 1000)]).astype(np.float32)
    found = _run(_device(capability=capability), "e4m3_codes", np.zeros(x.size, np.uint8), x, n=x.size, m=1)
    assert (fp8.decode(found) == fp8.decode(fp8.encode(x))).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_to_16_bits_is_to_nearest_even(kind):
    import torch

    random = np.random.default_rng(7)
    x = random.standard_normal(4000).astype(np.float32) * 10.0 ** random.integers(-8, 6, 4000).astype(np.float32)
    found = _run(_device(), f"round_{kind}", np.zeros(x.size, np.uint16), x, n=x.size)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    assert (found == torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)).all()
