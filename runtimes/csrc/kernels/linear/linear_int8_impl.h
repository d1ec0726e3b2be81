// y = x W^T for integer W and int8 activations. Included after one of simd_*.h.
//
// The dot products of a block of 32 columns are summed in int32, exactly. Then one fused multiply-add per block adds
// the block's sum, times weight scale times activation scale, to the float32 result, blocks in order. Every instruction
// set does the same arithmetic, so results agree bit for bit.
#ifndef EDGELM_KERNELS_LINEAR_INT8_IMPL_H_
#define EDGELM_KERNELS_LINEAR_INT8_IMPL_H_

#include "linear_finish_impl.h"
#include "unpack_impl.h"

namespace edgelm {
namespace {

#if defined(EDGELM_NEON_DOT)
#include "kernels/simd/neon_dot_impl.h"
#else
// Rows of activations per pass over a tile.
constexpr int kIntRows = kRowTile;

// Add the dot products of columns 4 kQ .. 4 kQ + 3 of a block, for vectors [begin, end).
template <Kind kKind, int kRows, int kVec, int kQ>
inline EDGELM_FLAT void DotFour(const uint8_t* codes, const uint8_t* low, int half, int begin, int end, const int8_t* x,
                                int64_t stride, I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
#pragma GCC unroll 2
  for (int v = begin; v < end; ++v) {
    const B8 four = FourColumns<kKind, kQ>(codes, low, half + v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      I32& sum = kRows == 1 && kQ % 2 ? more[r][v] : c[r][v];
      const int8_t* columns = x + r * stride + 4 * kQ;
      sum = IsFull(kKind) ? DotFull(sum, four, columns) : DotSmall(sum, four, columns);
    }
  }
}

// Add the dot products of 16 columns of a block, the first or the second.
template <Kind kKind, int kRows, int kVec, int kWhich>
inline EDGELM_FLAT void DotHalf(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x, int64_t stride,
                                I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
  DotFour<kKind, kRows, kVec, 4 * kWhich>(codes, low, half, 0, kVec, x, stride, c, more);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 1>(codes, low, half, 0, kVec, x, stride, c, more);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 2>(codes, low, half, 0, kVec, x, stride, c, more);
  DotFour<kKind, kRows, kVec, 4 * kWhich + 3>(codes, low, half, 0, kVec, x, stride, c, more);
}

// Add one block's dot products: lanes are columns 16 (half + v) .. of the tile, c[r][v].
// `more` is a second set of sums; with a single row it shortens the dependency chains.
template <Kind kKind, int kRows, int kVec>
inline EDGELM_FLAT void DotBlock(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x, int64_t stride,
                                 I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
  // Bytes that are used more than twice stay in registers, which have room for one vector at a time.
  constexpr int kStep = HasParts(kKind) ? 1 : kVec;
#pragma GCC unroll 2
  for (int v = 0; v < kVec; v += kStep) {
    DotFour<kKind, kRows, kVec, 0>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 1>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 2>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 3>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 4>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 5>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 6>(codes, low, half, v, v + kStep, x, stride, c, more);
    DotFour<kKind, kRows, kVec, 7>(codes, low, half, v, v + kStep, x, stride, c, more);
  }
}
#endif

// The start value of a block's sums: minus the zero point times the sum of the activations' codes.
template <Kind kKind>
inline I32 BlockStart(int32_t offset) {
  if constexpr (kKind == kHighNibbles || (IsFull(kKind) && kDotFullSigned)) {
    return SplatI(0);
  } else if constexpr (kKind == Kind::kInt3) {
    return SplatI(offset / 2);
  } else if constexpr (kKind == Kind::kInt4) {
    return SplatI(offset);
  } else {
    return ShiftLeftI<kKind == Kind::kInt5 ? 1 : kKind == Kind::kInt6 ? 2 : 4>(SplatI(offset));
  }
}

template <Kind kKind>
inline I32 BlockStart(int32_t offset, I32 zeros) {
  return MulI(SubI(zeros, SplatI(IsFull(kKind) && kDotFullSigned ? 128 : 0)), SplatI(offset / 8));
}

// sums[r][column of the tile] for kRows rows and kVec * 16 columns of a tile, from column 16 * half on.
template <Kind kKind, bool kZeros, int kRows, int kVec>
inline void IntTile(const Matrix& m, int64_t tile, int half, const QuantRows& x, float (*sums)[kTile]) {
  const uint8_t* record = m.data + tile * m.tile_bytes;
  const uint8_t* low = kKind == Kind::kInt8Split ? m.low + tile * m.low_bytes() : nullptr;
  const int64_t blocks_per_record = m.span / kBlock, stride = x.columns, all = x.blocks();
  F32 f[kRows][kVec];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVec; ++v) f[r][v] = Splat(0.0f);
  int64_t block = 0;
  for (int64_t g = 0; g < m.records; ++g, record += m.record_bytes) {
    F32 s[kVec];
    I32 z[kVec];
    for (int v = 0; v < kVec; ++v) {
      s[v] = m.scale == ScaleKind::kFloat16 ? LoadHalf(reinterpret_cast<const uint16_t*>(record) + 16 * (half + v))
                                            : Load(reinterpret_cast<const float*>(record) + 16 * (half + v));
      if constexpr (kZeros) z[v] = LoadBytes(record + m.head_bytes - 64 + 16 * (half + v));
    }
    const uint8_t* codes = record + m.head_bytes;
    // The last record may be padded with blocks beyond the activations.
    const int64_t end = block + blocks_per_record < all ? block + blocks_per_record : all;
    for (; block < end; ++block, codes += BlockCodeBytes(kKind)) {
      I32 c[kRows][kVec], more[kRows][kVec];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVec; ++v) {
          const int32_t offset = x.offsets[r * all + block];
          if constexpr (kZeros) {
            c[r][v] = BlockStart<kKind>(offset, z[v]);
          } else {
            c[r][v] = BlockStart<kKind>(offset);
          }
          if (kRows == 1) more[r][v] = SplatI(0);
        }
      }
      DotBlock<kKind, kRows, kVec>(codes, low, half, x.codes + block * kBlock, stride, c, more);
      if (kKind == Kind::kInt8Split) low += 512;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 xs = Splat(x.scales[r * all + block]);
#pragma GCC unroll 2
        for (int v = 0; v < kVec; ++v) {
          I32 total = kRows == 1 ? AddI(c[r][v], more[r][v]) : c[r][v];
          if constexpr (kKind == kHighNibbles) {  // 16 * high + 8 - 128 = 16 * high - 15 * 8
            total = AddI(ShiftLeftI<4>(total), SplatI(15 * x.offsets[r * all + block]));
          }
          f[r][v] = Fma(ToFloat(total), Mul(s[v], xs), f[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVec; ++v) Store(sums[r] + 16 * (half + v), f[r][v]);
}

// The same for groups of 16: each half of a block is scaled and added separately.
template <Kind kKind, bool kZeros, int kRows, int kVec>
inline void IntTileHalves(const Matrix& m, int64_t tile, int half, const QuantRows& x, float (*sums)[kTile]) {
  const uint8_t* record = m.data + tile * m.tile_bytes;
  const uint8_t* low = kKind == Kind::kInt8Split ? m.low + tile * m.low_bytes() : nullptr;
  const int64_t stride = x.columns, all = x.blocks();
  F32 f[kRows][kVec];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVec; ++v) f[r][v] = Splat(0.0f);
  for (int64_t block = 0; block < m.records; ++block, record += m.record_bytes) {
    const uint8_t* codes = record + m.head_bytes;
    const int8_t* columns = x.codes + block * kBlock;
    for (int which = 0; which < 2; ++which) {
      const uint8_t* scales = record + which * m.scale_bytes();
      I32 c[kRows][kVec], more[kRows][kVec];
      int32_t offsets[kRows];
      for (int r = 0; r < kRows; ++r) {
        int32_t sum = 0;
        for (int k = 0; k < kHalf; ++k) sum += columns[r * stride + which * kHalf + k];
        offsets[r] = -8 * sum;
        for (int v = 0; v < kVec; ++v) {
          if constexpr (kZeros) {
            c[r][v] = BlockStart<kKind>(offsets[r], LoadBytes(codes - 128 + 64 * which + 16 * (half + v)));
          } else {
            c[r][v] = BlockStart<kKind>(offsets[r]);
          }
          more[r][v] = SplatI(0);
        }
      }
      if (which == 0) {
        DotHalf<kKind, kRows, kVec, 0>(codes, low, half, columns, stride, c, more);
      } else {
        DotHalf<kKind, kRows, kVec, 1>(codes, low, half, columns, stride, c, more);
      }
      for (int v = 0; v < kVec; ++v) {
        const F32 s = m.scale == ScaleKind::kFloat16
                          ? LoadHalf(reinterpret_cast<const uint16_t*>(scales) + 16 * (half + v))
                          : Load(reinterpret_cast<const float*>(scales) + 16 * (half + v));
        for (int r = 0; r < kRows; ++r) {
          I32 total = AddI(c[r][v], more[r][v]);
          if constexpr (kKind == kHighNibbles) total = AddI(ShiftLeftI<4>(total), SplatI(15 * offsets[r]));
          f[r][v] = Fma(ToFloat(total), Mul(s, Splat(x.scales[r * all + block])), f[r][v]);
        }
      }
    }
    if (kKind == Kind::kInt8Split) low += 512;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVec; ++v) Store(sums[r] + 16 * (half + v), f[r][v]);
}

template <Kind kKind, bool kZeros, int kRows>
void IntTileRowsOfHalves(const Matrix& m, int64_t tile, const QuantRows& x, float (*sums)[kTile]) {
  for (int half = 0; half < 2; ++half) IntTileHalves<kKind, kZeros, kRows, 1>(m, tile, half, x, sums);
}

template <Kind kKind, bool kZeros, int kRows>
void IntTileRows(const Matrix& m, int64_t tile, const QuantRows& x, float (*sums)[kTile]) {
  constexpr int kVec = kRows == 1 ? 2 : kVectors;  // one row reads the file from front to back
  for (int half = 0; half < 2; half += kVec) IntTile<kKind, kZeros, kRows, kVec>(m, tile, half, x, sums);
}

using TileFunction = void (*)(const Matrix&, int64_t, const QuantRows&, float (*)[kTile]);

// Rows of activations per pass over groups of 16. Such groups are rare: two versions of the code are enough.
constexpr int kHalvesRows = 2;

template <Kind kKind, bool kZeros>
TileFunction TileOfHalvesFor(int64_t rows) {
  return rows == 1 ? IntTileRowsOfHalves<kKind, kZeros, 1> : IntTileRowsOfHalves<kKind, kZeros, kHalvesRows>;
}

template <Kind kKind, bool kZeros>
TileFunction TileFor(const Matrix& m, int64_t rows) {
  if (m.halves()) return TileOfHalvesFor<kKind, kZeros>(rows);
  static_assert(kIntRows <= 8);
  switch (rows) {
    case 1: return IntTileRows<kKind, kZeros, 1>;
    case 2: return IntTileRows<kKind, kZeros, (kIntRows >= 2 ? 2 : 1)>;
    case 3: return IntTileRows<kKind, kZeros, (kIntRows >= 3 ? 3 : 1)>;
    case 4: return IntTileRows<kKind, kZeros, (kIntRows >= 4 ? 4 : 1)>;
    case 5: return IntTileRows<kKind, kZeros, (kIntRows >= 5 ? 5 : 1)>;
    case 6: return IntTileRows<kKind, kZeros, (kIntRows >= 6 ? 6 : 1)>;
    case 7: return IntTileRows<kKind, kZeros, (kIntRows >= 7 ? 7 : 1)>;
    default: return IntTileRows<kKind, kZeros, (kIntRows >= 8 ? 8 : 1)>;
  }
}

inline TileFunction TileFor(Kind kind, const Matrix& m, int64_t rows) {
  switch (kind) {
    case Kind::kInt3: return m.zeros ? TileFor<Kind::kInt3, true>(m, rows) : TileFor<Kind::kInt3, false>(m, rows);
    case Kind::kInt4: return m.zeros ? TileFor<Kind::kInt4, true>(m, rows) : TileFor<Kind::kInt4, false>(m, rows);
    case Kind::kInt5: return m.zeros ? TileFor<Kind::kInt5, true>(m, rows) : TileFor<Kind::kInt5, false>(m, rows);
    case Kind::kInt6: return m.zeros ? TileFor<Kind::kInt6, true>(m, rows) : TileFor<Kind::kInt6, false>(m, rows);
    case Kind::kInt8: return m.zeros ? TileFor<Kind::kInt8, true>(m, rows) : TileFor<Kind::kInt8, false>(m, rows);
    case Kind::kInt8Split: return TileFor<Kind::kInt8Split, false>(m, rows);
    default: return TileFor<kHighNibbles, false>(m, rows);
  }
}

void LinearIntegerOf(Kind kind, const Matrix& m, int64_t begin, int64_t end, const QuantRows& x, int64_t rows,
                     const Output& out) {
  constexpr int kMost = kIntRows > kHalvesRows ? kIntRows : kHalvesRows;
  alignas(64) float sums[kMost][kTile], second[kMost][kTile];
  const int64_t most = m.halves() ? kHalvesRows : kIntRows;
  for (int64_t unit = begin; unit < end; ++unit) {
    // Make passes of about equal size: a pass of one or two rows costs nearly as much as a full one.
    int64_t passes = (rows + most - 1) / most;
    for (int64_t row = 0, count = 0; row < rows; row += count, --passes) {
      count = (rows - row + passes - 1) / passes;
      const TileFunction tile = TileFor(kind, m, count);
      const QuantRows part = x.From(row);
      tile(m, m.swiglu ? 2 * unit : unit, part, sums);
      if (m.swiglu) tile(m, 2 * unit + 1, part, second);
      FinishRows(m, unit, count, sums, second, out.From(row));
    }
  }
}

void LinearInt8(const Matrix& m, int64_t begin, int64_t end, const QuantRows& x, int64_t rows, const Output& out) {
  LinearIntegerOf(m.kind, m, begin, end, x, rows, out);
}

void LinearHigh(const Matrix& m, int64_t begin, int64_t end, const QuantRows& x, int64_t rows, const Output& out) {
  LinearIntegerOf(kHighNibbles, m, begin, end, x, rows, out);
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_LINEAR_INT8_IMPL_H_
