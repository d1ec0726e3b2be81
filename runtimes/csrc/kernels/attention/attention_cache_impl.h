// Layout of one head's cache, and writing a token to it.
#ifndef EDGELM_KERNELS_ATTENTION_CACHE_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_CACHE_IMPL_H_

#include "attention.h"
#include "kernels/kernels.h"
#include "kernels/simd/math_impl.h"

namespace edgelm {
namespace {

// The cache of one head. A tile holds 16 tokens; the last one holds the remainder.
struct HeadCache {
  uint8_t* data;
  int64_t head_dim, row_bytes, capacity;

  EDGELM_INLINE uint8_t* Tile(int64_t tile) const { return data + tile * kCacheTile * row_bytes; }
  EDGELM_INLINE int64_t Tokens(int64_t tile) const {
    const int64_t left = capacity - tile * kCacheTile;
    return left < kCacheTile ? left : kCacheTile;
  }
};

inline HeadCache Cache(const Attention& call, uint8_t* data, int64_t head) {
  const int64_t row_bytes = AttentionRowBytes(call.cache, call.head_dim);
  return {data + head * call.capacity * row_bytes, call.head_dim, row_bytes, call.capacity};
}

// Index of element d of token `slot` in a tile of n tokens, in elements: of keys, of values.
inline int64_t KeyCode(int64_t d, int64_t slot, int64_t n, int64_t head_dim) {
  const int64_t four = d / 4 * 4, width = head_dim - four < 4 ? head_dim - four : 4;
  return n * four + width * slot + d - four;
}
inline int64_t ValueCode(int64_t d, int64_t slot, int64_t n, int64_t head_dim) {
  const int64_t four = slot / 4 * 4, width = n - four < 4 ? n - four : 4;
  return head_dim * four + width * d + slot - four;
}

// Return the largest magnitude of x [head_dim, zeros up to whole vectors]; 0 if it is too small to divide by, NaN if a
// number is not finite.
inline float LargestOf(const float* x, int64_t width) {
  F32 odd = Splat(0.0f), top = Splat(0.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const F32 a = Load(x + i);
    odd = Fma(a, Splat(0.0f), odd);
    top = Max(Abs(a), top);
  }
  const float probe = Sum(odd), largest = Largest(top);
  if (!(probe == 0.0f)) return probe - probe;
  return largest < 0x1p-100f ? 0.0f : largest;
}

// Quantise x [head_dim, zeros up to whole vectors] to int8: codes = round(x * 127 / max|x|), as QuantBlock does it.
inline void QuantHead(const float* x, int64_t width, int8_t* codes, float* scale) {
  const float largest = LargestOf(x, width);
  if (!(largest > 0.0f)) {
    std::memset(codes, 0, width);
    *scale = largest;
    return;
  }
  const F32 inverse = Splat(127.0f / largest);
  for (int64_t i = 0; i < width; i += 16) StoreBytes(codes + i, Round(Mul(Load(x + i), inverse)));
  *scale = largest / 127.0f;
}

// Round to the nearest E4M3 number, ties to even, at most 448. x must not be NaN.
inline uint8_t Fp8Code(float x) {
  constexpr uint32_t kLargest = 0x43E00000, kSmallestNormal = 0x3C800000, kShift = 0x46800000;  // 448, 2^-6, 2^14
  uint32_t bits, shifted;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7FFFFFFF;
  bits = bits < kLargest ? bits : kLargest;
  // Round to three mantissa bits; the carry may go into the exponent. The bias is 7 in place of 127.
  const uint32_t normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6 numbers are multiples of 2^-9, the unit in the last place of floats from 2^14 on.
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude += 16384.0f;
  std::memcpy(&shifted, &magnitude, 4);
  return static_cast<uint8_t>(sign | (bits < kSmallestNormal ? shifted - kShift : normal));
}

// Quantise x [head_dim, zeros up to whole vectors] to E4M3: codes = x / scale, scale = max|x| / 448 rounded up to
// bfloat16. A code times a bfloat16 scale is exact in float32.
inline void QuantHeadFp8(const float* x, int64_t width, uint8_t* codes, uint16_t* scale) {
  const float largest = LargestOf(x, width);
  if (!(largest > 0.0f)) {
    std::memset(codes, 0, width);
    *scale = largest == 0.0f ? 0 : 0x7FC0;
    return;
  }
  float rounded = largest / 448.0f;
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  bits = (bits + 0xFFFF) & 0xFFFF0000;
  std::memcpy(&rounded, &bits, 4);
  *scale = static_cast<uint16_t>(bits >> 16);
  for (int64_t i = 0; i < width; i += 16) {
    float part[16];
    Store(part, Div(Load(x + i), Splat(rounded)));
    for (int64_t j = 0; j < 16; ++j) codes[i + j] = Fp8Code(part[j]);
  }
}

// Write one token's key (or value) of one head, x [head_dim, zeros up to whole vectors], into the cache. `temporary`
// has room for as many floats as x.
template <bool kKey>
inline void StoreToken(const HeadCache& cache, CacheKind kind, int64_t position, const float* x, int64_t width,
                       float* temporary) {
  const int64_t tile = position / kCacheTile, slot = position % kCacheTile;
  const int64_t n = cache.Tokens(tile), dim = cache.head_dim;
  uint8_t* to = cache.Tile(tile);
  if (kind == CacheKind::kInt8) {
    int8_t* codes = reinterpret_cast<int8_t*>(temporary);
    float scale;
    QuantHead(x, width, codes, &scale);
    std::memcpy(to + n * dim + 4 * slot, &scale, 4);
    const int64_t whole = kKey && n == kCacheTile ? dim / 4 : 0;
    for (int64_t q = 0; q < whole; ++q) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * q, 4);
      four ^= 0x80808080u;
      std::memcpy(to + 64 * q + 4 * slot, &four, 4);
    }
    for (int64_t d = 4 * whole; d < dim; ++d) {
      to[kKey ? KeyCode(d, slot, n, dim) : ValueCode(d, slot, n, dim)] = static_cast<uint8_t>(codes[d] ^ 0x80);
    }
    return;
  }
  const int64_t step = kKey ? n : 1, first = kKey ? slot : slot * dim;
  if (kind == CacheKind::kFloat32) {
    for (int64_t d = 0; d < dim; ++d) std::memcpy(to + 4 * (first + d * step), x + d, 4);
    return;
  }
  if (kind == CacheKind::kFp8) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(temporary);
    uint16_t scale;
    QuantHeadFp8(x, width, codes, &scale);
    std::memcpy(to + n * dim + 2 * slot, &scale, 2);
    for (int64_t d = 0; d < dim; ++d) to[first + d * step] = codes[d];
    return;
  }
  uint16_t* half = reinterpret_cast<uint16_t*>(temporary);
  for (int64_t i = 0; i < width; i += 16) StoreHalf(half + i, Load(x + i));
  for (int64_t d = 0; d < dim; ++d) std::memcpy(to + 2 * (first + d * step), half + d, 2);
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_CACHE_IMPL_H_
