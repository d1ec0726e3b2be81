// Vector operations for AVX2 with FMA and F16C; with AVX-VNNI where the build enables it. A vector is two registers.
// simd_scalar.h documents the operations. (AVX512-VNNI in place of AVX-VNNI is for tests: the same operation in an
// encoding that other CPUs have.)
#ifndef EDGELM_KERNELS_SIMD_H_
#define EDGELM_KERNELS_SIMD_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace edgelm {
namespace {

// There are 16 registers. The sums of four rows by one vector take eight, its codes two to four.
constexpr int kRowTile = 4;
constexpr int kVectors = 1;
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
#define EDGELM_DPBUSD 1
constexpr bool kDotFullSigned = false;
#else
constexpr bool kDotFullSigned = true;
#endif

struct F32 { __m256 a, b; };  // lanes 0..7 and 8..15
struct I32 { __m256i a, b; };
struct B8 { __m256i a, b; };

inline F32 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void Store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
// A mask with all ones in the first `n` - `from` lanes.
inline __m256i First(int64_t n, int from) {
  const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(from));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}
// Masked lanes are neither read nor written, so nothing past the end is touched.
inline F32 LoadPart(const float* p, int64_t n) {
  if (n == 16) return Load(p);
  return {_mm256_maskload_ps(p, First(n, 0)), _mm256_maskload_ps(p + 8, First(n, 8))};
}
inline void StorePart(float* p, F32 x, int64_t n) {
  if (n == 16) return Store(p, x);
  _mm256_maskstore_ps(p, First(n, 0), x.a);
  _mm256_maskstore_ps(p + 8, First(n, 8), x.b);
}
inline F32 Splat(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline F32 Add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 Sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 Mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 Div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 Fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 Abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F32 Max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F32 Min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

inline I32 SplatI(int32_t x) {
  const __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
inline __m256i LoadHalfRegister(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I32 LoadI(const int32_t* p) { return {LoadHalfRegister(p), LoadHalfRegister(p + 8)}; }
inline I32 AddI(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I32 SubI(I32 x, I32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I32 MulI(I32 x, I32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
template <int kBits> inline I32 ShiftLeftI(I32 x) {
  return {_mm256_slli_epi32(x.a, kBits), _mm256_slli_epi32(x.b, kBits)};
}
inline F32 ToFloat(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I32 Round(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F32 AsFloat(I32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I32 AsInt(F32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

inline float Sum(F32 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float Largest(F32 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t SumI(I32 x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

inline F32 LoadHalf(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F32 LoadBFloat16(const uint16_t* p) {
  const auto eight = [](const uint16_t* q) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  };
  return {eight(p), eight(p + 8)};
}
inline F32 LoadFp8(const uint8_t* p) {
  // Convert to float16 with the exponent 8 too small; the multiplication by 256 corrects it exactly. NaN is set
  // separately.
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7F));
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7F));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
  const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi16(0x7E00));
  const __m256i half = _mm256_blendv_epi8(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), quiet, nan);
  const __m256 mend = _mm256_set1_ps(256.0f);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), mend),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), mend)};
}
inline void StoreHalf(uint16_t* p, F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, kNearest));
}
inline void StoreBytes(int8_t* p, I32 x) {
  // Packing works within 128-bit lanes, giving 0..3 8..11 4..7 12..15; the permutation restores the order. The values
  // fit, so none is saturated.
  const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline I32 LoadBytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

inline B8 LoadB(const uint8_t* p) { return {LoadHalfRegister(p), LoadHalfRegister(p + 32)}; }
inline B8 LowNibbles(B8 x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline B8 HighNibbles(B8 x) { return LowNibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline B8 JoinNibbles(B8 high, B8 low) {
  return {_mm256_or_si256(_mm256_slli_epi16(high.a, 4), low.a), _mm256_or_si256(_mm256_slli_epi16(high.b, 4), low.b)};
}
// Shift each byte right by kBits (left if negative). Bits of the neighbouring byte may come in.
template <int kBits> inline __m256i ShiftBytes(__m256i x) {
  if constexpr (kBits > 0) {
    return _mm256_srli_epi16(x, kBits);
  } else {
    return kBits == 0 ? x : _mm256_slli_epi16(x, -kBits);
  }
}
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits> inline __m256i JoinBits(__m256i low, __m256i high) {
  constexpr int kLowMask = (1 << kLowBits) - 1, kHighMask = ((1 << kHighBits) - 1) << kLowBits;
  return _mm256_or_si256(_mm256_and_si256(ShiftBytes<kLowAt>(low), _mm256_set1_epi8(kLowMask)),
                         _mm256_and_si256(ShiftBytes<kHighAt - kLowBits>(high), _mm256_set1_epi8(kHighMask)));
}
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits> inline B8 JoinBits(B8 low, B8 high) {
  return {JoinBits<kLowAt, kLowBits, kHighAt, kHighBits>(low.a, high.a),
          JoinBits<kLowAt, kLowBits, kHighAt, kHighBits>(low.b, high.b)};
}
template <int kIndex> inline I32 ByteOfLane(B8 x) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * kIndex), mask),
          _mm256_and_si256(_mm256_srli_epi32(x.b, 8 * kIndex), mask)};
}

inline __m256i SplatFour(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

#if defined(EDGELM_DPBUSD)

inline __m256i Dpbusd(__m256i acc, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, codes, x);
#else
  return _mm256_dpbusd_epi32(acc, codes, x);
#endif
}
inline I32 DotSmall(I32 acc, B8 codes, const int8_t* x) {
  const __m256i four = SplatFour(x);
  return {Dpbusd(acc.a, codes.a, four), Dpbusd(acc.b, codes.b, four)};
}
inline I32 DotFull(I32 acc, B8 codes, const int8_t* x) { return DotSmall(acc, codes, x); }

#else

// VPMADDUBSW multiplies unsigned by signed bytes and adds pairs, saturating at 16 bits.
inline __m256i AddPairs(__m256i acc, __m256i magnitudes, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitudes, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// A pair is at most 2 * 127 * 127 = 32,258: never saturated.
inline I32 DotSmall(I32 acc, B8 codes, const int8_t* x) {
  const __m256i four = SplatFour(x);
  return {AddPairs(acc.a, codes.a, four), AddPairs(acc.b, codes.b, four)};
}
// For codes of eight bits use code - 128 and move the sign to the activations, which are never -128: a pair is at most
// 2 * 128 * 127 = 32,512. With the codes as they are it could reach 64,770 and saturate.
inline I32 DotFull(I32 acc, B8 codes, const int8_t* x) {
  const __m256i four = SplatFour(x), flip = _mm256_set1_epi8(-128);
  const __m256i a = _mm256_xor_si256(codes.a, flip), b = _mm256_xor_si256(codes.b, flip);
  return {AddPairs(acc.a, _mm256_abs_epi8(a), _mm256_sign_epi8(four, a)),
          AddPairs(acc.b, _mm256_abs_epi8(b), _mm256_sign_epi8(four, b))};
}

#endif
#undef EDGELM_DPBUSD

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_SIMD_H_
