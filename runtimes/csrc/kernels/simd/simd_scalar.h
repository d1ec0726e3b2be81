// Scalar version of the vector operations that the kernels are written in, one lane at a time. It is the reference for
// every instruction set and the fallback where none is available.
//
// A vector has 16 lanes of 32 bits; an instruction set with shorter registers uses two or four per vector. Each
// operation is documented here. Included inside namespace edgelm::(anonymous): nothing in these headers may have
// external linkage, or the linker would keep one copy, compiled for any one of the instruction sets.
#ifndef EDGELM_KERNELS_SIMD_H_
#define EDGELM_KERNELS_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace edgelm {
namespace {

// Rows of activations per pass over a tile, and vectors of 16 columns per step. Small, since there are no vector
// registers to fill.
constexpr int kRowTile = 2;
constexpr int kVectors = 1;
// Whether DotFull takes codes as code - 128 rather than as they are.
constexpr bool kDotFullSigned = false;

struct F32 { float v[16]; };
struct I32 { int32_t v[16]; };
struct B8 { uint8_t v[64]; };  // lane l holds bytes 4 l .. 4 l + 3

#define EDGELM_LANES for (int l = 0; l < 16; ++l)
// Not inlined: the kernels are unrolled for vector registers, and with every lane of every operation expanded in them
// GCC took two minutes.
#define EDGELM_CALLED inline __attribute__((noinline))

inline F32 Load(const float* p) {
  F32 r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void Store(float* p, const F32& a) { std::memcpy(p, a.v, 64); }
// Load or store the first n (0..16) lanes; the others are 0, or are not written.
inline F32 LoadPart(const float* p, int64_t n) {
  F32 r = {};
  std::memcpy(r.v, p, 4 * n);
  return r;
}
inline void StorePart(float* p, const F32& a, int64_t n) { std::memcpy(p, a.v, 4 * n); }
inline F32 Splat(float x) {
  F32 r;
  EDGELM_LANES r.v[l] = x;
  return r;
}
EDGELM_CALLED F32 Add(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] + b.v[l];
  return r;
}
EDGELM_CALLED F32 Sub(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] - b.v[l];
  return r;
}
EDGELM_CALLED F32 Mul(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] * b.v[l];
  return r;
}
EDGELM_CALLED F32 Div(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] / b.v[l];
  return r;
}
// a * b + c, rounded once.
EDGELM_CALLED F32 Fma(const F32& a, const F32& b, const F32& c) {
  F32 r;
  EDGELM_LANES r.v[l] = std::fma(a.v[l], b.v[l], c.v[l]);
  return r;
}
EDGELM_CALLED F32 Abs(const F32& a) {
  F32 r;
  EDGELM_LANES r.v[l] = std::fabs(a.v[l]);
  return r;
}
// The larger / smaller; b if one is NaN. (This is x86's rule; the Arm version emulates it.)
EDGELM_CALLED F32 Max(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l];
  return r;
}
EDGELM_CALLED F32 Min(const F32& a, const F32& b) {
  F32 r;
  EDGELM_LANES r.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l];
  return r;
}

