// y = x W^T for any kind of W and float32 activations, summed column by column in order. Included after one of
// simd_*.h.
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

// Scales and zero points of rows 0..15 and 16..31 of a tile, for one group.
struct Factors {
  F32 scale[2];
  I32 zero[2];
};

// Load them. `half`: which group, in a record that holds two.
template <Kind kKind>
inline Factors LoadFactors(const Matrix& m, const uint8_t* record, int64_t half) {
  Factors f = {{Splat(1.0f), Splat(1.0f)}, {SplatI(0), SplatI(0)}};
  const uint8_t* scales = record + half * m.scale_bytes();
  for (int i = 0; i < 2; ++i) {
    if (m.scale == ScaleKind::kFloat16) f.scale[i] = LoadHalf(reinterpret_cast<const uint16_t*>(scales) + 16 * i);
    if (m.scale == ScaleKind::kFloat32) f.scale[i] = Load(reinterpret_cast<const float*>(scales) + 16 * i);
  }
  if constexpr (kKind < Kind::kFp8E4M3) {
    f.zero[0] = f.zero[1] = SplatI(SymmetricZero(kKind));
    const uint8_t* zeros = record + m.head_bytes - (m.halves() ? 128 - 64 * half : 64);
    for (int i = 0; i < 2 && m.zeros; ++i) f.zero[i] = LoadBytes(zeros + 16 * i);
  }
  return f;
}

// VisitColumns for columns 4 kQ .. 4 kQ + 3 of a block of integer codes.
template <Kind kKind, int kQ, typename Visit>
inline EDGELM_FLAT void VisitFour(const uint8_t* codes, const uint8_t* low, const Factors& f, Visit visit) {
  const B8 a = FourColumns<kKind, kQ>(codes, low, 0), b = FourColumns<kKind, kQ>(codes, low, 1);
  const auto one = [&](int k, I32 left, I32 right) EDGELM_FLAT {
    visit(4 * kQ + k, Mul(ToFloat(SubI(left, f.zero[0])), f.scale[0]),
          Mul(ToFloat(SubI(right, f.zero[1])), f.scale[1]));
  };
  one(0, ByteOfLane<0>(a), ByteOfLane<0>(b));
  one(1, ByteOfLane<1>(a), ByteOfLane<1>(b));
  one(2, ByteOfLane<2>(a), ByteOfLane<2>(b));
  one(3, ByteOfLane<3>(a), ByteOfLane<3>(b));
}

// Call visit(k, left, right) for up to 32 columns of a tile in order, with the weights of its rows 0..15 and 16..31 as
// float32. Integer weights are exact: 8 bits times a float16's 11. For integers all 32 columns of the block are
// visited, whatever `count` is.
template <Kind kKind, typename Visit>
inline EDGELM_FLAT void VisitColumns(const Matrix& m, int64_t tile, int64_t column, int64_t count, Visit visit) {
  const int64_t g = column / m.span, within = column - g * m.span;
  const uint8_t* record = m.data + tile * m.tile_bytes + g * m.record_bytes;
  const uint8_t* codes = record + m.head_bytes;
  Factors f = LoadFactors<kKind>(m, record, 0);
  if constexpr (kKind < Kind::kFp8E4M3) {
    codes += within / kBlock * BlockCodeBytes(kKind);
    const uint8_t* low = kKind == Kind::kInt8Split ? m.low + tile * m.low_bytes() + column / kBlock * 512 : nullptr;
    VisitFour<kKind, 0>(codes, low, f, visit);
    VisitFour<kKind, 1>(codes, low, f, visit);
    VisitFour<kKind, 2>(codes, low, f, visit);
    VisitFour<kKind, 3>(codes, low, f, visit);
    if (m.halves()) f = LoadFactors<kKind>(m, record, 1);
    VisitFour<kKind, 4>(codes, low, f, visit);
    VisitFour<kKind, 5>(codes, low, f, visit);
    VisitFour<kKind, 6>(codes, low, f, visit);
    VisitFour<kKind, 7>(codes, low, f, visit);
  } else {
    const bool scaled = m.scale != ScaleKind::kNone;
    const auto some = [&](int64_t begin, int64_t end) EDGELM_FLAT {
#pragma GCC unroll 4
      for (int64_t k = begin; k < end; ++k) {
        const F32 left = LoadFloats<kKind>(codes, (within + k) * kTile);
        const F32 right = LoadFloats<kKind>(codes, (within + k) * kTile + 16);
        if (scaled) {
          visit(k, Mul(left, f.scale[0]), Mul(right, f.scale[1]));
        } else {
          visit(k, left, right);
        }
      }
    };
    const int64_t first = m.halves() && count > kHalf ? kHalf : count;
    some(0, first);
    if (first == count) return;
    f = LoadFactors<kKind>(m, record, 1);
    some(first, count);
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

// Rows that share one dequantised block: their sums stay in the L1 cache.
constexpr int64_t kFloatRows = 64;

template <Kind kKind>
void FloatTile(const Matrix& m, int64_t tile, const float* x, int64_t ldx, int64_t rows, float (*sums)[kTile]) {
  int64_t start = 0;
  if (rows == 1) {  // decoding: convert the codes in registers
    F32 left = Splat(0.0f), right = Splat(0.0f);
    // All 32 columns of a block of integers are visited, so a padded block is left to the code for several rows.
    const int64_t end = kKind < Kind::kFp8E4M3 ? m.columns / kBlock * kBlock : m.columns;
    for (int64_t column = 0; column < end; column += kBlock) {
      const int64_t count = end - column < kBlock ? end - column : kBlock;
      const float* block = x + column;
      VisitColumns<kKind>(m, tile, column, count, [&](int64_t k, F32 a, F32 b) EDGELM_FLAT {
        const F32 xs = Splat(block[k]);
        left = Fma(xs, a, left);
        right = Fma(xs, b, right);
      });
    }
    Store(sums[0], left);
    Store(sums[0] + 16, right);
    if (end == m.columns) return;
    start = end;
  } else {
    std::memset(sums, 0, sizeof(float) * kTile * rows);
  }
  alignas(64) float w[kBlock][kTile];
  for (int64_t column = start; column < m.columns; column += kBlock) {
    const int64_t count = m.columns - column < kBlock ? m.columns - column : kBlock;
    VisitColumns<kKind>(m, tile, column, count, [&](int64_t k, F32 a, F32 b) EDGELM_FLAT {
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
    case Kind::kInt8Split: return FloatTile<Kind::kInt8Split>;
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
