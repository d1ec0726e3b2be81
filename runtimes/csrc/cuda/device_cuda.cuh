// The primitives of device.cuh in CUDA and PTX, for compute capability 8.0 and newer.
#pragma once

#define EDGELM_INLINE __device__ __forceinline__
#define EDGELM_DEVICE static __device__ __forceinline__
#define EDGELM_BODY static __device__ __forceinline__
#define EDGELM_UNROLL _Pragma("unroll")
#define EDGELM_UNROLL_BY(n) EDGELM_PRAGMA(unroll n)
#define EDGELM_PRAGMA(x) _Pragma(#x)

// The launch passes the struct by value; it is read from constant memory.
#define EDGELM_KERNEL(name, Args, threads, min_blocks, ...)                                                            \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ Args args) {          \
    __VA_ARGS__(args);                                                                                                 \
  }

#if __CUDA_ARCH__ >= 890
#define EDGELM_HAS_FP8 1  // FP8 conversions and mma
#endif

namespace edgelm {

// -- where a thread is -------------------------------------------------------------------------------------------------

EDGELM_DEVICE int thread() {
  const int found = threadIdx.x;
  __builtin_assume(found >= 0 && found < 1024);  // else a division of it needs a correction for negative numbers
  return found;
}
// The same without that assumption, for kernels in which it costs registers that spill.
EDGELM_DEVICE int thread_index() { return threadIdx.x; }
// The thread within its warp. Read once: the compiler keeps it, and does not compute it again from the thread.
EDGELM_DEVICE int own_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
EDGELM_DEVICE int block_threads() { return blockDim.x; }
EDGELM_DEVICE int block_x() { return blockIdx.x; }
EDGELM_DEVICE int block_y() { return blockIdx.y; }
EDGELM_DEVICE int block_z() { return blockIdx.z; }
EDGELM_DEVICE int grid_x() { return gridDim.x; }
EDGELM_DEVICE int grid_y() { return gridDim.y; }
EDGELM_DEVICE int grid_z() { return gridDim.z; }

EDGELM_DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 edgelm_shared[];
  return edgelm_shared;
}

EDGELM_DEVICE void sync_block() { __syncthreads(); }
EDGELM_DEVICE void sync_warp() { __syncwarp(); }

// With programmatic dependent launch (PDL, from SM 90 on) a kernel may start before the previous one has ended. It must
// not read the previous kernel's results before this call. On other devices and in ordinary launches it does nothing.
EDGELM_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
EDGELM_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// -- within a warp: all 32 threads take part ---------------------------------------------------------------------------

EDGELM_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
EDGELM_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
EDGELM_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
EDGELM_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
EDGELM_DEVICE u32 shuffle(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// Lanes below `delta` keep their own value.
EDGELM_DEVICE int shuffle_up(int x, int delta) { return __shfl_up_sync(0xffffffffu, x, delta); }
EDGELM_DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
EDGELM_DEVICE int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }
EDGELM_DEVICE int warp_sum(int x) { return __reduce_add_sync(0xffffffffu, x); }

// -- tensor cores ------------------------------------------------------------------------------------------------------

// d += a b: a [16, 16] row-major and b [16, 8] column-major of type A, d float32. Lane 4 g + q holds
// a0 (row g; columns 2q, 2q+1), a1 (g+8; 2q..), a2 (g; 2q+8..), a3 (g+8; 2q+8..), b0 (rows 2q, 2q+1; column g),
// b1 (rows 2q+8..; g), d0, d1 (row g; columns 2q, 2q+1), d2, d3 (row g+8).
#define EDGELM_MMA(types)                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class A> EDGELM_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (Same<A, bf16>::value) EDGELM_MMA("f32.bf16.bf16.f32");
  else EDGELM_MMA("f32.f16.f16.f32");
}
#undef EDGELM_MMA

// The same for E4M3 with K = 32: a register holds 4 numbers in place of 2 (a0: row g, columns 4q..4q+3; a2: columns
// 4q+16..; b0: rows 4q..4q+3). Only where EDGELM_HAS_FP8 is defined.
#ifdef EDGELM_HAS_FP8
EDGELM_DEVICE void mma_16x8x32_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// An address in shared memory. Where one is kept in a variable this has one register, and a pointer two.
using Shared = u32;
EDGELM_DEVICE Shared shared_address(const void* shared) { return u32(__cvta_generic_to_shared(shared)); }

