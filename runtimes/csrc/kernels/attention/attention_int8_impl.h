// Attention over caches of int8: scores and weighted sums by integer dot products. Queries are quantised to int8 with
// one scale per head. The weights of a block's values (probability times the value's scale) are quantised to int8 with
// one step per row and block, in one or two levels:
//   fine    high + low / 254, 15 bits. With one level, weights below 1/254 of the block's largest would be lost, and
//           with them most of a flat distribution beside one peak.
//   coarse  one level, rounded with dither: a pattern of offsets that makes errors cancel over tokens, so that small
//           weights survive in the sum. Used for blocks whose largest weight is at most 1/16 of the row's sum so far:
//           each adds noise of at most 0.4/127 * sqrt(128) / 16 = 0.2 % of a value, no more than its rounding to int8.
#ifndef EDGELM_KERNELS_ATTENTION_INT8_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_INT8_IMPL_H_

#include "attention_unit_impl.h"

namespace edgelm {
namespace {

// c[r][v] += dot products of four codes with the four int8 at x + r * stride.
template <int kRows, int kVec>
inline EDGELM_FLAT void Dots(I32 (&c)[kRows][kVec], const B8 (&codes)[kVec], const int8_t* x, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = DotFull(c[r][v], codes[v], x + r * stride);
}

// Scores of kRows rows with kVec tiles. With few rows, several sums per row shorten the dependency chains.
template <bool kFew, int kRows, int kVec>
__attribute__((noinline)) void Int8Scores(const uint8_t* const* tiles, const uint8_t* ahead, int64_t fours,
                                          const int8_t* q, int64_t stride, const float* steps, const int32_t* sums,
                                          float* s) {
  constexpr int kChains = kRows * kVec <= 2 ? 4 : kRows * kVec <= 4 ? 2 : 1;
  I32 c[kChains][kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) {
      c[0][r][v] = SplatI(kDotFullSigned ? 0 : -128 * sums[r]);
#pragma GCC unroll 8
      for (int chain = 1; chain < kChains; ++chain) c[chain][r][v] = SplatI(0);
    }
  }
  const auto add = [&](I32(&to)[kRows][kVec], int64_t i) EDGELM_FLAT {
    B8 codes[kVec];
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) codes[v] = LoadB(tiles[v] + 64 * i);
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) CallFor<kFew>(ahead + 64 * (kVec * i + v));
    Dots<kRows, kVec>(to, codes, q + 4 * i, stride);
  };
  constexpr int kUnroll = kChains == 1 ? 4 : kChains;
  int64_t i = 0;
  for (; i + kUnroll <= fours; i += kUnroll) {
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) add(c[j % kChains], i + j);
  }
  for (; i < fours; ++i) add(c[0], i);
#pragma GCC unroll 8
  for (int v = 0; v < kVec; ++v) CallFor<kFew>(ahead + 64 * (kVec * fours + v));
#pragma GCC unroll 8
  for (int v = 0; v < kVec; ++v) {
    const F32 scales = Load(reinterpret_cast<const float*>(tiles[v] + 64 * fours));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int chain = 1; chain < kChains; ++chain) c[0][r][v] = AddI(c[0][r][v], c[chain][r][v]);
      Store(s + r * kKeyBlock + 16 * v, Mul(Mul(ToFloat(c[0][r][v]), Splat(steps[r])), scales));
    }
  }
}

// Offsets of -0.5 .. 0.5 by the golden ratio, so that those of neighbouring tokens are spread evenly.
struct Dither {
  alignas(64) float offsets[kKeyBlock];
  constexpr Dither() : offsets() {
    double x = 0.25;
    for (float& offset : offsets) {
      x += 0.6180339887498949;
      if (x >= 1.0) x -= 1.0;
      offset = static_cast<float>(x - 0.5);
    }
  }
};
constexpr Dither kDither;

