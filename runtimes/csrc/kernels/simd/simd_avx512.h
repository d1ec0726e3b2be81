// Vector operations for AVX-512 (F, BW, DQ, VL, VNNI). A vector is one register. simd_scalar.h documents the
// operations.
#ifndef EDGELM_KERNELS_SIMD_H_
#define EDGELM_KERNELS_SIMD_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgelm {
namespace {

constexpr int kRowTile = 4;
constexpr int kVectors = 2;
constexpr bool kDotFullSigned = false;

using F32 = __m512;
using I32 = __m512i;
struct B8 { __m512i v; };

inline __mmask16 First(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F32 Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
inline F32 LoadPart(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(First(n), p); }
inline void StorePart(float* p, F32 a, int64_t n) { _mm512_mask_storeu_ps(p, First(n), a); }
inline F32 Splat(float x) { return _mm512_set1_ps(x); }
inline F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 Sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 Div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 Fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 Abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 Min(F32 a, F32 b) { return _mm512_min_ps(a, b); }

inline I32 SplatI(int32_t x) { return _mm512_set1_epi32(x); }
inline I32 LoadI(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I32 AddI(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 SubI(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
inline I32 MulI(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
template <int kBits> inline I32 ShiftLeftI(I32 a) { return _mm512_slli_epi32(a, kBits); }
inline F32 ToFloat(I32 a) { return _mm512_cvtepi32_ps(a); }
inline I32 Round(F32 a) { return _mm512_cvtps_epi32(a); }
inline F32 AsFloat(I32 a) { return _mm512_castsi512_ps(a); }
inline I32 AsInt(F32 a) { return _mm512_castps_si512(a); }

inline float Sum(F32 a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float Largest(F32 a) { return _mm512_reduce_max_ps(a); }
inline int32_t SumI(I32 a) { return _mm512_reduce_add_epi32(a); }

inline F32 LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 LoadBFloat16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline F32 LoadFp8(const uint8_t* p) {
  // Convert to float16 with the exponent 8 too small; the multiplication by 256 corrects it exactly. NaN is set
  // separately. The sign is extended: one shift brings it to the top bit, and its copy in the bit below is cleared.
  const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __mmask16 number = _mm256_test_epi16_mask(_mm256_xor_si256(bytes, _mm256_set1_epi16(0x7F)),
                                                  _mm256_set1_epi16(0x7F));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(static_cast<short>(0xBF80)));
  const __m256i nan = _mm256_or_si256(_mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0x8000))),
                                      _mm256_set1_epi16(0x7E00));
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(nan, number, half)), _mm512_set1_ps(256.0f));
}
inline void StoreHalf(uint16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void StoreBytes(int8_t* p, I32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
inline I32 LoadBytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline B8 LoadB(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline B8 LowNibbles(B8 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline B8 HighNibbles(B8 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline B8 JoinNibbles(B8 high, B8 low) { return {_mm512_or_si512(_mm512_slli_epi16(high.v, 4), low.v)}; }
// Shift each byte right by kBits (left if negative). Bits of the neighbouring byte may come in.
template <int kBits> inline __m512i ShiftBytes(__m512i x) {
  if constexpr (kBits > 0) {
    return _mm512_srli_epi16(x, kBits);
  } else {
    return kBits == 0 ? x : _mm512_slli_epi16(x, -kBits);
  }
}
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits> inline B8 JoinBits(B8 low, B8 high) {
  const __m512i l = ShiftBytes<kLowAt>(low.v), h = ShiftBytes<kHighAt - kLowBits>(high.v);
  // One operation selects the low bits from `l` and the others from `h`; then one mask.
  const __m512i mixed = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << kLowBits) - 1), l, h, 0xCA);
  return {_mm512_and_si512(mixed, _mm512_set1_epi8((1 << (kLowBits + kHighBits)) - 1))};
}
template <int kIndex> inline I32 ByteOfLane(B8 a) {
  if (kIndex == 3) return _mm512_srli_epi32(a.v, 24);
  return _mm512_and_si512(_mm512_srli_epi32(a.v, 8 * kIndex), _mm512_set1_epi32(255));
}

inline I32 DotSmall(I32 acc, B8 codes, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(acc, codes.v, _mm512_set1_epi32(four));
}
inline I32 DotFull(I32 acc, B8 codes, const int8_t* x) { return DotSmall(acc, codes, x); }

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_SIMD_H_
