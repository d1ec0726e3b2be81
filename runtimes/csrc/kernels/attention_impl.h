// Attention over a cache of keys and values, over the vectors of simd_*.h. Included after one of those.
//
// One step serves a block of kKeyBlock tokens: scores of all query rows of the unit, one update of their running
// maximum and sum, their weighted sum of values. Blocks are counted from the start of the cache and go in order, and a
// row takes no part in the arithmetic of another, so a row's result depends on neither its neighbours nor how work is
// cut.
//
// float32, float16: fused multiply-adds in float32, dimensions (scores) and tokens (sums) in order.
// int8: integer dot products. Queries are quantised to int8 with one scale per head, and so are the weights of a
// block's values (probability times the value's scale), with one step per row and block, in one or two levels:
//   fine    high + low / 254, 15 bits. With one level, all that is below 1/254 of the block's largest weight would be
//           lost, and with it most of a flat distribution beside one peak.
//   coarse  one level, rounded with dither: a pattern of offsets that makes errors cancel over tokens, so that small
//           weights survive in the sum. For blocks whose largest weight is at most 1/16 of what the row has summed so
//           far: each then adds noise of 0.4/127 * sqrt(128) / 16 = 0.2 % of a value at most, no more than its rounding
//           to int8.
#ifndef EDGELM_KERNELS_ATTENTION_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_IMPL_H_

#include "attention.h"
#include "kernels.h"
#include "math_impl.h"

namespace edgelm {
namespace {

constexpr int64_t kBlockTiles = kKeyBlock / kCacheTile;
// Query rows that work on kVectors vectors of the cache at once: their sums take half of the registers.
constexpr int kQueryTile = kVectors == 2 ? 8 : 4;

template <int kN> struct Count { static constexpr int kValue = kN; };

// visit(Count<n>, r) for rows r .. r + n - 1, `kMost` at a time, then four, two, one.
template <int kMost, typename Visit>
inline __attribute__((always_inline)) void EachTile(int64_t rows, Visit visit) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) visit(Count<kMost>(), r);
  if constexpr (kMost > 4) {
    for (; r + 4 <= rows; r += 4) visit(Count<4>(), r);
  }
  if constexpr (kMost > 2) {
    for (; r + 2 <= rows; r += 2) visit(Count<2>(), r);
  }
  if constexpr (kMost > 1) {
    for (; r < rows; ++r) visit(Count<1>(), r);
  }
}

// -- the cache --------------------------------------------------------------------------------------------------------

// One head's bytes. A tile holds 16 tokens, the last one of the cache what is left.
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

// Where element d of token `slot` of a tile of n tokens lies, in elements.
inline int64_t KeyCode(int64_t d, int64_t slot, int64_t n, int64_t head_dim) {
  const int64_t four = d / 4 * 4, width = head_dim - four < 4 ? head_dim - four : 4;
  return n * four + width * slot + d - four;
}
inline int64_t ValueCode(int64_t d, int64_t slot, int64_t n, int64_t head_dim) {
  const int64_t four = slot / 4 * 4, width = n - four < 4 ? n - four : 4;
  return head_dim * four + width * d + slot - four;
}

// x [head_dim, zeros up to whole vectors] into int8: codes = round(x * 127 / max|x|), as QuantBlock does it.
inline void QuantHead(const float* x, int64_t width, int8_t* codes, float* scale) {
  F32 odd = Splat(0.0f), top = Splat(0.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const F32 a = Load(x + i);
    odd = Fma(a, Splat(0.0f), odd);
    top = Max(Abs(a), top);
  }
  const float probe = Sum(odd), largest = Largest(top);
  if (!(probe == 0.0f) || largest < 0x1p-100f) {
    std::memset(codes, 0, width);
    *scale = probe == 0.0f ? 0.0f : probe - probe;
    return;
  }
  const F32 inverse = Splat(127.0f / largest);
  for (int64_t i = 0; i < width; i += 16) StoreBytes(codes + i, Round(Mul(Load(x + i), inverse)));
  *scale = largest / 127.0f;
}

// One token's key (or value) of one head, x [head_dim, zeros up to whole vectors], into the cache. `temporary` holds as
// many floats.
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
  uint16_t* half = reinterpret_cast<uint16_t*>(temporary);
  for (int64_t i = 0; i < width; i += 16) StoreHalf(half + i, Load(x + i));
  for (int64_t d = 0; d < dim; ++d) std::memcpy(to + 2 * (first + d * step), half + d, 2);
}