// Load four 8 x 8 matrices of 16-bit numbers. Lane i passes the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned). Lane 4 g + q gets numbers 2 q, 2 q + 1 of row g of matrix m in r[m].
EDGELM_DEVICE void ldmatrix_x4(u32 (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
EDGELM_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) { ldmatrix_x4(r, shared_address(row)); }
// The same with each matrix transposed: lane 4 g + q gets rows 2 q, 2 q + 1 of column g.
EDGELM_DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
EDGELM_DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
  ldmatrix_x4_transposed(r, shared_address(row));
}

// -- copies to shared memory in the background -------------------------------------------------------------------------

// Copy 16 aligned bytes; if not `valid`, write zeros and do not read `global`.
EDGELM_DEVICE void cp_async16(Shared shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
EDGELM_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  cp_async16(shared_address(shared), global, valid);
}
EDGELM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until all but the newest `pending` groups of this thread have arrived. Other threads see them after a barrier.
template <int pending> EDGELM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// -- memory ------------------------------------------------------------------------------------------------------------

EDGELM_DEVICE Words4 load16(const void* p) { return *static_cast<const Words4*>(p); }
EDGELM_DEVICE Words2 load8(const void* p) { return *static_cast<const Words2*>(p); }
EDGELM_DEVICE u32 load4(const void* p) { return *static_cast<const u32*>(p); }
EDGELM_DEVICE void store16(void* p, Words4 x) { *static_cast<Words4*>(p) = x; }
EDGELM_DEVICE void store8(void* p, Words2 x) { *static_cast<Words2*>(p) = x; }
EDGELM_DEVICE void store4(void* p, u32 x) { *static_cast<u32*>(p) = x; }

EDGELM_DEVICE Words4 load16_shared(Shared from) {
  Words4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
  return x;
}
EDGELM_DEVICE u32 load4_shared(Shared from) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from));
  return x;
}
EDGELM_DEVICE u32 load2_shared(Shared from) {
  u16 x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from));
  return x;
}
EDGELM_DEVICE u32 load1_shared(Shared from) {
  u32 x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(from));
  return x;
}

// Load weights, which are read once, bypassing L1: global memory that no kernel writes.
EDGELM_DEVICE Words4 load16_stream(const void* p) {
  Words4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

// Request a line of global memory for the L2 cache, and do not wait for it.
EDGELM_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

EDGELM_DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
// Memory fence for the device: writes of this thread before it are visible to whoever sees a write or atomic of this
// thread after it, and the reverse for reads.
EDGELM_DEVICE void fence_device() { __threadfence(); }

// -- arithmetic --------------------------------------------------------------------------------------------------------

EDGELM_DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }
EDGELM_DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
EDGELM_DEVICE float max_(float a, float b) { return fmaxf(a, b); }
EDGELM_DEVICE float min_(float a, float b) { return fminf(a, b); }
EDGELM_DEVICE int max_(int a, int b) { return a > b ? a : b; }
EDGELM_DEVICE int min_(int a, int b) { return a < b ? a : b; }
EDGELM_DEVICE float abs_(float a) { return fabsf(a); }
EDGELM_DEVICE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
EDGELM_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }  // never fused with an addition
EDGELM_DEVICE float round_(float a) { return rintf(a); }                            // ties to even
EDGELM_DEVICE float exp_(float a) { return expf(a); }
EDGELM_DEVICE float exp_fast(float a) { return __expf(a); }  // 2 ulp and a little more for large |a|
EDGELM_DEVICE float exp2_fast(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
EDGELM_DEVICE float rsqrt_(float a) { return 1.f / sqrtf(a); }
EDGELM_DEVICE bool is_nan(float a) { return a != a; }
EDGELM_DEVICE int count_bits(u32 x) { return __popc(x); }
EDGELM_DEVICE int lowest_bit(u32 x) { return __ffs(int(x)) - 1; }  // index of the lowest set bit; x must not be 0

EDGELM_DEVICE float f16_to_float(u16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
EDGELM_DEVICE u32 float_to_bf16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
EDGELM_DEVICE u32 float_to_f16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// a * b + c on pairs of float16.
EDGELM_DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
EDGELM_DEVICE u32 f16x2_multiply(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
EDGELM_DEVICE u32 bf16x2_fma(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// (a & b) | c in one instruction.
EDGELM_DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Choose four of the eight bytes of a (0 to 3) and b (4 to 7) by the nibbles of `selector`, lowest first.
EDGELM_DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

#ifdef EDGELM_HAS_FP8
// Convert two floats to E4M3 codes, the first in the low byte.
EDGELM_DEVICE u32 float_to_e4m3x2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
EDGELM_DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(u16(pair)));
  return r;
}
#else
EDGELM_DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  const u32 spread = (pair & 0xff) | (pair & 0xff00) << 8;
  return f16x2_multiply((spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 7, 0x5c005c00u);  // by 2^8
}
#endif

}  // namespace edgelm
