// Unpacks the codes of integer kinds to one per byte, in registers. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_UNPACK_IMPL_H_
#define EDGELM_KERNELS_UNPACK_IMPL_H_

#include "kernels/kernels.h"

namespace edgelm {
namespace {

// The zero point of an integer kind where none is stored.
constexpr int32_t SymmetricZero(Kind kind) {
  switch (kind) {
    case Kind::kInt3: return 4;
    case Kind::kInt4: return 8;
    case Kind::kInt5: return 16;
    case Kind::kInt6: return 32;
    default: return 128;
  }
}

// Pseudo-kind: the high nibbles of kInt8Split alone.
constexpr Kind kHighNibbles = static_cast<Kind>(10);

// Whether codes use all eight bits.
constexpr bool IsFull(Kind kind) { return kind == Kind::kInt8 || kind == Kind::kInt8Split; }

// Whether the bits of a code are stored in two places.
constexpr bool HasParts(Kind kind) { return kind == Kind::kInt3 || kind == Kind::kInt5 || kind == Kind::kInt6; }

constexpr int64_t BlockCodeBytes(Kind kind) {
  switch (kind) {
    case Kind::kInt3: return 384;
    case Kind::kInt5: return 640;
    case Kind::kInt6: return 768;
    case Kind::kInt8: return 1024;
    default: return 512;
  }
}

// Load the codes of 16 rows, columns 4 kQ .. 4 kQ + 3 of the block at `codes`.
template <Kind kKind, int kQ>
inline EDGELM_FLAT B8 FourColumns(const uint8_t* codes, const uint8_t* low, int half) {
  const int64_t at = 64 * half, nibble = 128 * (kQ / 2) + at;
  if constexpr (kKind == Kind::kInt8) {
    return LoadB(codes + 128 * kQ + at);
  } else if constexpr (kKind == Kind::kInt3) {
    return JoinBits<2 * (kQ % 4), 2, kQ, 1>(LoadB(codes + 128 * (kQ / 4) + at), LoadB(codes + 256 + at));
  } else if constexpr (kKind == Kind::kInt5) {
    return JoinBits<4 * (kQ % 2), 4, kQ, 1>(LoadB(codes + nibble), LoadB(codes + 512 + at));
  } else if constexpr (kKind == Kind::kInt6) {
    const B8 pairs = LoadB(codes + 512 + 128 * (kQ / 4) + at);
    return JoinBits<4 * (kQ % 2), 4, 2 * (kQ % 4), 2>(LoadB(codes + nibble), pairs);
  } else {
    const B8 bytes = LoadB(codes + nibble), four = kQ % 2 ? HighNibbles(bytes) : LowNibbles(bytes);
    if constexpr (kKind != Kind::kInt8Split) return four;
    const B8 low_codes = LoadB(low + nibble);
    return JoinNibbles(four, kQ % 2 ? HighNibbles(low_codes) : LowNibbles(low_codes));
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_UNPACK_IMPL_H_
