// Attention over a cache of keys and values, over the vectors of simd_*.h. Included after one of those.
//
// One step serves a block of kKeyBlock tokens: scores of all query rows of the unit, one update of their running maximum
// and sum, their weighted sum of values. Blocks are counted from the start of the cache and go in order, and a row takes
// no part in the arithmetic of another, so a row's result depends on neither its neighbours nor how work is cut.
//
// float32, float16: fused multiply-adds in float32, dimensions (scores) and tokens (sums) in order.
// int8: integer dot products. Queries are quantised to int8 with one scale per head. The weights of a block's values,
// probability times the value's scale, are quantised in two levels, hi + lo / 254 (15 bits): with one level, everything
// below 1/254 of a block's largest weight would be lost, and with it most of a flat distribution beside one peak.
#ifndef EDGELM_KERNELS_ATTENTION_IMPL_H_
#define EDGELM_KERNELS_ATTENTION_IMPL_H_

#include "attention.h"
#include "kernels.h"
#include "math_impl.h"

namespace edgelm {
namespace {

constexpr int64_t kBlockTiles = kKeyBlock / kCacheTile;

template <int kN> struct Count { static constexpr int kValue = kN; };

// visit(Count<n>, r) for rows r .. r + n - 1, `kMost` at a time, then four, then one.
template <int kMost, typename Visit>
inline __attribute__((always_inline)) void EachTile(int64_t rows, Visit visit) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) visit(Count<kMost>(), r);
  if constexpr (kMost > 4) {
    for (; r + 4 <= rows; r += 4) visit(Count<4>(), r);
  }
  if constexpr (kMost > 1) {
    for (; r < rows; ++r) visit(Count<1>(), r);
  }
}

// -- the cache ---------------------------------------------------------------------------------------------------------

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
  const int64_t tile = position / kCacheTile, slot = position % kCacheTile, n = cache.Tokens(tile), dim = cache.head_dim;
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

// -- prepare -----------------------------------------------------------------------------------------------------------

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

// -- attend: one unit's state ------------------------------------------------------------------------------------------

// The query rows of a unit (tokens first .. first + tokens - 1 by heads of the group) and what is known of them.
struct Unit {
  const Attention* call;
  AttentionLayout at;
  int64_t head, first, tokens, rows;
  int64_t query;        // index of row 0 in the scratch
  float* scores;        // [rows, kKeyBlock], then probabilities
  float* accumulators;  // [rows, width]
  float* tops;          // [rows] running maximum, then running sum
  float* sums;
  float* weight_steps;  // int8: of a row's codes in `codes`
  int32_t* starts;      // [rows, 2] what their sums start from
  int8_t* codes;        // [rows, 2, kKeyBlock]
  uint8_t* keys;        // packed
  uint8_t* values;

  // Tokens of the cache that row r sees.
  EDGELM_INLINE int64_t Limit(int64_t r) const { return call->past + first + r / call->group() + 1; }
};

inline Unit MakeUnit(const Attention& call, int64_t head, int64_t first, int64_t tokens, uint8_t* workspace) {
  const AttentionLayout at(call);
  const int64_t most = kFewRows * call.group() > kQueryRows ? kFewRows * call.group() : kQueryRows;
  float* state = reinterpret_cast<float*>(workspace + at.state);
  return {&call, at, head, first, tokens, tokens * call.group(), (head * call.rows + first) * call.group(),
          reinterpret_cast<float*>(workspace + at.scores), reinterpret_cast<float*>(workspace + at.accumulators), state,
          state + most, state + 2 * most, reinterpret_cast<int32_t*>(state + 3 * most),
          reinterpret_cast<int8_t*>(workspace + at.codes), workspace + at.keys, workspace + at.values};
}