// -- prepare ----------------------------------------------------------------------------------------------------------

// What turns x into what is stored: factor * weight (norm), clip, rotation. Null: left out.
struct Transform {
  float factor;
  const float* weight;
  float clip;
  const float* cos;
  const float* sin;
};

inline F32 Normed(const Transform& t, const float* x, int64_t i, int64_t count) {
  F32 a = LoadPart(x + i, count);
  if (t.weight != nullptr) a = Mul(Mul(a, Splat(t.factor)), LoadPart(t.weight + i, count));
  if (t.clip > 0.0f) a = Max(Splat(-t.clip), Min(Splat(t.clip), a));  // NaN stays NaN
  return a;
}

// One head: y [width] = x [head_dim], zeros behind. `t.weight` is this head's.
inline void TransformHead(const Transform& t, const float* x, int64_t head_dim, int64_t width, float* y) {
  Store(y + width - 16, Splat(0.0f));
  if (t.cos == nullptr) {
    for (int64_t i = 0; i < head_dim; i += 16) {
      const int64_t count = head_dim - i < 16 ? head_dim - i : 16;
      StorePart(y + i, Normed(t, x, i, count), count);
    }
    return;
  }
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t count = half - i < 16 ? half - i : 16;
    const F32 a = Normed(t, x, i, count), b = Normed(t, x, half + i, count);
    const F32 c = LoadPart(t.cos + i, count), s = LoadPart(t.sin + i, count);
    StorePart(y + i, Sub(Mul(a, c), Mul(b, s)), count);
    StorePart(y + half + i, Add(Mul(b, c), Mul(a, s)), count);
  }
}

// 1 / sqrt(mean(x^2) + epsilon), as RmsNorm takes it.
inline float NormFactor(const float* x, int64_t columns, float epsilon) {
  F32 squares = Splat(0.0f);
  for (int64_t i = 0; i < columns; i += 16) {
    const F32 a = LoadPart(x + i, columns - i < 16 ? columns - i : 16);
    squares = Fma(a, a, squares);
  }
  return 1.0f / __builtin_sqrtf(Sum(squares) / static_cast<float>(columns) + epsilon);
}

inline void StoreQuery(const Attention& call, const AttentionLayout& at, int64_t row, const float* y, float scale) {
  if (call.cache != CacheKind::kInt8) {
    float* to = reinterpret_cast<float*>(call.scratch + at.queries) + row * at.width;
    for (int64_t i = 0; i < at.width; i += 16) Store(to + i, Mul(Load(y + i), Splat(scale)));
    return;
  }
  int8_t* codes = reinterpret_cast<int8_t*>(call.scratch + at.queries) + row * at.width;
  float step;
  QuantHead(y, at.width, codes, &step);
  int32_t sum = 0;
  for (int64_t i = 0; i < at.width; ++i) sum += codes[i];
  reinterpret_cast<float*>(call.scratch + at.query_scales)[row] = step * scale;
  reinterpret_cast<int32_t*>(call.scratch + at.query_sums)[row] = sum;
}

void AttentionPrepare(const Attention& call, int64_t unit, uint8_t* workspace) {
  const AttentionLayout at(call);
  const int64_t dim = call.head_dim, group = call.group();
  const int64_t end = (unit + 1) * kPrepareRows < call.rows ? (unit + 1) * kPrepareRows : call.rows;
  const float scale = call.scale != 0.0f ? call.scale : 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  float* y = reinterpret_cast<float*>(workspace);
  float* temporary = y + at.width;
  for (int64_t t = unit * kPrepareRows; t < end; ++t) {
    const float* q = call.qkv + t * (call.heads + 2 * call.kv_heads) * dim;
    const float* k = q + call.heads * dim;
    const float* v = k + call.kv_heads * dim;
    const int64_t position = call.past + t;
    Transform how = {0.0f, nullptr, call.clip, call.cos + position * (dim / 2), call.sin + position * (dim / 2)};
    if (call.q_norm != nullptr) how.factor = NormFactor(q, call.heads * dim, call.epsilon);
    for (int64_t h = 0; h < call.heads; ++h) {
      how.weight = call.q_norm != nullptr ? call.q_norm + h * dim : nullptr;
      TransformHead(how, q + h * dim, dim, at.width, y);
      StoreQuery(call, at, (h / group * call.rows + t) * group + h % group, y, scale);
    }
    if (call.k_norm != nullptr) how.factor = NormFactor(k, call.kv_heads * dim, call.epsilon);
    const Transform plain = {0.0f, nullptr, call.clip, nullptr, nullptr};
    for (int64_t h = 0; h < call.kv_heads; ++h) {
      how.weight = call.k_norm != nullptr ? call.k_norm + h * dim : nullptr;
      TransformHead(how, k + h * dim, dim, at.width, y);
      StoreToken<true>(Cache(call, call.key, h), call.cache, position, y, at.width, temporary);
      TransformHead(plain, v + h * dim, dim, at.width, y);
      StoreToken<false>(Cache(call, call.value, h), call.cache, position, y, at.width, temporary);
    }
  }
}

