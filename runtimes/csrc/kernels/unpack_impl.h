// Codes of integer kinds from the layout to one a byte, in registers. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_UNPACK_IMPL_H_
#define EDGELM_KERNELS_UNPACK_IMPL_H_

#include "kernels.h"

namespace edgelm {
namespace {

// What the codes of an integer kind count as zero where no zero points are stored.
constexpr int32_t SymmetricZero(Kind kind) { return kind == Kind::kInt3 ? 4 : kind == Kind::kInt4 ? 8 : 128; }

// Pseudo-kind: the upper halves of kInt8Planes alone.
constexpr Kind kUpperPlane = static_cast<Kind>(10);

constexpr int64_t BlockCodeBytes(Kind kind) {
  return kind == Kind::kInt3 ? 384 : kind == Kind::kInt8 ? 1024 : 512;
}

// Four columns of 16 rows as the codes of an integer kind lie: columns 4 q .. 4 q + 3 of the block at `codes`.
template <Kind kKind>
inline __attribute__((always_inline)) B8 FourColumns(const uint8_t* codes, const uint8_t* low, int q, int half) {
  if constexpr (kKind == Kind::kInt8) return LoadB(codes + 128 * q + 64 * half);
  if constexpr (kKind == Kind::kInt3) {
    const B8 pairs = LoadB(codes + 128 * (q / 4) + 64 * half), thirds = LoadB(codes + 256 + 64 * half);
    switch (q) {
      case 0: return ThreeBits<0, 0>(pairs, thirds);
      case 1: return ThreeBits<1, 1>(pairs, thirds);
      case 2: return ThreeBits<2, 2>(pairs, thirds);
      case 3: return ThreeBits<3, 3>(pairs, thirds);
      case 4: return ThreeBits<0, 4>(pairs, thirds);
      case 5: return ThreeBits<1, 5>(pairs, thirds);
      case 6: return ThreeBits<2, 6>(pairs, thirds);
      default: return ThreeBits<3, 7>(pairs, thirds);
    }
  }
  const int64_t at = 128 * (q / 2) + 64 * half;
  const B8 bytes = LoadB(codes + at);
  const B8 four = q % 2 ? HighNibbles(bytes) : LowNibbles(bytes);
  if constexpr (kKind != Kind::kInt8Planes) return four;
  const B8 lower = LoadB(low + at);
  return JoinNibbles(four, q % 2 ? HighNibbles(lower) : LowNibbles(lower));
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_UNPACK_IMPL_H_
