// The primitives that the CUDA kernels are written in: thread indices, barriers, shuffles, tensor-core mma, copies and
// conversions.
//
// There are two implementations. NVRTC (or nvcc) compiles the kernels with device_cuda.cuh, in CUDA and PTX. With
// EDGELM_EMULATED the same kernels are compiled for the CPU, where emulator.h runs the threads of a block as fibers, so
// that arithmetic, barriers and copies can be tested without a GPU. This file includes no header of CUDA or of the
// standard library, so that NVRTC alone can compile it.
//
// A kernel is a function template of one struct:
//
//     template <class A, int N>
//     EDGELM_BODY void scale(const ScaleArgs& args) { ... }
//     EDGELM_KERNEL(scale_bf16_4, ScaleArgs, 256, 1, scale<bf16, 4>)
//
// 256 is the number of threads per block (blocks have one dimension). 1 is the number of blocks that must fit on a
// multiprocessor, which limits the registers per thread.
#pragma once

#include "types.cuh"

namespace edgelm {

struct alignas(8) Words2 { u32 x, y; };
struct alignas(16) Words4 { u32 x, y, z, w; };

template <class T, class U> struct Same { static constexpr bool value = false; };
template <class T> struct Same<T, T> { static constexpr bool value = true; };

constexpr int kWarp = 32;

}  // namespace edgelm

#ifdef EDGELM_EMULATED
#include "emulator.h"
#else
#include "device_cuda.cuh"
#endif

namespace edgelm {

EDGELM_DEVICE int divide(int x, Divisor by) { return int(u64(u32(x)) * by.factor >> by.shift); }

// -- conversions -------------------------------------------------------------------------------------------------------

EDGELM_DEVICE float to_float(float x) { return x; }
EDGELM_DEVICE float to_float(bf16 x) { return bits_to_float(u32(x.bits) << 16); }
EDGELM_DEVICE float to_float(f16 x) { return f16_to_float(x.bits); }

template <class T> struct From;
template <> struct From<float> {
  static EDGELM_INLINE float of(float x) { return x; }
};
template <> struct From<bf16> {
  static EDGELM_INLINE bf16 of(float x) { return {u16(float_to_bf16x2(x, 0.f))}; }
};
template <> struct From<f16> {
  static EDGELM_INLINE f16 of(float x) { return {u16(float_to_f16x2(x, 0.f))}; }
};

// Round to nearest, ties to even. float16 becomes infinite beyond 65504.
template <class T> EDGELM_DEVICE T from_float(float x) { return From<T>::of(x); }

// Pack two neighbouring numbers into one word, the first in the low half.
template <class A> EDGELM_DEVICE u32 pack2(float low, float high) {
  static_assert(Same<A, bf16>::value || Same<A, f16>::value, "pairs are of 16-bit numbers");
  if constexpr (Same<A, bf16>::value) return float_to_bf16x2(low, high);
  else return float_to_f16x2(low, high);
}

template <class A> EDGELM_DEVICE void unpack2(u32 pair, float& low, float& high) {
  if constexpr (Same<A, bf16>::value) {
    low = bits_to_float(pair << 16);
    high = bits_to_float(pair & 0xffff0000u);
  } else {
    low = f16_to_float(u16(pair));
    high = f16_to_float(u16(pair >> 16));
  }
}

// E4M3 to float, exact for every finite code: its exponent is 8 less than float16's for the same bits and its
// subnormals are float16's, so shift into place and multiply by 2^8. (The two NaN codes give 480; weights and caches
// have none.)
EDGELM_DEVICE float to_float(e4m3 x) { return f16_to_float(u16((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)) * 256.f; }

// Round to nearest, ties to even, saturating at 448, as cvt.rn.satfinite does. In integers, for devices without it.
EDGELM_DEVICE u8 float_to_e4m3_bits(float x) {
  const u32 bits = float_to_bits(x);
  const u32 sign = bits >> 24 & 0x80;
  const u32 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return u8(sign | 0x7f);
  if (magnitude >= 0x43e80000u) return u8(sign | 0x7e);  // 464, halfway to what would follow 448, and more
  if (magnitude < 0x3c800000u) {                         // below 2^-6: multiples of 2^-9
    const float steps = bits_to_float(magnitude) * 512.f + 8388608.f;  // the addition rounds to an integer
    return u8(sign | (float_to_bits(steps) & 0xff));
  }
  const u32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
  return u8(sign | ((rounded >> 20) - (120u << 3)));
}

template <> struct From<e4m3> {
  static EDGELM_INLINE e4m3 of(float x) {
#ifdef EDGELM_HAS_FP8
    return {u8(float_to_e4m3x2(x, 0.f))};
#else
    return {float_to_e4m3_bits(x)};
#endif
  }
};

// -- sums over a warp and a block --------------------------------------------------------------------------------------

EDGELM_DEVICE float warp_sum(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

EDGELM_DEVICE float warp_max(float x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max_(x, shuffle_xor(x, mask));
  return x;
}

// Sum over all threads of a block (a multiple of 32); `scratch` is shared memory of one float per warp. Every thread
// gets the result, and all have passed a barrier after reading it.
EDGELM_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warps = block_threads() / kWarp;
  if (thread() % kWarp == 0) scratch[thread() / kWarp] = x;
  sync_block();
  float total = 0.f;
  for (int i = 0; i < warps; ++i) total += scratch[i];
  sync_block();
  return total;
}

}  // namespace edgelm