// -- attend: one unit's state -----------------------------------------------------------------------------------------

// The query rows of a unit (tokens first .. first + tokens - 1 by heads of the group) and what is known of them.
struct Unit {
  const Attention* call;
  AttentionLayout at;
  int64_t head, first, tokens, rows;
  int64_t query;        // index of row 0 in the scratch
  float* scores;        // [rows, kKeyBlock], then probabilities, then int8 caches' weights
  float* accumulators;  // [rows, width]
  float* tops;          // [rows] running maximum, then running sum, then what the last block's maximum made of both
  float* sums;
  float* factors;
  float* weights;       // int8: running sum of weights
  int8_t* codes;        // int8: [rows of codes, kKeyBlock], two at most for a row: second level, first level
  float* steps;         // of rows of codes
  int32_t* starts;      // of rows of codes: what their sums start from
  int32_t* targets;     // of rows of codes: whose they are
  uint8_t* keys;        // packed
  uint8_t* values;

  // Tokens of the block at `begin` that row r sees.
  EDGELM_INLINE int64_t Seen(int64_t r, int64_t begin, int64_t count) const {
    const int64_t limit = call->past + first + r / call->group() + 1 - begin;
    return limit < count ? limit : count;
  }
};

inline Unit MakeUnit(const Attention& call, int64_t head, int64_t first, int64_t tokens, uint8_t* workspace) {
  const AttentionLayout at(call);
  float* state = reinterpret_cast<float*>(workspace + at.state);
  return {&call, at, head, first, tokens, tokens * call.group(), (head * call.rows + first) * call.group(),
          reinterpret_cast<float*>(workspace + at.scores), reinterpret_cast<float*>(workspace + at.accumulators), state,
          state + at.most, state + 2 * at.most, state + 3 * at.most, reinterpret_cast<int8_t*>(workspace + at.codes),
          state + 4 * at.most, reinterpret_cast<int32_t*>(state + 6 * at.most),
          reinterpret_cast<int32_t*>(state + 8 * at.most), workspace + at.keys, workspace + at.values};
}

// A row's scores of a block become probabilities relative to its new maximum (weights, where the values' `scales` are
// given: times those). Returns the largest of them in *most, and their sum before that.
template <bool kScaled>
inline float Exponentials(float* s, int64_t valid, float top, const float* scales, float* most) {
  const F32 tops = Splat(top);
  F32 sum = Splat(0.0f), largest = Splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= valid; i += 16) {
    F32 p = Exp(Sub(Load(s + i), tops));
    sum = Add(sum, p);
    if (kScaled) {
      p = Mul(p, Load(scales + i));
      largest = Max(p, largest);
    }
    Store(s + i, p);
  }
  if (i < valid) {  // Exp never gives 0: what is masked is set to it
    const int64_t left = valid - i;
    F32 p = Exp(Sub(LoadPart(s + i, left), tops));
    Store(s + i, Splat(0.0f));
    StorePart(s + i, p, left);
    p = Load(s + i);
    sum = Add(sum, p);
    if (kScaled) {
      p = Mul(p, LoadPart(scales + i, left));
      largest = Max(p, largest);
      Store(s + i, p);
    }
  }
  if (kScaled) *most = Largest(largest);
  return Sum(sum);
}

// The rows' running maxima take in a block's scores; `factors` is what becomes of what was summed before.
inline void UpdateTops(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  for (int64_t r = from; r < u.rows; ++r) {
    float* s = u.scores + r * kKeyBlock;
    const int64_t valid = u.Seen(r, begin, count), padded = RoundUp(valid, 16);
    for (int64_t i = valid; i < padded; ++i) s[i] = -INFINITY;
    F32 most = Splat(u.tops[r]);
    for (int64_t i = 0; i < padded; i += 16) most = Max(Load(s + i), most);  // passes over NaN
    u.factors[r] = Largest(most);
  }
  for (int64_t r = from; r < u.rows; r += 16) {
    const int64_t n = u.rows - r < 16 ? u.rows - r : 16;
    const F32 before = LoadPart(u.tops + r, n), after = LoadPart(u.factors + r, n);
    StorePart(u.tops + r, after, n);
    StorePart(u.factors + r, Exp(Sub(before, after)), n);
  }
}