inline I32 SplatI(int32_t x) {
  I32 r;
  EDGELM_LANES r.v[l] = x;
  return r;
}
inline I32 LoadI(const int32_t* p) {
  I32 r;
  std::memcpy(r.v, p, 64);
  return r;
}
EDGELM_CALLED I32 AddI(const I32& a, const I32& b) {
  I32 r;
  EDGELM_LANES r.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) + static_cast<uint32_t>(b.v[l]));
  return r;
}
EDGELM_CALLED I32 SubI(const I32& a, const I32& b) {
  I32 r;
  EDGELM_LANES r.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) - static_cast<uint32_t>(b.v[l]));
  return r;
}
EDGELM_CALLED I32 MulI(const I32& a, const I32& b) {
  I32 r;
  EDGELM_LANES r.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) * static_cast<uint32_t>(b.v[l]));
  return r;
}
template <int kBits> EDGELM_CALLED I32 ShiftLeftI(const I32& a) {
  I32 r;
  EDGELM_LANES r.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) << kBits);
  return r;
}
EDGELM_CALLED F32 ToFloat(const I32& a) {
  F32 r;
  EDGELM_LANES r.v[l] = static_cast<float>(a.v[l]);
  return r;
}
// To nearest, ties to even; |a| < 2^31 (the result is unspecified for anything else, NaN included).
EDGELM_CALLED I32 Round(const F32& a) {
  I32 r;
  EDGELM_LANES r.v[l] = std::fabs(a.v[l]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(a.v[l])) : INT32_MIN;
  return r;
}
inline F32 AsFloat(const I32& a) {
  F32 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
inline I32 AsInt(const F32& a) {
  I32 r;
  std::memcpy(r.v, a.v, 64);
  return r;
}

// Sum of the lanes in a fixed order: lane l + lane l + 8, then lanes 4, 2, 1 apart.
EDGELM_CALLED float Sum(F32 a) {
  for (int step = 8; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) a.v[l] += a.v[l + step];
  return a.v[0];
}
EDGELM_CALLED float Largest(const F32& a) {  // no lane is NaN
  float m = a.v[0];
  EDGELM_LANES m = a.v[l] > m ? a.v[l] : m;
  return m;
}
EDGELM_CALLED int32_t SumI(const I32& a) {
  uint32_t s = 0;
  EDGELM_LANES s += static_cast<uint32_t>(a.v[l]);
  return static_cast<int32_t>(s);
}

// Convert 16 elements of a storage type to float32, exactly.
EDGELM_CALLED F32 LoadHalf(const uint16_t* p) {
  F32 r;
  EDGELM_LANES {
    const uint32_t sign = static_cast<uint32_t>(p[l] & 0x8000u) << 16, exponent = (p[l] >> 10) & 31u,
                   fraction = p[l] & 1023u;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      r.v[l] = sign != 0 ? -magnitude : magnitude;
    } else {
      const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112u) << 23) | fraction << 13;
      std::memcpy(&r.v[l], &bits, 4);
    }
  }
  return r;
}
EDGELM_CALLED F32 LoadBFloat16(const uint16_t* p) {
  F32 r;
  EDGELM_LANES {
    const uint32_t bits = static_cast<uint32_t>(p[l]) << 16;
    std::memcpy(&r.v[l], &bits, 4);
  }
  return r;
}
EDGELM_CALLED F32 LoadFp8(const uint8_t* p) {
  F32 r;
  EDGELM_LANES {
    const uint32_t sign = static_cast<uint32_t>(p[l] & 0x80u) << 24, exponent = (p[l] >> 3) & 15u, fraction = p[l] & 7u;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(fraction) * 0x1p-9f;
      r.v[l] = sign != 0 ? -magnitude : magnitude;
    } else {
      uint32_t bits = sign | (exponent + 120u) << 23 | fraction << 20;
      if ((p[l] & 0x7Fu) == 0x7Fu) bits = sign | 0x7FC00000u;
      std::memcpy(&r.v[l], &bits, 4);
    }
  }
  return r;
}
// Round to float16, to nearest, ties to even; infinity beyond its range.
EDGELM_CALLED void StoreHalf(uint16_t* p, const F32& a) {
  EDGELM_LANES {
    uint32_t bits;
    std::memcpy(&bits, &a.v[l], 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    uint32_t half;
    if (bits > 0x7F800000u) {
      half = 0x7E00u | (bits >> 13 & 0x3FFu);
    } else if (bits >= 0x477FF000u) {
      half = 0x7C00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 aligns the fraction and rounds it
      float magnitude;
      std::memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      std::memcpy(&half, &magnitude, 4);
      half -= 0x3F000000u;
    } else {
      half = (bits + 0xFFFu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
    }
    p[l] = static_cast<uint16_t>(sign | half);
  }
}
// Store the lanes, which are within -128 .. 127, as bytes.
EDGELM_CALLED void StoreBytes(int8_t* p, const I32& a) { EDGELM_LANES p[l] = static_cast<int8_t>(a.v[l]); }
// Load 16 unsigned bytes as lanes.
EDGELM_CALLED I32 LoadBytes(const uint8_t* p) {
  I32 r;
  EDGELM_LANES r.v[l] = p[l];
  return r;
}

inline B8 LoadB(const uint8_t* p) {
  B8 r;
  std::memcpy(r.v, p, 64);
  return r;
}
EDGELM_CALLED B8 LowNibbles(const B8& a) {
  B8 r;
  for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] & 15;
  return r;
}
EDGELM_CALLED B8 HighNibbles(const B8& a) {
  B8 r;
  for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] >> 4;
  return r;
}
// high * 16 + low, both below 16.
EDGELM_CALLED B8 JoinNibbles(const B8& high, const B8& low) {
  B8 r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(high.v[i] << 4 | low.v[i]);
  return r;
}
// kLowBits bits of each byte of `low` from bit kLowAt on, and above them kHighBits of `high` from kHighAt on.
template <int kLowAt, int kLowBits, int kHighAt, int kHighBits> EDGELM_CALLED B8 JoinBits(const B8& low,
                                                                                          const B8& high) {
  constexpr int kLowMask = (1 << kLowBits) - 1, kHighMask = (1 << kHighBits) - 1;
  B8 r;
  for (int i = 0; i < 64; ++i) {
    r.v[i] = static_cast<uint8_t>((low.v[i] >> kLowAt & kLowMask) | (high.v[i] >> kHighAt & kHighMask) << kLowBits);
  }
  return r;
}
// Byte kIndex of each lane as a number.
template <int kIndex> EDGELM_CALLED I32 ByteOfLane(const B8& a) {
  I32 r;
  EDGELM_LANES r.v[l] = a.v[4 * l + kIndex];
  return r;
}

// acc + the dot product of each lane's four codes with the four int8 of `x`. Codes below 128.
EDGELM_CALLED I32 DotSmall(const I32& acc, const B8& codes, const int8_t* x) {
  I32 r = acc;
  EDGELM_LANES for (int j = 0; j < 4; ++j) r.v[l] += codes.v[4 * l + j] * x[j];
  return r;
}
// The same for any codes.
inline I32 DotFull(const I32& acc, const B8& codes, const int8_t* x) { return DotSmall(acc, codes, x); }

#undef EDGELM_LANES
#undef EDGELM_CALLED

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_SIMD_H_
