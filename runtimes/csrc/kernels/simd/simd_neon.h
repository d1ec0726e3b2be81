// Vector operations for Arm NEON with int8 dot products (FEAT_DotProd). A vector is four registers. If the build also
// has int8 matrix multiply (FEAT_I8MM), codes are taken unsigned. neon_dot_impl.h has the dot products of blocks.
// simd_scalar.h documents the operations.
//
// A vector is a struct of four named registers, not an array: GCC would keep an array in four neighbouring registers
// and spend time moving data there.
#ifndef EDGELM_KERNELS_SIMD_H_
#define EDGELM_KERNELS_SIMD_H_

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#if !defined(__ARM_FEATURE_DOTPROD)
#error "simd_neon.h needs the int8 dot product: compile with -march=armv8.2-a+dotprod"
#endif
#if defined(__AARCH64EB__)
#error "the kernels read little-endian files in place: build for a little-endian target"
#endif

#define EDGELM_NEON_DOT

namespace edgelm {
namespace {

// There are 32 registers. Four rows by one vector take 16 for the sums and 8 for the codes.
constexpr int kRowTile = 4;
constexpr int kVectors = 1;
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kDotFullSigned = false;
#else
constexpr bool kDotFullSigned = true;
#endif

struct F32 { float32x4_t a, b, c, d; };
struct I32 { int32x4_t a, b, c, d; };
struct B8 { uint8x16_t a, b, c, d; };

#define EDGELM_EACH(function, x) {function((x).a), function((x).b), function((x).c), function((x).d)}
#define EDGELM_PAIRS(function, x, y)                                                                                   \
  {function((x).a, (y).a), function((x).b, (y).b), function((x).c, (y).c), function((x).d, (y).d)}

inline F32 Load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void Store(float* p, F32 x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
// NEON has no masked loads and stores: partial vectors go through memory.
inline F32 LoadPart(const float* p, int64_t n) {
  if (n == 16) return Load(p);
  float lanes[16] = {};
  for (int64_t l = 0; l < n; ++l) lanes[l] = p[l];
  return Load(lanes);
}
inline void StorePart(float* p, F32 x, int64_t n) {
  if (n == 16) return Store(p, x);
  float lanes[16];
  Store(lanes, x);
  for (int64_t l = 0; l < n; ++l) p[l] = lanes[l];
}
inline F32 Splat(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
inline F32 Add(F32 x, F32 y) { return EDGELM_PAIRS(vaddq_f32, x, y); }
inline F32 Sub(F32 x, F32 y) { return EDGELM_PAIRS(vsubq_f32, x, y); }
inline F32 Mul(F32 x, F32 y) { return EDGELM_PAIRS(vmulq_f32, x, y); }
inline F32 Div(F32 x, F32 y) { return EDGELM_PAIRS(vdivq_f32, x, y); }
inline F32 Fma(F32 x, F32 y, F32 z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
inline F32 Abs(F32 x) { return EDGELM_EACH(vabsq_f32, x); }
// Arm's own maximum returns NaN if either operand is NaN, and treats +0 as larger than -0.
inline float32x4_t MaxOf(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline float32x4_t MinOf(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline F32 Max(F32 x, F32 y) { return EDGELM_PAIRS(MaxOf, x, y); }
inline F32 Min(F32 x, F32 y) { return EDGELM_PAIRS(MinOf, x, y); }

inline I32 SplatI(int32_t x) {
  const int32x4_t v = vdupq_n_s32(x);
  return {v, v, v, v};
}
inline I32 LoadI(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
inline I32 AddI(I32 x, I32 y) { return EDGELM_PAIRS(vaddq_s32, x, y); }
inline I32 SubI(I32 x, I32 y) { return EDGELM_PAIRS(vsubq_s32, x, y); }
inline I32 MulI(I32 x, I32 y) { return EDGELM_PAIRS(vmulq_s32, x, y); }
template <int kBits> inline I32 ShiftLeftI(I32 x) {
  return {vshlq_n_s32(x.a, kBits), vshlq_n_s32(x.b, kBits), vshlq_n_s32(x.c, kBits), vshlq_n_s32(x.d, kBits)};
}
inline F32 ToFloat(I32 x) { return EDGELM_EACH(vcvtq_f32_s32, x); }
inline I32 Round(F32 x) { return EDGELM_EACH(vcvtnq_s32_f32, x); }
inline F32 AsFloat(I32 x) { return EDGELM_EACH(vreinterpretq_f32_s32, x); }
inline I32 AsInt(F32 x) { return EDGELM_EACH(vreinterpretq_s32_f32, x); }

inline float Sum(F32 x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float Largest(F32 x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }
inline int32_t SumI(I32 x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }

inline F32 FromHalves(uint16x8_t low, uint16x8_t high) {
  const float16x8_t l = vreinterpretq_f16_u16(low), h = vreinterpretq_f16_u16(high);
  return {vcvt_f32_f16(vget_low_f16(l)), vcvt_high_f32_f16(l), vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
inline F32 LoadHalf(const uint16_t* p) { return FromHalves(vld1q_u16(p), vld1q_u16(p + 8)); }
inline F32 LoadBFloat16(const uint16_t* p) {
  const uint16x8_t l = vld1q_u16(p), h = vld1q_u16(p + 8);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(l), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(l, 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
}
// Convert FP8 E4M3 to float16 with the exponent 8 too small; the multiplication by 256 corrects it exactly. NaN is set
// separately.
inline uint16x8_t Fp8AsHalf(uint16x8_t bytes) {
  const uint16x8_t magnitude = vandq_u16(bytes, vdupq_n_u16(0x7F)), sign = vandq_u16(bytes, vdupq_n_u16(0x80));
  const uint16x8_t nan = vceqq_u16(magnitude, vdupq_n_u16(0x7F));
  const uint16x8_t half = vbslq_u16(nan, vdupq_n_u16(0x7E00), vshlq_n_u16(magnitude, 7));
  return vorrq_u16(half, vshlq_n_u16(sign, 8));
}
inline F32 LoadFp8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const F32 x = FromHalves(Fp8AsHalf(vmovl_u8(vget_low_u8(bytes))), Fp8AsHalf(vmovl_high_u8(bytes)));
  return Mul(x, Splat(256.0f));
}
inline void StoreHalf(uint16_t* p, F32 x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
  vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
inline void StoreBytes(int8_t* p, I32 x) {
  const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(x.a), vreinterpretq_s16_s32(x.b));
  const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(x.c), vreinterpretq_s16_s32(x.d));
  vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
}
inline I32 LoadBytes(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t l = vmovl_u8(vget_low_u8(bytes)), h = vmovl_high_u8(bytes);
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(l))), vreinterpretq_s32_u32(vmovl_high_u16(l)),
          vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(h))), vreinterpretq_s32_u32(vmovl_high_u16(h))};
}

inline B8 LoadB(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}; }
inline uint8x16_t LowNibblesOf(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(15)); }
inline uint8x16_t HighNibblesOf(uint8x16_t x) { return vshrq_n_u8(x, 4); }
inline uint8x16_t JoinNibblesOf(uint8x16_t high, uint8x16_t low) { return vsliq_n_u8(low, high, 4); }
inline B8 LowNibbles(B8 x) { return EDGELM_EACH(LowNibblesOf, x); }
inline B8 HighNibbles(B8 x) { return EDGELM_EACH(HighNibblesOf, x); }
inline B8 JoinNibbles(B8 high, B8 low) { return EDGELM_PAIRS(JoinNibblesOf, high, low); }
// Shift each byte right by kBits (left if not positive); NEON's right shift does not allow 0.
template <int kBits> inline uint8x16_t ShiftBytes(uint8x16_t x) {
  if constexpr (kBits > 0) {
    return vshrq_n_u8(x, kBits);
  } else {
    return vshlq_n_u8(x, -kBits);
  }
}
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits>
inline uint8x16_t JoinBitsOf(uint8x16_t low, uint8x16_t high) {
  const uint8x16_t mixed = vbslq_u8(vdupq_n_u8((1 << kLowBits) - 1), ShiftBytes<kLowAt>(low),
                                    ShiftBytes<kHighAt - kLowBits>(high));
  return vandq_u8(mixed, vdupq_n_u8((1 << (kLowBits + kHighBits)) - 1));
}
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits> inline B8 JoinBits(B8 low, B8 high) {
  return {JoinBitsOf<kLowAt, kLowBits, kHighAt, kHighBits>(low.a, high.a),
          JoinBitsOf<kLowAt, kLowBits, kHighAt, kHighBits>(low.b, high.b),
          JoinBitsOf<kLowAt, kLowBits, kHighAt, kHighBits>(low.c, high.c),
          JoinBitsOf<kLowAt, kLowBits, kHighAt, kHighBits>(low.d, high.d)};
}
template <int kIndex> inline int32x4_t ByteOf(uint8x16_t x) {
  const uint32x4_t lanes = vreinterpretq_u32_u8(x);
  if constexpr (kIndex == 3) {
    return vreinterpretq_s32_u32(vshrq_n_u32(lanes, 24));
  } else if constexpr (kIndex == 0) {
    return vreinterpretq_s32_u32(vandq_u32(lanes, vdupq_n_u32(255)));
  } else {
    return vreinterpretq_s32_u32(vandq_u32(vshrq_n_u32(lanes, 8 * kIndex), vdupq_n_u32(255)));
  }
}
template <int kIndex> inline I32 ByteOfLane(B8 x) {
  return {ByteOf<kIndex>(x.a), ByteOf<kIndex>(x.b), ByteOf<kIndex>(x.c), ByteOf<kIndex>(x.d)};
}

inline int8x16_t FourOf(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
inline I32 DotSmall(I32 acc, B8 codes, const int8_t* x) {
  const int8x16_t four = FourOf(x);
  return {vdotq_s32(acc.a, vreinterpretq_s8_u8(codes.a), four), vdotq_s32(acc.b, vreinterpretq_s8_u8(codes.b), four),
          vdotq_s32(acc.c, vreinterpretq_s8_u8(codes.c), four), vdotq_s32(acc.d, vreinterpretq_s8_u8(codes.d), four)};
}
inline I32 DotFull(I32 acc, B8 codes, const int8_t* x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x16_t four = FourOf(x);
  return {vusdotq_s32(acc.a, codes.a, four), vusdotq_s32(acc.b, codes.b, four), vusdotq_s32(acc.c, codes.c, four),
          vusdotq_s32(acc.d, codes.d, four)};
#else
  const uint8x16_t flip = vdupq_n_u8(0x80);
  return DotSmall(
      acc, {veorq_u8(codes.a, flip), veorq_u8(codes.b, flip), veorq_u8(codes.c, flip), veorq_u8(codes.d, flip)}, x);
#endif
}

#undef EDGELM_EACH
#undef EDGELM_PAIRS

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_SIMD_H_