// Quantise a row's weights and append them to the `rows` code rows. `spoilt`: one of the weights is NaN.
inline int64_t QuantWeights(const Unit& u, int64_t rows, int64_t r, int64_t valid, int64_t padded, float largest,
                            bool spoilt) {
  const float* w = u.scores + r * kKeyBlock;
  const float before = u.weights[r] * u.factors[r];
  const bool coarse = valid == kKeyBlock && 16.0f * largest <= before && !spoilt;
  int8_t* low = u.codes + rows * kKeyBlock;
  int8_t* high = coarse ? low : low + kKeyBlock;
  const int64_t at = coarse ? rows : rows + 1;
  if (spoilt || largest < 0x1p-100f) {
    std::memset(low, 0, kKeyBlock);
    u.steps[rows] = spoilt ? NAN : 0.0f;
    u.starts[rows] = 0;
    u.targets[rows] = static_cast<int32_t>(r);
    u.weights[r] = before;
    return rows + 1;
  }
  I32 both = SplatI(0);  // sums of `high` times 2^16 + sums of `low`, which are within +-127 * kKeyBlock
  static_assert(127 * kKeyBlock < 32768);
  float step;
  int64_t i = 0;
  if (coarse) {
    step = largest / 126.49f;  // so that no code exceeds 127 after its offset is added
    const F32 inverse = Splat(126.49f / largest);
    for (; i < valid; i += 16) {
      const I32 a = Round(Fma(Load(w + i), inverse, Load(kDither.offsets + i)));
      StoreBytes(high + i, a);
      both = AddI(both, a);
    }
    both = ShiftLeftI<16>(both);
  } else {
    step = largest / 127.0f;
    const F32 inverse = Splat(127.0f / largest);
    for (; i < valid; i += 16) {
      const F32 x = Mul(Load(w + i), inverse);
      const I32 a = Round(x), b = Round(Mul(Sub(x, ToFloat(a)), Splat(254.0f)));
      StoreBytes(high + i, a);
      StoreBytes(low + i, b);
      both = AddI(both, AddI(ShiftLeftI<16>(a), b));
    }
    for (; i < padded; i += 16) {
      StoreBytes(high + i, SplatI(0));
      StoreBytes(low + i, SplatI(0));
    }
  }
  const int32_t sum = SumI(both), lows = static_cast<int16_t>(sum & 0xFFFF), highs = (sum - lows) / 65536;
  u.weights[r] = __builtin_fmaf(step, static_cast<float>(highs), before);
  u.steps[rows] = step / 254.0f;  // overwritten if coarse
  u.steps[at] = step;
  u.starts[rows] = kDotFullSigned ? 0 : -128 * lows;
  u.starts[at] = kDotFullSigned ? 0 : -128 * highs;
  u.targets[rows] = u.targets[at] = static_cast<int32_t>(r);
  return at + 1;
}

// acc[target, dims ..] += values of the block, weighted by kRows rows of codes.
template <bool kFew, int kRows, int kVec>
__attribute__((noinline)) void Int8Sums(const Unit& u, int64_t row, int64_t count, int64_t dims,
                                        const uint8_t* const* tiles, const uint8_t* ahead) {
  const int64_t dim = u.call->head_dim;
  const int8_t* x = u.codes + row * kKeyBlock;
  I32 c[kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = SplatI(u.starts[row + r]);
  for (int64_t t = 0; t < count; t += 16) {
    const uint8_t* four = tiles[t / 16] + 4 * dims;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, four += 4 * dim) {
      B8 codes[kVec];
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) {
        codes[v] = LoadB(four + 64 * v);
        CallFor<kFew>(ahead + 64 * v);
      }
      if (kFew) ahead += 64 * kVec;
      Dots<kRows, kVec>(c, codes, x + t + 4 * i, kKeyBlock);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 step = Splat(u.steps[row + r]);
    float* acc = u.accumulators + u.targets[row + r] * u.at.width + dims;
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) Store(acc + 16 * v, Fma(ToFloat(c[r][v]), step, Load(acc + 16 * v)));
  }
}

// Copy a tile with fewer than 16 tokens, or of keys with head_dim % 4 != 0, to the layout that the kernels read:
// `codes` bytes, padded with zeros, then 16 scales.
template <bool kKey>
inline void UpcastCodes(const HeadCache& cache, int64_t tile, int64_t codes, uint8_t* to) {
  const int64_t n = cache.Tokens(tile), dim = cache.head_dim;
  const uint8_t* from = cache.Tile(tile);
  std::memset(to, 0, codes + 64);
  for (int64_t slot = 0; slot < n; ++slot) {
    for (int64_t d = 0; d < dim; ++d) {
      if (kKey) {
        to[d / 4 * 64 + 4 * slot + d % 4] = from[KeyCode(d, slot, n, dim)];
      } else {
        to[slot / 4 * 4 * dim + 4 * d + slot % 4] = from[ValueCode(d, slot, n, dim)];
      }
    }
  }
  std::memcpy(to + codes, from + n * dim, 4 * n);
}