// A row's sum and accumulators relative to its new maximum, with a block's sum.
inline void UpdateSum(const Unit& u, int64_t r, float sum) {
  const float factor = u.factors[r];
  u.sums[r] = __builtin_fmaf(u.sums[r], factor, sum);
  if (factor == 1.0f) return;
  float* acc = u.accumulators + r * u.at.width;
  for (int64_t i = 0; i < u.at.width; i += 16) Store(acc + i, Mul(Load(acc + i), Splat(factor)));
}

// Vectors that a tile of rows works on at once.
constexpr int VectorsFor(int rows) { return rows <= 2 && kVectors == 2 ? 8 : kQueryTile * kVectors / rows; }

// The functions of one tile come in two forms. kFew: few query rows, whose time is the memory's. They take the cache
// from front to back, since two streams a few kilobytes apart halve what memory gives, and while they work on a block's
// keys they call for its values (`ahead`), on its values for the next block's keys: the processor foresees no turn.
template <bool kFew>
inline void CallFor(const uint8_t* p) {
  if (kFew) __builtin_prefetch(p, 0, 2);
}

// -- float32 and float16 caches ---------------------------------------------------------------------------------------

inline F32 LoadElements(const float* p) { return Load(p); }
inline F32 LoadElements(const uint16_t* p) { return LoadHalf(p); }

// Scores of kRows rows with kVec tiles of 16 tokens. kFew: two sums, of the even and of the odd dimensions, since one
// tile alone is one chain of additions.
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

// A block's keys and values as the kernels read them, and what they call for meanwhile.
template <typename T>
struct FloatView {
  const uint8_t* keys[kBlockTiles];
  const T* values;
  int64_t stride;
  const uint8_t* values_ahead;
  const uint8_t* keys_ahead;
};

// Rows from `from` on, which see the block's first token at least.
template <typename T, bool kFew>
inline void FloatRows(const Unit& u, int64_t from, int64_t begin, int64_t count, const FloatView<T>& view) {
  const int64_t width = u.at.width, dim = u.call->head_dim, tiles = RoundUp(count, 16) / 16;
  const float* queries = reinterpret_cast<const float*>(u.call->scratch + u.at.queries) + u.query * width;
  constexpr int64_t kSome = kFew ? 1 : 4;
  for (int64_t tile = 0; tile < tiles; tile += kSome) {
    const int64_t some = tiles - tile < kSome ? tiles - tile : kSome;
    const uint8_t* ahead = view.values_ahead + tile * 16 * dim * sizeof(T);
    EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      const float* q = queries + (from + r) * width;
      float* s = u.scores + (from + r) * kKeyBlock + 16 * tile;
      EachTile<kFew ? 1 : kVectors>(some, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
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
  EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::kValue;
    // What the first row sees, all see; the rest one by one: 0 times what a later token left may be NaN.
    const int64_t common = u.Seen(from + r, begin, count);
    const float* p = u.scores + (from + r) * kKeyBlock;
    float* acc = u.accumulators + (from + r) * width;
    EachTile<VectorsFor(kRows)>(width / 16, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
      FloatSums<T, kFew, kRows, decltype(vecs)::kValue>(p, common, view.values + 16 * v, view.stride,
                                                        view.keys_ahead + v * 16 * sizeof(T) * count, acc + 16 * v,
                                                        width);
    });
    for (int64_t one = 1; one < kRows; ++one) {
      const int64_t more = u.Seen(from + r + one, begin, count) - common;
      if (more == 0) continue;
      EachTile<VectorsFor(1)>(width / 16, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
        const T* later = view.values + common * view.stride + 16 * v;
        FloatSums<T, false, 1, decltype(vecs)::kValue>(p + one * kKeyBlock + common, more, later, view.stride, nullptr,
                                                       acc + one * width + 16 * v, width);
      });
    }
  });
}

// A tile of keys with fewer than 16 tokens, as if it had 16.
template <typename T>
inline void WidenKeys(const uint8_t* tile, int64_t n, int64_t head_dim, uint8_t* to) {
  std::memset(to, 0, sizeof(T) * 16 * head_dim);
  for (int64_t d = 0; d < head_dim; ++d) std::memcpy(to + sizeof(T) * 16 * d, tile + sizeof(T) * n * d, sizeof(T) * n);
}

