// Products with packed matrices, over the vectors of simd_*.h. Included after one of those.
//
// Integer products: a block of 32 columns is summed in int32, exactly; then one fused multiply-add a block joins it, with
// the product of the two scales, to the float32 sum of its row and column, blocks in order. Every instruction set does
// this arithmetic and no other, so they agree bit for bit.
#ifndef EDGELM_KERNELS_LINEAR_IMPL_H_
#define EDGELM_KERNELS_LINEAR_IMPL_H_

#include "kernels.h"
#include "math_impl.h"

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

#if defined(EDGELM_NEON_DOT)
#include "neon_dot_impl.h"
#else
// Rows of activations that one pass over a tile serves.
constexpr int kIntRows = kRowTile;

// Adds one block's dot products: lanes are columns 16 (half + v) .. of the tile, c[r][v].
// `more` is a second set of sums that shortens the chains of a single row.
template <Kind kKind, int kRows, int kVec>
inline __attribute__((always_inline)) void DotBlock(const uint8_t* codes, const uint8_t* low, int half, const int8_t* x,
                                                    int64_t stride, I32 (&c)[kRows][kVec], I32 (&more)[kRows][kVec]) {
  const int64_t at = 64 * half;
  if constexpr (kKind == Kind::kInt4 || kKind == kUpperPlane) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVec; ++v) {
        const B8 bytes = LoadB(codes + 128 * p + at + 64 * v);
        const B8 lower = LowNibbles(bytes), upper = HighNibbles(bytes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          c[r][v] = DotNibbles(c[r][v], lower, x + r * stride + 8 * p);
          I32& other = kRows == 1 ? more[r][v] : c[r][v];
          other = DotNibbles(other, upper, x + r * stride + 8 * p + 4);
        }
      }
    }
  } else if constexpr (kKind == Kind::kInt8) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 2
      for (int v = 0; v < kVec; ++v) {
        const B8 bytes = LoadB(codes + 128 * q + at + 64 * v);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          I32& sum = kRows == 1 && q % 2 ? more[r][v] : c[r][v];
          sum = DotFull(sum, bytes, x + r * stride + 4 * q);
        }
      }
    }
  } else if constexpr (kKind == Kind::kInt8Planes) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVec; ++v) {
        const B8 upper = LoadB(codes + 128 * p + at + 64 * v), lower = LoadB(low + 128 * p + at + 64 * v);
        const B8 first = JoinNibbles(LowNibbles(upper), LowNibbles(lower));
        const B8 second = JoinNibbles(HighNibbles(upper), HighNibbles(lower));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          c[r][v] = DotFull(c[r][v], first, x + r * stride + 8 * p);
          I32& other = kRows == 1 ? more[r][v] : c[r][v];
          other = DotFull(other, second, x + r * stride + 8 * p + 4);
        }
      }
    }
  } else {
    static_assert(kKind == Kind::kInt3);
#pragma GCC unroll 2
    for (int v = 0; v < kVec; ++v) {
      const B8 pairs0 = LoadB(codes + at + 64 * v), pairs1 = LoadB(codes + 128 + at + 64 * v);
      const B8 thirds = LoadB(codes + 256 + at + 64 * v);
      const B8 three[8] = {ThreeBits<0, 0>(pairs0, thirds), ThreeBits<1, 1>(pairs0, thirds),
                           ThreeBits<2, 2>(pairs0, thirds), ThreeBits<3, 3>(pairs0, thirds),
                           ThreeBits<0, 4>(pairs1, thirds), ThreeBits<1, 5>(pairs1, thirds),
                           ThreeBits<2, 6>(pairs1, thirds), ThreeBits<3, 7>(pairs1, thirds)};
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          I32& sum = kRows == 1 && q % 2 ? more[r][v] : c[r][v];
          sum = DotNibbles(sum, three[q], x + r * stride + 4 * q);
        }
      }
    }
  }
}
#endif