struct Int8View {
  const uint8_t* keys[kBlockTiles];
  const uint8_t* values[kBlockTiles];
  const uint8_t* values_ahead;
  const uint8_t* keys_ahead;
};

inline Int8View ViewInt8(const Unit& u, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const HeadCache keys = Cache(call, call.key, u.head), values = Cache(call, call.value, u.head);
  const int64_t dim = call.head_dim, first = begin / kCacheTile;
  Int8View view;
  view.values_ahead = values.Tile(first);
  view.keys_ahead = keys.Tile(begin + count < call.total() ? first + kBlockTiles : first);
  for (int64_t i = 0; 16 * i < count; ++i) {
    const int64_t at = i * 16 * (u.at.width + 16);
    view.keys[i] = keys.Tile(first + i);
    view.values[i] = values.Tile(first + i);
    if (dim % 4 != 0 || keys.Tokens(first + i) < 16) {
      UpcastCodes<true>(keys, first + i, (dim + 3) / 4 * 64, u.keys + at);
      view.keys[i] = u.keys + at;
    }
    if (values.Tokens(first + i) < 16) {
      UpcastCodes<false>(values, first + i, 16 * dim, u.values + at);
      view.values[i] = u.values + at;
    }
  }
  return view;
}

template <bool kFew>
void AttendInt8(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const Int8View view = ViewInt8(u, begin, count);
  const int64_t dim = call.head_dim, width = u.at.width, padded = RoundUp(count, 16), tiles = padded / 16;
  const int8_t* queries = reinterpret_cast<const int8_t*>(call.scratch + u.at.queries) + u.query * width;
  const float* steps = reinterpret_cast<const float*>(call.scratch + u.at.query_scales) + u.query;
  const int32_t* sums = reinterpret_cast<const int32_t*>(call.scratch + u.at.query_sums) + u.query;
  constexpr int64_t kSome = kFew ? 1 : 4;
  for (int64_t tile = 0; tile < tiles; tile += kSome) {
    const int64_t some = tiles - tile < kSome ? tiles - tile : kSome;
    EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) EDGELM_FLAT {
      constexpr int kRows = decltype(rows)::kValue;
      const int64_t row = from + r;
      EachTile<kFew ? 1 : kVectors>(some, [&](auto vecs, int64_t v) EDGELM_FLAT {
        Int8Scores<kFew, kRows, decltype(vecs)::kValue>(
            view.keys + tile + v, view.values_ahead + (tile + v) * 16 * (dim + 4), (dim + 3) / 4, queries + row * width,
            width, steps + row, sums + row, u.scores + row * kKeyBlock + 16 * (tile + v));
      });
    });
  }
  // The scale of a value that is not finite is NaN.
  alignas(64) float scales[kKeyBlock];
  for (int64_t i = 0; i < tiles; ++i) std::memcpy(scales + 16 * i, view.values[i] + 16 * dim, 64);
  int64_t finite = 0;
  while (finite < count && scales[finite] == scales[finite]) ++finite;
  UpdateTops(u, from, begin, count);
  int64_t code_rows = 0;
  for (int64_t r = from; r < u.rows; ++r) {
    const int64_t valid = u.Seen(r, begin, count);
    float largest;
    const float sum = Exponentials<true>(u.scores + r * kKeyBlock, valid, u.tops[r], scales, &largest);
    UpdateSum(u, r, sum);
    code_rows = QuantWeights(u, code_rows, r, valid, padded, largest, valid > finite || !(sum == sum));
  }
  EachTile<kQueryTile>(code_rows, [&](auto rows, int64_t r) EDGELM_FLAT {
    constexpr int kRows = decltype(rows)::kValue;
    EachTile<VectorsFor(kRows)>(width / 16, [&](auto vecs, int64_t v) EDGELM_FLAT {
      Int8Sums<kFew, kRows, decltype(vecs)::kValue>(u, r, count, 16 * v, view.values,
                                                    view.keys_ahead + v * 16 * padded);
    });
  });
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_INT8_IMPL_H_