// The block as float32 with whole vectors.
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
    // From the last dimension on: a widened tile may lie where it becomes float32.
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
    if (keys.Tokens(first + i) < 16) {  // the last of its block and of the cache
      uint8_t* to = u.keys + 4 * 16 * width * (kBlockTiles - 1);
      WidenKeys<T>(view.keys[i], keys.Tokens(first + i), dim, to);
      view.keys[i] = to;
    }
  }
  // Where several tiles of rows would convert the same elements, or a vector would reach past a token's, a packed copy
  // serves all.
  const bool copy = width != dim || (sizeof(T) < 4 && u.rows - from > kQueryTile);
  if (call.split()) {
    copy ? FloatRows<float, true>(u, from, begin, count, Pack(u, view, count))
         : FloatRows<T, true>(u, from, begin, count, view);
  } else {
    copy ? FloatRows<float, false>(u, from, begin, count, Pack(u, view, count))
         : FloatRows<T, false>(u, from, begin, count, view);
  }
}

// -- int8 cache -------------------------------------------------------------------------------------------------------

// c[r][v] += the dot products of four codes with the four int8 at x + r * stride.
template <int kRows, int kVec>
inline __attribute__((always_inline)) void Dots(I32 (&c)[kRows][kVec], const B8 (&codes)[kVec], const int8_t* x,
                                                int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = DotFull(c[r][v], codes[v], x + r * stride);
}

// Scores of kRows rows with kVec tiles. Several sums of a row shorten the chains where there are few.
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
  const auto add = [&](I32(&to)[kRows][kVec], int64_t i) __attribute__((always_inline)) {
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

// Offsets of -0.5 .. 0.5 by the golden ratio: any few tokens in a row have them spread evenly.
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

// Appends the codes of a row's weights to the `rows` there are. `spoilt`: one of the weights is NaN.
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
  I32 both = SplatI(0);  // sums of `high` times 2^16 plus those of `low`, which are within +-127 * kKeyBlock
  static_assert(127 * kKeyBlock < 32768);
  float step;
  int64_t i = 0;
  if (coarse) {
    step = largest / 126.49f;  // so that with its offset none is above 127
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
  u.steps[rows] = step / 254.0f;  // where coarse, overwritten
  u.steps[at] = step;
  u.starts[rows] = kDotFullSigned ? 0 : -128 * lows;
  u.starts[at] = kDotFullSigned ? 0 : -128 * highs;
  u.targets[rows] = u.targets[at] = static_cast<int32_t>(r);
  return at + 1;
}

// acc[target, dims ..] += the block's values weighted by kRows rows of codes.
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

// A tile with fewer than 16 tokens, or of keys with a dimension left over, as the kernels read it: `codes` bytes, zeros
// where there is nothing, then 16 scales.
template <bool kKey>
inline void WidenCodes(const HeadCache& cache, int64_t tile, int64_t codes, uint8_t* to) {
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
      WidenCodes<true>(keys, first + i, (dim + 3) / 4 * 64, u.keys + at);
      view.keys[i] = u.keys + at;
    }
    if (values.Tokens(first + i) < 16) {
      WidenCodes<false>(values, first + i, 16 * dim, u.values + at);
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
    EachTile<kQueryTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::kValue;
      const int64_t row = from + r;
      EachTile<kFew ? 1 : kVectors>(some, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
        Int8Scores<kFew, kRows, decltype(vecs)::kValue>(
            view.keys + tile + v, view.values_ahead + (tile + v) * 16 * (dim + 4), (dim + 3) / 4,
            queries + row * width, width, steps + row, sums + row, u.scores + row * kKeyBlock + 16 * (tile + v));
      });
    });
  }
  // A value's scale is NaN where the value is not finite.
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
  EachTile<kQueryTile>(code_rows, [&](auto rows, int64_t r) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::kValue;
    EachTile<VectorsFor(kRows)>(width / 16, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
      Int8Sums<kFew, kRows, decltype(vecs)::kValue>(u, r, count, 16 * v, view.values,
                                                    view.keys_ahead + v * 16 * padded);
    });
  });
}

// -- attend -----------------------------------------------------------------------------------------------------------

