// CPU emulation of the primitives of device.cuh. The threads of a block are fibers of one host thread.
//
// A fiber runs until it reaches an operation that other threads take part in: a barrier, or a shuffle or mma of its
// warp. The operation is carried out when all of them have reached it. Where hardware leaves an order open, the
// emulator picks an unfavourable one, so that a missing barrier or wait shows up as a wrong result:
//   - warps run one after the other, each as far as it can, in an order that a seed changes (0: first to last,
//     1: last to first, others: shuffled anew at every barrier);
//   - cp_async copies when it is waited for, not before; where warps are shuffled, some copies are made at once, and
//     some read at once and write when they are waited for;
//   - shared memory begins as NaNs, with a canary behind it; vector accesses must be aligned.
// This file is what kernels need: it is compiled with each of them, so it includes little. emulator_blocks.h, which is
// compiled once, runs the blocks.
//
// The emulation checks the algorithm. It does not check speed, memory order between blocks, or PTX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define EDGELM_DEVICE [[maybe_unused]] static inline
#define EDGELM_INLINE inline
#define EDGELM_BODY static
#define EDGELM_UNROLL
#define EDGELM_UNROLL_BY(n)

#define EDGELM_KERNEL(name, Args, threads, min_blocks, ...)                                                            \
  static void name##_run(const void* args) { __VA_ARGS__(*static_cast<const Args*>(args)); }                           \
  static const edgelm::emulator::Register name##_registered(#name, name##_run, sizeof(Args), threads);

