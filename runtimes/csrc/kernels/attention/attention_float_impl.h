// Attention over caches of float32 and float16: scores and weighted sums in float32.
#ifndef EDGELM_KERNELS_ATTENTION_FLOAT_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_FLOAT_IMPL_H_

#include "attention_unit_impl.h"

namespace edgelm {
namespace {

inline F32 LoadElements(const float* p) { return Load(p); }
inline F32 LoadElements(const uint16_t* p) { return LoadHalf(p); }

// Scores of kRows query rows with kVec tiles of 16 tokens. kFew: sum even and odd dimensions separately, since a single
// tile would be one dependent chain of additions.
template <typename T, bool kFew, int kRows, int kVec>
__attribute__((noinline)) void FloatScores(const uint8_t* const* tiles, const uint8_t* ahead, const float* q,
                                           int64_t stride, int64_t head_dim, float* s) {
  constexpr int kChains = kFew ? 2 : 1;
  F32 f[kChains][kRows][kVec];
  for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) f[chain][r][v] = Splat(0.0f);
  for (int64_t d = 0; d < head_dim; d += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) {
      F32 k[kVec];
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) k[v] = LoadElements(reinterpret_cast<const T*>(tiles[v]) + 16 * (d + chain));
      if (sizeof(T) == 4 || chain == 0) CallFor<kFew>(ahead + 16 * sizeof(T) * d + 64 * chain);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F32 x = Splat(q[r * stride + d + chain]);
#pragma GCC unroll 8
        for (int v = 0; v < kVec; ++v) f[chain][r][v] = Fma(x, k[v], f[chain][r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) {
      if (kFew) f[0][r][v] = Add(f[0][r][v], f[kChains - 1][r][v]);
      Store(s + r * kKeyBlock + 16 * v, f[0][r][v]);
    }
}

// acc[r, 16 v ..] += p[r, t] * values[t, 16 v ..] for `count` tokens t in order.
template <typename T, bool kFew, int kRows, int kVec>
__attribute__((noinline)) void FloatSums(const float* p, int64_t count, const T* values, int64_t stride,
                                         const uint8_t* ahead, float* acc, int64_t width) {
  constexpr int kLines = kVec * sizeof(T) / 4;
  F32 f[kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) f[r][v] = Load(acc + r * width + 16 * v);
  for (int64_t t = 0; t < count; ++t) {
    F32 x[kVec];
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) x[v] = LoadElements(values + t * stride + 16 * v);
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line) CallFor<kFew>(ahead + 64 * (t * kLines + line));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 w = Splat(p[r * kKeyBlock + t]);
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) f[r][v] = Fma(w, x[v], f[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) Store(acc + r * width + 16 * v, f[r][v]);
}

// Pointers to a block's keys and values, and to what is prefetched meanwhile.
template <typename T>
struct FloatView {
  const uint8_t* keys[kBlockTiles];
  const T* values;
  int64_t stride;
  const uint8_t* values_ahead;
  const uint8_t* keys_ahead;
};

// Attend the rows from `from` on to a block; each sees at least the block's first token.
template <typename T, bool kFew>
inline void FloatRows(const Unit& u, int64_t from, int64_t begin, int64_t count, const FloatView<T>& view) {
  const int64_t width = u.at.width, dim = u.call->head_dim, tiles = RoundUp(count, 16) / 16;
  const float* queries = reinterpret_cast<const float*>(u.call->scratch + u.at.queries) + u.query * width;
  constexpr int64_t kSome = kFew ? 1 : 4;
  for (int64_t tile = 0; tile < tiles; tile += kSome) {
    const int64_t some = tiles - tile < kSome ? tiles - tile : kSome;
    const uint8_t* ahead = view.values_ahead + tile * 16 * dim * sizeof(T);
    EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) EDGELM_FLAT {
      const float* q = queries + (from + r) * width;
      float* s = u.scores + (from + r) * kKeyBlock + 16 * tile;
      EachTile<kFew ? 1 : kVectors>(some, [&](auto vecs, int64_t v) EDGELM_FLAT {
        FloatScores<T, kFew, decltype(rows)::kValue, decltype(vecs)::kValue>(view.keys + tile + v, ahead, q, width, dim,
                                                                             s + 16 * v);
      });
    });
  }
  UpdateTops(u, from, begin, count);
  for (int64_t r = from; r < u.rows; ++r) {
    float* s = u.scores + r * kKeyBlock;
    UpdateSum(u, r, Exponentials<false>(s, u.Seen(r, begin, count), u.tops[r], nullptr, nullptr));
  }
  EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) EDGELM_FLAT {
    constexpr int kRows = decltype(rows)::kValue;
    // All rows see what the first row sees. Later tokens go row by row: masking by weight 0 fails if the value is NaN.
    const int64_t common = u.Seen(from + r, begin, count);
    const float* p = u.scores + (from + r) * kKeyBlock;
    float* acc = u.accumulators + (from + r) * width;
    EachTile<VectorsFor(kRows)>(width / 16, [&](auto vecs, int64_t v) EDGELM_FLAT {
      FloatSums<T, kFew, kRows, decltype(vecs)::kValue>(p, common, view.values + 16 * v, view.stride,
                                                        view.keys_ahead + v * 16 * sizeof(T) * count, acc + 16 * v,
                                                        width);
    });
    for (int64_t one = 1; one < kRows; ++one) {
      const int64_t more = u.Seen(from + r + one, begin, count) - common;
      if (more == 0) continue;
      EachTile<VectorsFor(1)>(width / 16, [&](auto vecs, int64_t v) EDGELM_FLAT {
        const T* later = view.values + common * view.stride + 16 * v;
        FloatSums<T, false, 1, decltype(vecs)::kValue>(p + one * kKeyBlock + common, more, later, view.stride, nullptr,
                                                       acc + one * width + 16 * v, width);
      });
    }
  });
}