// A row's scores of a block become probabilities relative to its new maximum; its sum and accumulators follow.
inline void UpdateRow(const Unit& u, int64_t r, int64_t valid) {
  float* s = u.scores + r * kKeyBlock;
  const int64_t whole = valid / 16 * 16, padded = RoundUp(valid, 16);
  for (int64_t i = valid; i < padded; ++i) s[i] = -INFINITY;
  F32 most = Splat(u.tops[r]);
  for (int64_t i = 0; i < padded; i += 16) most = Max(Load(s + i), most);  // passes over NaN
  const float top = Largest(most);
  F32 sum = Splat(0.0f);
  for (int64_t i = 0; i < whole; i += 16) {
    const F32 p = Exp(Sub(Load(s + i), Splat(top)));
    Store(s + i, p);
    sum = Add(sum, p);
  }
  if (whole < padded) {  // Exp never gives 0: what is masked is set to it
    const F32 p = Exp(Sub(Load(s + whole), Splat(top)));
    Store(s + whole, Splat(0.0f));
    StorePart(s + whole, p, valid - whole);
    sum = Add(sum, Load(s + whole));
  }
  float factor[16];
  Store(factor, Exp(Splat(u.tops[r] - top)));
  u.sums[r] = __builtin_fmaf(u.sums[r], factor[0], Sum(sum));
  u.tops[r] = top;
  if (factor[0] == 1.0f) return;
  float* acc = u.accumulators + r * u.at.width;
  for (int64_t i = 0; i < u.at.width; i += 16) Store(acc + i, Mul(Load(acc + i), Splat(factor[0])));
}

// -- float32 and float16 caches ----------------------------------------------------------------------------------------

inline F32 LoadElements(const float* p) { return Load(p); }
inline F32 LoadElements(const uint16_t* p) { return LoadHalf(p); }