namespace edgelm {
namespace emulator {

// Makes a kernel known to edgelm_emulated_launch.
struct Register { Register(const char* name, void (*run)(const void*), size_t args, int threads); };

enum class Waits : int { kNothing, kShuffle, kBallot, kMma, kMmaFp8, kLdmatrix, kWarp, kBlock, kDone };

// What the running thread sees of its launch.
struct State {
  int threads = 0, current = 0;
  int block[3] = {}, grid[3] = {};
  u8* shared = nullptr;
  const u8* prefetched[2] = {};  // the lowest and the highest address that the launch requested for the L2 cache
};
extern State state;

// Stop the running thread until all threads that take part have reached this operation and it is carried out.
void wait(Waits what, void* slot = nullptr);

// End the launch with an error.
[[noreturn]] void fail(const char* what);
[[noreturn]] void fail_unaligned(const char* what, int bytes);

// The copies of cp_async. `from` is read, and `to` is written, at the latest when the copy is waited for.
void copy16(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// -- what a warp does together -----------------------------------------------------------------------------------------

struct Shuffle {
  u32 value;
  int source;
  u32 result;
};
struct Ballot {
  bool value;
  u32 result;
};
struct Mma {
  float* d;
  const u32* a;
  const u32* b;
  float (*element)(u16);
};
struct Ldmatrix {
  u32* r;
  const u8* row;
  bool transposed;
};

inline float f16_value(u16 x) {
  const u32 sign = u32(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(mantissa) * 0x1p-24f;
  const u32 bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float bf16_value(u16 x) {
  const u32 bits = u32(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float e4m3_value(u8 x) { return f16_value(u16((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256.f; }

}  // namespace emulator

// -- the primitives of device.cuh --------------------------------------------------------------------------------------

EDGELM_DEVICE int thread() { return emulator::state.current; }
EDGELM_DEVICE int thread_index() { return thread(); }
EDGELM_DEVICE int block_threads() { return emulator::state.threads; }
EDGELM_DEVICE int block_x() { return emulator::state.block[0]; }
EDGELM_DEVICE int block_y() { return emulator::state.block[1]; }
EDGELM_DEVICE int block_z() { return emulator::state.block[2]; }
EDGELM_DEVICE int grid_x() { return emulator::state.grid[0]; }
EDGELM_DEVICE int grid_y() { return emulator::state.grid[1]; }
EDGELM_DEVICE int grid_z() { return emulator::state.grid[2]; }
EDGELM_DEVICE u8* shared_memory() { return emulator::state.shared; }
EDGELM_DEVICE void sync_block() { emulator::wait(emulator::Waits::kBlock); }
EDGELM_DEVICE void sync_warp() { emulator::wait(emulator::Waits::kWarp); }
EDGELM_DEVICE void wait_for_previous_kernel() {}
EDGELM_DEVICE void let_next_kernel_start() {}

namespace emulator {
template <class T> inline T shuffled(T x, int source) {
  Shuffle slot;
  static_assert(sizeof(T) == 4, "32 bits");
  std::memcpy(&slot.value, &x, 4);
  slot.source = source;
  wait(Waits::kShuffle, &slot);
  std::memcpy(&x, &slot.result, 4);
  return x;
}
inline void aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail_unaligned(what, bytes);
}
template <class T> inline T loaded(const void* p, const char* what) {
  aligned(p, sizeof(T), what);
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class T> inline void stored(void* p, T x, const char* what) {
  aligned(p, sizeof(T), what);
  std::memcpy(p, &x, sizeof(T));
}
// A prefetch changes nothing. The caller of a launch may ask for its range, to check it.
inline void prefetched(const void* p) {
  const u8* at = static_cast<const u8*>(p);
  const u8*(&range)[2] = state.prefetched;
  if (range[0] == nullptr || at < range[0]) range[0] = at;
  if (at > range[1]) range[1] = at;
}
inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline u16 bf16_bits(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 f16_bits(float x) {
  const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return u16(sign | 0x7c00);
  if (magnitude < 0x38800000u) return u16(sign | u16(__builtin_nearbyintf(float_of(magnitude) * 0x1p24f)));
  return u16(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}
}  // namespace emulator

EDGELM_DEVICE int own_lane() { return thread() % 32; }
EDGELM_DEVICE float shuffle_xor(float x, int mask) { return emulator::shuffled(x, own_lane() ^ mask); }
EDGELM_DEVICE int shuffle_xor(int x, int mask) { return emulator::shuffled(x, own_lane() ^ mask); }
EDGELM_DEVICE float shuffle(float x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE int shuffle(int x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE u32 shuffle(u32 x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE int shuffle_up(int x, int delta) {
  return emulator::shuffled(x, own_lane() < delta ? own_lane() : own_lane() - delta);
}
EDGELM_DEVICE u32 ballot(bool x) {
  emulator::Ballot slot{x, 0};
  emulator::wait(emulator::Waits::kBallot, &slot);
  return slot.result;
}
EDGELM_DEVICE int warp_max(int x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
EDGELM_DEVICE int warp_sum(int x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class A> EDGELM_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Mma slot{d, a, b, Same<A, bf16>::value ? emulator::bf16_value : emulator::f16_value};
  emulator::wait(emulator::Waits::kMma, &slot);
}
#ifdef EDGELM_HAS_FP8
EDGELM_DEVICE void mma_16x8x32_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Mma slot{d, a, b, nullptr};
  emulator::wait(emulator::Waits::kMmaFp8, &slot);
}
#endif
EDGELM_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  emulator::aligned(row, 16, "ldmatrix of a row");
  emulator::Ldmatrix slot{r, static_cast<const u8*>(row), false};
  emulator::wait(emulator::Waits::kLdmatrix, &slot);
}
EDGELM_DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
  emulator::aligned(row, 16, "ldmatrix of a row");
  emulator::Ldmatrix slot{r, static_cast<const u8*>(row), true};
  emulator::wait(emulator::Waits::kLdmatrix, &slot);
}

using Shared = u8*;
EDGELM_DEVICE Shared shared_address(u8* shared) { return shared; }
EDGELM_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  emulator::aligned(shared, 16, "cp_async16 to shared memory");
  if (valid) emulator::aligned(global, 16, "cp_async16 from global memory");
  emulator::copy16(shared, global, valid);
}
EDGELM_DEVICE void cp_async_commit() { emulator::commit_copies(); }
template <int pending> EDGELM_DEVICE void cp_async_wait() { emulator::wait_for_copies(pending); }

EDGELM_DEVICE Words4 load16(const void* p) { return emulator::loaded<Words4>(p, "load16"); }
EDGELM_DEVICE Words4 load16_stream(const void* p) { return emulator::loaded<Words4>(p, "load16_stream"); }
EDGELM_DEVICE Words2 load8(const void* p) { return emulator::loaded<Words2>(p, "load8"); }
EDGELM_DEVICE u32 load4(const void* p) { return emulator::loaded<u32>(p, "load4"); }
EDGELM_DEVICE Words4 load16_shared(Shared p) { return emulator::loaded<Words4>(p, "load16_shared"); }
EDGELM_DEVICE u32 load4_shared(Shared p) { return emulator::loaded<u32>(p, "load4_shared"); }
EDGELM_DEVICE u32 load2_shared(Shared p) { return emulator::loaded<u16>(p, "load2_shared"); }
EDGELM_DEVICE u32 load1_shared(Shared p) { return *p; }
EDGELM_DEVICE void store16(void* p, Words4 x) { emulator::stored(p, x, "store16"); }
EDGELM_DEVICE void store8(void* p, Words2 x) { emulator::stored(p, x, "store8"); }
EDGELM_DEVICE void store4(void* p, u32 x) { emulator::stored(p, x, "store4"); }
EDGELM_DEVICE void prefetch_l2(const void* p) { emulator::prefetched(p); }
EDGELM_DEVICE int atomic_add(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
EDGELM_DEVICE void fence_device() {}

EDGELM_DEVICE u32 float_to_bits(float x) { return emulator::bits_of(x); }
EDGELM_DEVICE float bits_to_float(u32 x) { return emulator::float_of(x); }
EDGELM_DEVICE float max_(float a, float b) { return __builtin_fmaxf(a, b); }
EDGELM_DEVICE float min_(float a, float b) { return __builtin_fminf(a, b); }
EDGELM_DEVICE int max_(int a, int b) { return a > b ? a : b; }
EDGELM_DEVICE int min_(int a, int b) { return a < b ? a : b; }
EDGELM_DEVICE float abs_(float a) { return __builtin_fabsf(a); }
EDGELM_DEVICE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EDGELM_DEVICE float multiply_rounded(float a, float b) { return a * b; }
EDGELM_DEVICE float round_(float a) { return __builtin_nearbyintf(a); }
EDGELM_DEVICE float exp_(float a) { return __builtin_expf(a); }
EDGELM_DEVICE float exp_fast(float a) { return __builtin_expf(a); }
EDGELM_DEVICE float exp2_fast(float a) { return __builtin_exp2f(a); }
EDGELM_DEVICE float rsqrt_(float a) { return 1.f / __builtin_sqrtf(a); }
EDGELM_DEVICE bool is_nan(float a) { return a != a; }
EDGELM_DEVICE int count_bits(u32 x) { return __builtin_popcount(x); }
EDGELM_DEVICE int lowest_bit(u32 x) { return __builtin_ctz(x); }
EDGELM_DEVICE float f16_to_float(u16 x) { return emulator::f16_value(x); }
EDGELM_DEVICE u32 float_to_bf16x2(float low, float high) {
  return u32(emulator::bf16_bits(low)) | u32(emulator::bf16_bits(high)) << 16;
}
EDGELM_DEVICE u32 float_to_f16x2(float low, float high) {
  return u32(emulator::f16_bits(low)) | u32(emulator::f16_bits(high)) << 16;
}
namespace emulator {
// Computed exactly in double, then rounded once.
template <float (*value)(u16), u16 (*bits)(float)> inline u32 fma_pairs(u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int half = 0; half < 2; ++half) {
    const int shift = 16 * half;
    const double sum = double(value(u16(a >> shift))) * value(u16(b >> shift)) + value(u16(c >> shift));
    result |= u32(bits(float(sum))) << shift;
  }
  return result;
}
}  // namespace emulator
EDGELM_DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) {
  return emulator::fma_pairs<emulator::f16_value, emulator::f16_bits>(a, b, c);
}
EDGELM_DEVICE u32 f16x2_multiply(u32 a, u32 b) { return f16x2_fma(a, b, 0x80008000u); }
EDGELM_DEVICE u32 bf16x2_fma(u32 a, u32 b, u32 c) {
  return emulator::fma_pairs<emulator::bf16_value, emulator::bf16_bits>(a, b, c);
}
EDGELM_DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
EDGELM_DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= u32(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
#ifdef EDGELM_HAS_FP8
EDGELM_DEVICE u8 float_to_e4m3_bits(float x);
EDGELM_DEVICE u32 float_to_e4m3x2(float low, float high) {
  return u32(float_to_e4m3_bits(low)) | u32(float_to_e4m3_bits(high)) << 8;
}
#endif
EDGELM_DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  return u32(emulator::f16_bits(emulator::e4m3_value(u8(pair)))) |
         u32(emulator::f16_bits(emulator::e4m3_value(u8(pair >> 8)))) << 16;
}

}  // namespace edgelm