// Copy a tile of keys with fewer than 16 tokens to the layout of a tile of 16.
template <typename T>
inline void UpcastKeys(const uint8_t* tile, int64_t n, int64_t head_dim, uint8_t* to) {
  std::memset(to, 0, sizeof(T) * 16 * head_dim);
  for (int64_t d = 0; d < head_dim; ++d) std::memcpy(to + sizeof(T) * 16 * d, tile + sizeof(T) * n * d, sizeof(T) * n);
}

// Copy the block as float32, padded to whole vectors.
template <typename T>
inline FloatView<float> Pack(const Unit& u, const FloatView<T>& view, int64_t count) {
  const int64_t dim = u.call->head_dim, width = u.at.width;
  float* values = reinterpret_cast<float*>(u.values);
  FloatView<float> out = {{}, values, width, view.values_ahead, view.keys_ahead};
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < dim; i += 16) {
      T part[16] = {};
      const T* p = view.values + t * view.stride + i;
      if (dim - i < 16) {
        std::memcpy(part, p, sizeof(T) * (dim - i));
        p = part;
      }
      Store(values + t * width + i, LoadElements(p));
    }
  }
  for (int64_t i = 0; 16 * i < count; ++i) {
    float* to = reinterpret_cast<float*>(u.keys) + 16 * width * i;
    // From the last dimension to the first: the source may be at the start of the destination.
    for (int64_t d = dim; d-- > 0;) Store(to + 16 * d, LoadElements(reinterpret_cast<const T*>(view.keys[i]) + 16 * d));
    out.keys[i] = reinterpret_cast<const uint8_t*>(to);
  }
  return out;
}

template <typename T>
void AttendFloat(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const HeadCache keys = Cache(call, call.key, u.head), values = Cache(call, call.value, u.head);
  const int64_t dim = call.head_dim, width = u.at.width, first = begin / kCacheTile;
  FloatView<T> view;
  view.values = reinterpret_cast<const T*>(values.data) + begin * dim;
  view.stride = dim;
  view.values_ahead = values.Tile(first);
  view.keys_ahead = keys.Tile(begin + count < call.total() ? first + kBlockTiles : first);
  for (int64_t i = 0; 16 * i < count; ++i) {
    view.keys[i] = keys.Tile(first + i);
    if (keys.Tokens(first + i) < 16) {  // the last tile of its block and of the cache
      uint8_t* to = u.keys + 4 * 16 * width * (kBlockTiles - 1);
      UpcastKeys<T>(view.keys[i], keys.Tokens(first + i), dim, to);
      view.keys[i] = to;
    }
  }
  // Use a packed float32 copy where several tiles of rows would convert the same elements, or where a vector would
  // reach past a token's elements.
  const bool copy = width != dim || (sizeof(T) < 4 && u.rows - from > kQueryTile);
  if (call.split_kv()) {
    copy ? FloatRows<float, true>(u, from, begin, count, Pack(u, view, count))
         : FloatRows<T, true>(u, from, begin, count, view);
  } else {
    copy ? FloatRows<float, false>(u, from, begin, count, Pack(u, view, count))
         : FloatRows<T, false>(u, from, begin, count, view);
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_FLOAT_IMPL_H_