// The sums a block starts from: minus its zero point times the sum of the activations' codes.
template <Kind kKind>
inline I32 BlockStart(int32_t offset) {
  if constexpr (kKind == Kind::kInt4) return SplatI(offset);
  if constexpr (kKind == Kind::kInt3) return SplatI(offset / 2);
  if constexpr (kKind == kUpperPlane) return SplatI(0);
  if constexpr (kKind == Kind::kInt8 || kKind == Kind::kInt8Planes) {
    return kDotFullSigned ? SplatI(0) : ShiftLeftI<4>(SplatI(offset));
  }
}

template <Kind kKind>
inline I32 BlockStart(int32_t offset, I32 zeros) {
  const bool is_signed = kDotFullSigned && (kKind == Kind::kInt8 || kKind == Kind::kInt8Planes);
  return MulI(SubI(zeros, SplatI(is_signed ? 128 : 0)), SplatI(offset / 8));
}

// kRows rows times kVec * 16 columns of a tile, from column 16 * half on: sums[r][column of the tile].
template <Kind kKind, bool kZeros, int kRows, int kVec>
inline void IntTile(const Matrix& m, int64_t tile, int half, const QuantRows& x, float (*sums)[kTile]) {
  const uint8_t* record = m.data + tile * m.tile_bytes;
  const uint8_t* low = kKind == Kind::kInt8Planes ? m.low + tile * (m.columns / kBlock) * 512 : nullptr;
  const int64_t blocks_per_group = m.group / kBlock, stride = x.columns, all = x.blocks();
  F32 f[kRows][kVec];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVec; ++v) f[r][v] = Splat(0.0f);
  int64_t block = 0;
  for (int64_t g = 0; g < m.groups; ++g, record += m.record_bytes) {
    F32 s[kVec];
    I32 z[kVec];
    for (int v = 0; v < kVec; ++v) {
      s[v] = m.scale == ScaleKind::kFloat16 ? LoadHalf(reinterpret_cast<const uint16_t*>(record) + 16 * (half + v))
                                            : Load(reinterpret_cast<const float*>(record) + 16 * (half + v));
      if constexpr (kZeros) z[v] = LoadBytes(record + m.head_bytes - 64 + 16 * (half + v));
    }
    const uint8_t* codes = record + m.head_bytes;
    for (int64_t b = 0; b < blocks_per_group; ++b, ++block, codes += BlockCodeBytes(kKind)) {
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
      if (kKind == Kind::kInt8Planes) low += 512;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 xs = Splat(x.scales[r * all + block]);
#pragma GCC unroll 2
        for (int v = 0; v < kVec; ++v) {
          I32 total = kRows == 1 ? AddI(c[r][v], more[r][v]) : c[r][v];
          if constexpr (kKind == kUpperPlane) {  // 16 * upper + 8 - 128 = 16 * upper - 15 * 8
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

template <Kind kKind, bool kZeros, int kRows>
void IntTileRows(const Matrix& m, int64_t tile, const QuantRows& x, float (*sums)[kTile]) {
  constexpr int kVec = kRows == 1 ? 2 : kVectors;  // one row reads the file from front to back
  for (int half = 0; half < 2; half += kVec) IntTile<kKind, kZeros, kRows, kVec>(m, tile, half, x, sums);
}

using TileFunction = void (*)(const Matrix&, int64_t, const QuantRows&, float (*)[kTile]);

template <Kind kKind, bool kZeros>
TileFunction TileFor(int64_t rows) {
  static_assert(kIntRows <= 8);
  switch (rows) {
    case 1: return IntTileRows<kKind, kZeros, 1>;
    case 2: return IntTileRows<kKind, kZeros, 2>;
    case 3: return IntTileRows<kKind, kZeros, 3>;
    case 4: return IntTileRows<kKind, kZeros, 4>;
    case 5: return IntTileRows<kKind, kZeros, kIntRows >= 5 ? 5 : 1>;
    case 6: return IntTileRows<kKind, kZeros, kIntRows >= 6 ? 6 : 1>;
    case 7: return IntTileRows<kKind, kZeros, kIntRows >= 7 ? 7 : 1>;
    default: return IntTileRows<kKind, kZeros, kIntRows >= 8 ? 8 : 1>;
  }
}

inline TileFunction TileFor(Kind kind, bool zeros, int64_t rows) {
  switch (kind) {
    case Kind::kInt3: return zeros ? TileFor<Kind::kInt3, true>(rows) : TileFor<Kind::kInt3, false>(rows);
    case Kind::kInt4: return zeros ? TileFor<Kind::kInt4, true>(rows) : TileFor<Kind::kInt4, false>(rows);
    case Kind::kInt8: return zeros ? TileFor<Kind::kInt8, true>(rows) : TileFor<Kind::kInt8, false>(rows);
    case Kind::kInt8Planes: return TileFor<Kind::kInt8Planes, false>(rows);
    default: return TileFor<kUpperPlane, false>(rows);
  }
}

// What becomes of `rows` rows of a unit's sums: gate's in `sums`, up's in `second` where the matrix is SwiGLU.
inline void FinishRows(const Matrix& m, int64_t unit, int64_t rows, const float (*sums)[kTile],
                       const float (*second)[kTile], const Output& out) {
  const int64_t first = unit * kTile, width = m.outputs() - first;
  const int64_t left = width < 16 ? width : 16;
  const int64_t right = width < 16 ? 0 : width < kTile ? width - 16 : 16;
  for (int64_t r = 0; r < rows; ++r) {
    F32 a = Load(sums[r]), b = Load(sums[r] + 16);
    switch (out.finish) {
      case Finish::kStore: {
        float* y = out.y + r * out.ldy + first;
        if (out.residual != nullptr) {
          const float* add = out.residual + r * out.ldy + first;
          a = Add(a, LoadPart(add, left));
          b = Add(b, LoadPart(add + 16, right));
        }
        StorePart(y, a, left);
        StorePart(y + 16, b, right);
        break;
      }
      case Finish::kScatterAdd: {
        float* y = out.y + out.index[r] * out.ldy + first;
        const F32 weight = Splat(out.weight[r]);
        StorePart(y, Fma(weight, a, LoadPart(y, left)), left);
        StorePart(y + 16, Fma(weight, b, LoadPart(y + 16, right)), right);
        break;
      }
      case Finish::kSwiglu:
      case Finish::kSwigluQuant: {
        a = Mul(Silu(a), Load(second[r]));
        b = Mul(Silu(b), Load(second[r] + 16));
        if (out.finish == Finish::kSwiglu) {
          float* y = out.y + r * out.ldy + first;
          StorePart(y, a, left);
          StorePart(y + 16, b, right);
        } else {
          // Columns beyond the matrix's own have weights of 0, so what is quantised there is 0 too, or NaN with its row.
          const QuantRows q = out.quant.From(r);
          QuantBlock(a, b, q.codes + first, q.scales + unit, q.offsets + unit);
        }
        break;
      }
    }
  }
}

void LinearIntegerOf(Kind kind, const Matrix& m, int64_t begin, int64_t end, const QuantRows& x, int64_t rows,
                     const Output& out) {
  alignas(64) float sums[kIntRows][kTile], second[kIntRows][kTile];
  for (int64_t unit = begin; unit < end; ++unit) {
    // Passes of about equal size: one of a row or two costs nearly as much as a full one.
    int64_t passes = (rows + kIntRows - 1) / kIntRows;
    for (int64_t row = 0, count = 0; row < rows; row += count, --passes) {
      count = (rows - row + passes - 1) / passes;
      const TileFunction tile = TileFor(kind, m.zeros, count);
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

void LinearUpper(const Matrix& m, int64_t begin, int64_t end, const QuantRows& x, int64_t rows, const Output& out) {
  LinearIntegerOf(kUpperPlane, m, begin, end, x, rows, out);
}

// -- float activations -------------------------------------------------------------------------------------------------

template <Kind kKind>
inline F32 LoadFloats(const uint8_t* codes, int64_t element) {
  if constexpr (kKind == Kind::kFp8E4M3) return LoadFp8(codes + element);
  if constexpr (kKind == Kind::kFloat16) return LoadHalf(reinterpret_cast<const uint16_t*>(codes) + element);
  if constexpr (kKind == Kind::kBFloat16) return LoadBFloat16(reinterpret_cast<const uint16_t*>(codes) + element);
  return Load(reinterpret_cast<const float*>(codes) + element);
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
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const B8 a = FourColumns<kKind>(codes, low, q, 0), b = FourColumns<kKind>(codes, low, q, 1);
      const auto one = [&](int k, I32 left, I32 right) {
        visit(4 * q + k, Mul(ToFloat(SubI(left, zero[0])), s[0]), Mul(ToFloat(SubI(right, zero[1])), s[1]));
      };
      one(0, ByteOfLane<0>(a), ByteOfLane<0>(b));
      one(1, ByteOfLane<1>(a), ByteOfLane<1>(b));
      one(2, ByteOfLane<2>(a), ByteOfLane<2>(b));
      one(3, ByteOfLane<3>(a), ByteOfLane<3>(b));
    }
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

// -- rows --------------------------------------------------------------------------------------------------------------

void QuantizeRows(const float* x, int64_t ldx, int64_t rows, int64_t columns, const QuantRows& out) {
  for (int64_t r = 0; r < rows; ++r) {
    const QuantRows to = out.From(r);
    const float* from = x + r * ldx;
    for (int64_t block = 0; block < out.blocks(); ++block) {
      const int64_t left = columns - block * kBlock;
      const int64_t first = left < 16 ? left : 16, second = left < 16 ? 0 : left < 32 ? left - 16 : 16;
      const F32 a = LoadPart(from + block * kBlock, first), b = LoadPart(from + block * kBlock + 16, second);
      QuantBlock(a, b, to.codes + block * kBlock, to.scales + block, to.offsets + block);
    }
  }
}

void RmsNorm(const float* x, int64_t ldx, int64_t rows, int64_t columns, const float* weight, float eps, float* y,
             int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * ldx;
    float* to = y + r * ldy;
    F32 squares = Splat(0.0f);
    for (int64_t i = 0; i < columns; i += 16) {
      const F32 a = LoadPart(from + i, columns - i < 16 ? columns - i : 16);
      squares = Fma(a, a, squares);
    }
    const float mean = Sum(squares) / static_cast<float>(columns);
    const F32 factor = Splat(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(to + i, Mul(Mul(LoadPart(from + i, count), factor), LoadPart(weight + i, count)), count);
    }
  }
}

void Softmax(float* x, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, x += columns) {
    F32 top = Splat(-INFINITY);
    bool nan = false;
    for (int64_t i = 0; i < columns; ++i) nan |= __builtin_isnan(x[i]);
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      F32 a = LoadPart(x + i, count);
      if (count < 16) {  // the lanes beyond hold 0, which may be the largest
        float lanes[16];
        for (int l = 0; l < 16; ++l) lanes[l] = l < count ? x[i + l] : -INFINITY;
        a = Load(lanes);
      }
      top = Max(top, a);
    }
    const F32 most = nan ? Splat(NAN) : Splat(Largest(top));
    F32 sum = Splat(0.0f);
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(x + i, Exp(Sub(LoadPart(x + i, count), most)), count);
      sum = Add(sum, LoadPart(x + i, count));
    }
    const F32 total = Splat(Sum(sum));
    for (int64_t i = 0; i < columns; i += 16) {
      const int64_t count = columns - i < 16 ? columns - i : 16;
      StorePart(x + i, Div(LoadPart(x + i, count), total), count);
    }
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_LINEAR_IMPL_H_