// Scores of kRows rows with kVec tiles of 16 tokens.
template <typename T, int kRows, int kVec>
inline __attribute__((always_inline)) void FloatScores(const uint8_t* const* tiles, const float* q, int64_t stride,
                                                       int64_t head_dim, float* s) {
  F32 f[kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) f[r][v] = Splat(0.0f);
  for (int64_t d = 0; d < head_dim; ++d) {
    F32 k[kVec];
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) k[v] = LoadElements(reinterpret_cast<const T*>(tiles[v]) + 16 * d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 x = Splat(q[r * stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) f[r][v] = Fma(x, k[v], f[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) Store(s + r * kKeyBlock + 16 * v, f[r][v]);
}

// acc[r, 16 v ..] += p[r, t] * values[t, 16 v ..] for `count` tokens t in order.
template <typename T, int kRows, int kVec>
inline __attribute__((always_inline)) void FloatSums(const float* p, int64_t count, const T* values, int64_t stride,
                                                     float* acc, int64_t width) {
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

// Vectors that a tile of rows works on at once.
constexpr int VectorsFor(int rows) { return rows == 1 ? 4 * kVectors : rows < kRowTile ? 2 * kVectors : kVectors; }
constexpr int Smaller(int a, int b) { return a < b ? a : b; }

// Rows from `from` on, whose limits lie beyond the block's first token. T: elements of the tiles and of `values`.
template <typename T>
inline void FloatBlockRows(const Unit& u, int64_t from, int64_t begin, int64_t count, const uint8_t* const* tiles,
                           const T* values, int64_t stride) {
  const int64_t width = u.at.width, vectors = width / 16, dim = u.call->head_dim, all = RoundUp(count, 16) / 16;
  const float* queries = reinterpret_cast<const float*>(u.call->scratch + u.at.queries) + u.query * width;
  for (int64_t tile = 0; tile < all; tile += 4) {
    const int64_t some = all - tile < 4 ? all - tile : 4;
    EachTile<kRowTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::kValue;
      const float* q = queries + (from + r) * width;
      float* s = u.scores + (from + r) * kKeyBlock + 16 * tile;
      EachTile<Smaller(4, VectorsFor(kRows))>(some, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
        FloatScores<T, kRows, decltype(vecs)::kValue>(tiles + tile + v, q, width, dim, s + 16 * v);
      });
    });
  }
  for (int64_t r = from; r < u.rows; ++r) UpdateRow(u, r, u.Limit(r) - begin < count ? u.Limit(r) - begin : count);
  EachTile<kRowTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::kValue;
    // What the first row sees, all see; the rest one by one: 0 times what a later token left may be NaN.
    const int64_t limit = u.Limit(from + r) - begin, common = limit < count ? limit : count;
    const float* p = u.scores + (from + r) * kKeyBlock;
    float* acc = u.accumulators + (from + r) * width;
    EachTile<VectorsFor(kRows)>(vectors, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
      FloatSums<T, kRows, decltype(vecs)::kValue>(p, common, values + 16 * v, stride, acc + 16 * v, width);
    });
    for (int64_t one = 1; one < kRows; ++one) {
      const int64_t own = u.Limit(from + r + one) - begin, seen = own < count ? own : count;
      if (seen <= common) continue;
      EachTile<VectorsFor(1)>(vectors, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
        FloatSums<T, 1, decltype(vecs)::kValue>(p + one * kKeyBlock + common, seen - common,
                                                values + common * stride + 16 * v, stride, acc + one * width + 16 * v,
                                                width);
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

template <typename T>
void FloatBlockOf(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const HeadCache keys = Cache(call, call.key, u.head), values = Cache(call, call.value, u.head);
  const int64_t dim = call.head_dim, width = u.at.width;
  const uint8_t* tiles[kBlockTiles];
  for (int64_t i = 0; 16 * i < count; ++i) {
    const int64_t tile = begin / kCacheTile + i;
    tiles[i] = keys.Tile(tile);
    if (keys.Tokens(tile) < 16) {  // the last of its block and of the cache
      uint8_t* to = u.keys + 4 * 16 * width * (kBlockTiles - 1);
      WidenKeys<T>(tiles[i], keys.Tokens(tile), dim, to);
      tiles[i] = to;
    }
  }
  const T* direct = reinterpret_cast<const T*>(values.data) + begin * dim;
  // Where several tiles of rows would convert the same elements, or a vector would reach past a token's, they are
  // converted to float32 once.
  if (width == dim && (sizeof(T) == 4 || u.rows - from <= kRowTile)) {
    FloatBlockRows<T>(u, from, begin, count, tiles, direct, dim);
    return;
  }
  float* packed = reinterpret_cast<float*>(u.values);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < dim; i += 16) {
      T part[16] = {};
      const T* p = direct + t * dim + i;
      if (dim - i < 16) {
        std::memcpy(part, p, sizeof(T) * (dim - i));
        p = part;
      }
      Store(packed + t * width + i, LoadElements(p));
    }
  }
  for (int64_t i = 0; 16 * i < count; ++i) {
    if (sizeof(T) == 4) break;
    float* to = reinterpret_cast<float*>(u.keys) + 16 * width * i;
    // From the last dimension on: a widened tile lies where it becomes float32.
    for (int64_t d = dim; d-- > 0;) Store(to + 16 * d, LoadElements(reinterpret_cast<const T*>(tiles[i]) + 16 * d));
    tiles[i] = reinterpret_cast<const uint8_t*>(to);
  }
  FloatBlockRows<float>(u, from, begin, count, tiles, packed, width);
}

// -- int8 cache --------------------------------------------------------------------------------------------------------

// c[r][v] += the dot products of four codes with the four int8 at x + r * stride.
template <int kRows, int kVec>
inline __attribute__((always_inline)) void Dots(I32 (&c)[kRows][kVec], const B8 (&codes)[kVec], const int8_t* x,
                                                int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = DotFull(c[r][v], codes[v], x + r * stride);
}

template <int kRows, int kVec>
inline __attribute__((always_inline)) void Int8Scores(const uint8_t* const* tiles, int64_t fours, const int8_t* q,
                                                      int64_t stride, const float* steps, const int32_t* sums,
                                                      float* s) {
  I32 c[kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = SplatI(kDotFullSigned ? 0 : -128 * sums[r]);
  for (int64_t i = 0; i < fours; ++i) {
    B8 codes[kVec];
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) codes[v] = LoadB(tiles[v] + 64 * i);
    Dots<kRows, kVec>(c, codes, q + 4 * i, stride);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVec; ++v) {
    const F32 scales = Load(reinterpret_cast<const float*>(tiles[v] + 64 * fours));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      Store(s + r * kKeyBlock + 16 * v, Mul(Mul(ToFloat(c[r][v]), Splat(steps[r])), scales));
  }
}

// A row's probabilities times the values' scales, in two levels.
inline void QuantWeights(const Unit& u, int64_t r, int64_t valid, const float* scales, int64_t padded) {
  float* w = u.scores + r * kKeyBlock;
  int8_t* high = u.codes + r * 2 * kKeyBlock;
  int8_t* low = high + kKeyBlock;
  F32 top = Splat(0.0f), odd = Splat(0.0f);
  for (int64_t i = 0; i < valid; i += 16) {
    const F32 x = Mul(Load(w + i), LoadPart(scales + i, valid - i < 16 ? valid - i : 16));
    Store(w + i, x);
    top = Max(x, top);
    odd = Fma(x, Splat(0.0f), odd);
  }
  const float largest = Largest(top), probe = Sum(odd);
  u.starts[2 * r] = u.starts[2 * r + 1] = 0;
  if (!(probe == 0.0f) || largest < 0x1p-100f) {
    std::memset(high, 0, 2 * kKeyBlock);
    u.weight_steps[r] = probe == 0.0f ? 0.0f : probe - probe;
    return;
  }
  const F32 inverse = Splat(127.0f / largest);
  I32 highs = SplatI(0), lows = SplatI(0);
  int64_t i = 0;
  for (; i < valid; i += 16) {
    const F32 x = Load(w + i);
    const I32 a = Round(Mul(x, inverse));
    const I32 b = Round(Mul(Fma(x, inverse, Sub(Splat(0.0f), ToFloat(a))), Splat(254.0f)));
    StoreBytes(high + i, a);
    StoreBytes(low + i, b);
    highs = AddI(highs, a);
    lows = AddI(lows, b);
  }
  for (; i < padded; i += 16) {
    StoreBytes(high + i, SplatI(0));
    StoreBytes(low + i, SplatI(0));
  }
  u.weight_steps[r] = largest / 127.0f;
  if (kDotFullSigned) return;
  u.starts[2 * r] = -128 * SumI(highs);
  u.starts[2 * r + 1] = -128 * SumI(lows);
}

// acc[r, 16 v ..] += the block's weighted sum.
template <int kRows, int kVec>
inline __attribute__((always_inline)) void Int8Sums(const Unit& u, int64_t row, int64_t count, int64_t dims,
                                                    const uint8_t* const* tiles) {
  const int64_t dim = u.call->head_dim, width = u.at.width;
  const int8_t* x = u.codes + row * 2 * kKeyBlock;
  I32 c[2 * kRows][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < 2 * kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) c[r][v] = SplatI(u.starts[2 * row + r]);
  for (int64_t t = 0; t < count; t += 16) {
    const uint8_t* four = tiles[t / 16] + 4 * dims;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, four += 4 * dim) {
      B8 codes[kVec];
#pragma GCC unroll 8
      for (int v = 0; v < kVec; ++v) codes[v] = LoadB(four + 64 * v);
      Dots<2 * kRows, kVec>(c, codes, x + t + 4 * i, kKeyBlock);
    }
  }
  float* acc = u.accumulators + row * width + dims;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const F32 step = Splat(u.weight_steps[row + r]), small = Splat(u.weight_steps[row + r] / 254.0f);
#pragma GCC unroll 8
    for (int v = 0; v < kVec; ++v) {
      float* to = acc + r * width + 16 * v;
      Store(to, Fma(ToFloat(c[2 * r][v]), step, Fma(ToFloat(c[2 * r + 1][v]), small, Load(to))));
    }
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

void Int8Block(const Unit& u, int64_t from, int64_t begin, int64_t count) {
  const Attention& call = *u.call;
  const HeadCache keys = Cache(call, call.key, u.head), values = Cache(call, call.value, u.head);
  const int64_t dim = call.head_dim, width = u.at.width, fours = (dim + 3) / 4, padded = RoundUp(count, 16);
  const int64_t all = padded / 16;
  const uint8_t* key_tiles[kBlockTiles];
  const uint8_t* value_tiles[kBlockTiles];
  alignas(64) float scales[kKeyBlock];
  for (int64_t i = 0; i < all; ++i) {
    const int64_t tile = begin / kCacheTile + i;
    key_tiles[i] = keys.Tile(tile);
    value_tiles[i] = values.Tile(tile);
    const int64_t at = i * 16 * (width + 16);
    if (dim % 4 != 0 || keys.Tokens(tile) < 16) {
      WidenCodes<true>(keys, tile, 64 * fours, u.keys + at);
      key_tiles[i] = u.keys + at;
    }
    if (values.Tokens(tile) < 16) {
      WidenCodes<false>(values, tile, 16 * dim, u.values + at);
      value_tiles[i] = u.values + at;
    }
    std::memcpy(scales + 16 * i, value_tiles[i] + 16 * dim, 64);
  }
  const int8_t* queries = reinterpret_cast<const int8_t*>(call.scratch + u.at.queries) + u.query * width;
  const float* steps = reinterpret_cast<const float*>(call.scratch + u.at.query_scales) + u.query;
  const int32_t* sums = reinterpret_cast<const int32_t*>(call.scratch + u.at.query_sums) + u.query;
  for (int64_t tile = 0; tile < all; tile += 4) {
    EachTile<kRowTile>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::kValue;
      const int64_t row = from + r;
      float* s = u.scores + row * kKeyBlock + 16 * tile;
      EachTile<Smaller(4, VectorsFor(kRows))>(all - tile < 4 ? all - tile : 4,
                                              [&](auto vecs, int64_t v) __attribute__((always_inline)) {
        Int8Scores<kRows, decltype(vecs)::kValue>(key_tiles + tile + v, fours, queries + row * width, width,
                                                  steps + row, sums + row, s + 16 * v);
      });
    });
  }
  for (int64_t r = from; r < u.rows; ++r) {
    const int64_t limit = u.Limit(r) - begin, valid = limit < count ? limit : count;
    UpdateRow(u, r, valid);
    QuantWeights(u, r, valid, scales, padded);
  }
  EachTile<kRowTile / 2>(u.rows - from, [&](auto rows, int64_t r) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::kValue;
    EachTile<VectorsFor(2 * kRows)>(width / 16, [&](auto vecs, int64_t v) __attribute__((always_inline)) {
      Int8Sums<kRows, decltype(vecs)::kValue>(u, from + r, count, 16 * v, value_tiles);
    });
  });
}

// -- attend ------------------------------------------------------------------------------------------------------------

// Rows of the unit over the cache's tokens [begin, end), from the start of their softmax.
inline void AttendTokens(const Unit& u, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < u.rows; ++r) {
    u.tops[r] = -INFINITY;
    u.sums[r] = 0.0f;
  }
  std::memset(u.accumulators, 0, 4 * u.rows * u.at.width);
  for (int64_t block = begin; block < end; block += kKeyBlock) {
    const int64_t count = end - block < kKeyBlock ? end - block : kKeyBlock;
    // Rows of tokens before the block see nothing of it.
    const int64_t before = block - u.call->past - u.first, from = before > 0 ? before * u.call->group() : 0;
    switch (u.call->cache) {
      case CacheKind::kFloat32: FloatBlockOf<float>(u, from, block, count); break;
      case CacheKind::kFloat16: FloatBlockOf<uint16_t>(u, from, block, count); break;
      case CacheKind::kInt8: Int8Block(u, from, block, count); break;
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