// Rows of the unit over the cache's tokens [begin, end), from the start of their softmax.
inline void AttendTokens(const Unit& u, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < u.rows; ++r) {
    u.tops[r] = -INFINITY;
    u.sums[r] = 0.0f;
    u.weights[r] = 0.0f;
  }
  std::memset(u.accumulators, 0, 4 * u.rows * u.at.width);
  for (int64_t block = begin; block < end; block += kKeyBlock) {
    const int64_t count = end - block < kKeyBlock ? end - block : kKeyBlock;
    // Rows of tokens before the block see nothing of it.
    const int64_t before = block - u.call->past - u.first, from = before > 0 ? before * u.call->group() : 0;
    switch (u.call->cache) {
      case CacheKind::kFloat32: AttendFloat<float>(u, from, block, count); break;
      case CacheKind::kFloat16: AttendFloat<uint16_t>(u, from, block, count); break;
      case CacheKind::kInt8:
        u.call->split() ? AttendInt8<true>(u, from, block, count) : AttendInt8<false>(u, from, block, count);
        break;
    }
  }
}

// out = accumulators / sum
inline void FinishRow(const Attention& call, int64_t token, int64_t head, const float* acc, float sum) {
  float* out = call.out + (token * call.heads + head) * call.head_dim;
  for (int64_t i = 0; i < call.head_dim; i += 16) {
    const int64_t count = call.head_dim - i < 16 ? call.head_dim - i : 16;
    StorePart(out + i, Div(Load(acc + i), Splat(sum)), count);
  }
}

void AttentionAttend(const Attention& call, int64_t unit, uint8_t* workspace) {
  const int64_t pieces = call.pieces(), group = call.group();
  if (call.split()) {
    const int64_t head = unit / pieces, piece = unit % pieces, begin = piece * kCachePiece;
    const Unit u = MakeUnit(call, head, 0, call.rows, workspace);
    AttendTokens(u, begin, begin + kCachePiece < call.total() ? begin + kCachePiece : call.total());
    for (int64_t r = 0; r < u.rows; ++r) {
      const float* acc = u.accumulators + r * u.at.width;
      if (pieces == 1) {
        FinishRow(call, r / group, head * group + r % group, acc, u.sums[r]);
        continue;
      }
      const int64_t at = (u.query + r) * pieces + piece;
      reinterpret_cast<float*>(call.scratch + u.at.tops)[at] = u.tops[r];
      reinterpret_cast<float*>(call.scratch + u.at.sums)[at] = u.sums[r];
      std::memcpy(reinterpret_cast<float*>(call.scratch + u.at.partials) + at * u.at.width, acc, 4 * u.at.width);
    }
    return;
  }
  // The last blocks, which see most, first: whoever gets the last unit gets a short one.
  const int64_t head = unit % call.kv_heads, first = (call.blocks() - 1 - unit / call.kv_heads) * call.block_rows();
  const int64_t tokens = call.rows - first < call.block_rows() ? call.rows - first : call.block_rows();
  const Unit u = MakeUnit(call, head, first, tokens, workspace);
  AttendTokens(u, 0, call.past + first + tokens);
  for (int64_t r = 0; r < u.rows; ++r)
    FinishRow(call, first + r / group, head * group + r % group, u.accumulators + r * u.at.width, u.sums[r]);
}

void AttentionCombine(const Attention& call, int64_t unit) {
  const AttentionLayout at(call);
  const int64_t head = unit / call.rows, token = unit % call.rows, group = call.group(), all = call.pieces();
  // Pieces that begin after the token know nothing of it.
  const int64_t pieces = (call.past + token) / kCachePiece + 1;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t row = unit * group + g;
    const float* tops = reinterpret_cast<const float*>(call.scratch + at.tops) + row * all;
    const float* sums = reinterpret_cast<const float*>(call.scratch + at.sums) + row * all;
    float* partials = reinterpret_cast<float*>(call.scratch + at.partials) + row * all * at.width;
    float top = tops[0], sum = 0.0f;
    for (int64_t i = 1; i < pieces; ++i) top = tops[i] > top ? tops[i] : top;
    for (int64_t i = 0; i < pieces; ++i) {
      float factor[16];
      Store(factor, Exp(Splat(tops[i] - top)));
      sum = __builtin_fmaf(sums[i], factor[0], sum);
      for (int64_t d = 0; d < at.width; d += 16) {  // into the first piece's
        const F32 before = i == 0 ? Splat(0.0f) : Load(partials + d);
        Store(partials + d, Fma(Load(partials + i * at.width + d), Splat(factor[0]), before));
      }
    }
    FinishRow(call, token, head * group + g, partials, sum);
  }
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_ATTENTION_IMPL_H_
