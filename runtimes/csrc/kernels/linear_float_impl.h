// Products of any matrix with rows of float32 activations, column by column in order. Included after one of simd_*.h.
#ifndef EDGELM_KERNELS_LINEAR_FLOAT_IMPL_H_
#define EDGELM_KERNELS_LINEAR_FLOAT_IMPL_H_

#include "linear_finish_impl.h"
#include "unpack_impl.h"

namespace edgelm {
namespace {

template <Kind kKind>
inline F32 LoadFloats(const uint8_t* codes, int64_t element) {
  if constexpr (kKind == Kind::kFp8E4M3) return LoadFp8(codes + element);
  if constexpr (kKind == Kind::kFloat16) return LoadHalf(reinterpret_cast<const uint16_t*>(codes) + element);
  if constexpr (kKind == Kind::kBFloat16) return LoadBFloat16(reinterpret_cast<const uint16_t*>(codes) + element);
  return Load(reinterpret_cast<const float*>(codes) + element);
}

// VisitColumns for columns 4 kQ .. 4 kQ + 3 of a block of integer codes.
template <Kind kKind, int kQ, typename Visit>
inline __attribute__((always_inline)) void VisitFour(const uint8_t* codes, const uint8_t* low, const I32 (&zero)[2],
                                                     const F32 (&s)[2], Visit visit) {
  const B8 a = FourColumns<kKind, kQ>(codes, low, 0), b = FourColumns<kKind, kQ>(codes, low, 1);
  const auto one = [&](int k, I32 left, I32 right) __attribute__((always_inline)) {
    visit(4 * kQ + k, Mul(ToFloat(SubI(left, zero[0])), s[0]), Mul(ToFloat(SubI(right, zero[1])), s[1]));
  };
  one(0, ByteOfLane<0>(a), ByteOfLane<0>(b));
  one(1, ByteOfLane<1>(a), ByteOfLane<1>(b));
  one(2, ByteOfLane<2>(a), ByteOfLane<2>(b));
  one(3, ByteOfLane<3>(a), ByteOfLane<3>(b));
}

// Calls visit(k, left, right) for up to 32 columns of a tile in order, with the weights of its rows 0..15 and 16..31 as
// float32. Integer weights come out exact: 8 bits times a float16's 11.
template <Kind kKind, typename Visit>
inline __attribute__((always_inline)) void VisitColumns(const Matrix& m, int64_t tile, int64_t column, int64_t count,
                                                        Visit visit) {
  const int64_t g = column / m.group, within = column - g * m.group;
  const uint8_t* record = m.data + tile * m.tile_bytes + g * m.record_bytes;
  const uint8_t* codes = record + m.head_bytes;
  const bool scaled = m.scale != ScaleKind::kNone;
  F32 s[2] = {Splat(1.0f), Splat(1.0f)};
  for (int half = 0; half < 2; ++half) {
    if (m.scale == ScaleKind::kFloat16) s[half] = LoadHalf(reinterpret_cast<const uint16_t*>(record) + 16 * half);
    if (m.scale == ScaleKind::kFloat32) s[half] = Load(reinterpret_cast<const float*>(record) + 16 * half);
  }
  if constexpr (kKind < Kind::kFp8E4M3) {
    I32 zero[2] = {SplatI(SymmetricZero(kKind)), SplatI(SymmetricZero(kKind))};
    for (int half = 0; half < 2 && m.zeros; ++half) zero[half] = LoadBytes(record + m.head_bytes - 64 + 16 * half);
    codes += within / kBlock * BlockCodeBytes(kKind);
    const uint8_t* low =
        kKind == Kind::kInt8Planes ? m.low + (tile * (m.columns / kBlock) + column / kBlock) * 512 : nullptr;
    VisitFour<kKind, 0>(codes, low, zero, s, visit);
    VisitFour<kKind, 1>(codes, low, zero, s, visit);
    VisitFour<kKind, 2>(codes, low, zero, s, visit);
    VisitFour<kKind, 3>(codes, low, zero, s, visit);
    VisitFour<kKind, 4>(codes, low, zero, s, visit);
    VisitFour<kKind, 5>(codes, low, zero, s, visit);
    VisitFour<kKind, 6>(codes, low, zero, s, visit);
    VisitFour<kKind, 7>(codes, low, zero, s, visit);
  } else {
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) {
      const F32 left = LoadFloats<kKind>(codes, (within + k) * kTile);
      const F32 right = LoadFloats<kKind>(codes, (within + k) * kTile + 16);
      if (scaled) {
        visit(k, Mul(left, s[0]), Mul(right, s[1]));
      } else {
        visit(k, left, right);
      }
    }
  }
}

// sums[r] += x[r, 0..count) * w, column by column in order.
template <int kRows>
inline void FloatBlock(const float* x, int64_t ldx, int64_t count, const float (*w)[kTile], float (*sums)[kTile]) {
  for (int half = 0; half < 2; half += kVectors) {
    F32 f[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) f[r][v] = Load(sums[r] + 16 * (half + v));
    for (int64_t k = 0; k < count; ++k) {
      F32 weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = Load(w[k] + 16 * (half + v));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 xs = Splat(x[r * ldx + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) f[r][v] = Fma(xs, weights[v], f[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) Store(sums[r] + 16 * (half + v), f[r][v]);
  }
}

// As many rows as share one dequantised block: their sums stay in the first-level cache.
constexpr int64_t kFloatRows = 64;

template <Kind kKind>
void FloatTile(const Matrix& m, int64_t tile, const float* x, int64_t ldx, int64_t rows, float (*sums)[kTile]) {
  if (rows == 1) {  // decoding: straight from the codes
    F32 left = Splat(0.0f), right = Splat(0.0f);
    for (int64_t column = 0; column < m.columns; column += kBlock) {
      const int64_t count = m.columns - column < kBlock ? m.columns - column : kBlock;
      const float* block = x + column;
      VisitColumns<kKind>(m, tile, column, count, [&](int64_t k, F32 a, F32 b) __attribute__((always_inline)) {
        const F32 xs = Splat(block[k]);
        left = Fma(xs, a, left);
        right = Fma(xs, b, right);
      });
    }
    Store(sums[0], left);
    Store(sums[0] + 16, right);
    return;
  }
  alignas(64) float w[kBlock][kTile];
  std::memset(sums, 0, sizeof(float) * kTile * rows);
  for (int64_t column = 0; column < m.columns; column += kBlock) {
    const int64_t count = m.columns - column < kBlock ? m.columns - column : kBlock;
    VisitColumns<kKind>(m, tile, column, count, [&](int64_t k, F32 a, F32 b) __attribute__((always_inline)) {
      Store(w[k], a);
      Store(w[k] + 16, b);
    });
    int64_t row = 0;
    for (; row + kRowTile <= rows; row += kRowTile)
      FloatBlock<kRowTile>(x + row * ldx + column, ldx, count, w, sums + row);
    for (; row < rows; ++row) FloatBlock<1>(x + row * ldx + column, ldx, count, w, sums + row);
  }
}

using FloatTileFunction = void (*)(const Matrix&, int64_t, const float*, int64_t, int64_t, float (*)[kTile]);

inline FloatTileFunction FloatTileFor(Kind kind) {
  switch (kind) {
    case Kind::kInt3: return FloatTile<Kind::kInt3>;
    case Kind::kInt4: return FloatTile<Kind::kInt4>;
    case Kind::kInt5: return FloatTile<Kind::kInt5>;
    case Kind::kInt6: return FloatTile<Kind::kInt6>;
    case Kind::kInt8: return FloatTile<Kind::kInt8>;
    case Kind::kInt8Planes: return FloatTile<Kind::kInt8Planes>;
    case Kind::kFp8E4M3: return FloatTile<Kind::kFp8E4M3>;
    case Kind::kFloat16: return FloatTile<Kind::kFloat16>;
    case Kind::kBFloat16: return FloatTile<Kind::kBFloat16>;
    default: return FloatTile<Kind::kFloat32>;
  }
}

void LinearFloat(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t rows,
                 const Output& out) {
  alignas(64) float sums[kFloatRows][kTile], second[kFloatRows][kTile];
  const FloatTileFunction tile = FloatTileFor(m.kind);
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t row = 0; row < rows; row += kFloatRows) {
      const int64_t count = rows - row < kFloatRows ? rows - row : kFloatRows;
      tile(m, m.swiglu ? 2 * unit : unit, x + row * ldx, ldx, count, sums);
      if (m.swiglu) tile(m, 2 * unit + 1, x + row * ldx, ldx, count, second);
      FinishRows(m, unit, count, sums, second, out.From(row));
    }
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_LINEAR_FLOAT_IMPL_H_
